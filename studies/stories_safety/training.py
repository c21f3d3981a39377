"""The training of one job: its batches and its loop; read `judging` next."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arms import ALPHA, ARMS, BATCH, RANK, WARM_UP, Job
from .rows import Row, collated

if TYPE_CHECKING:
    from torch import Tensor, nn


def batches_of(job: Job, rows: Mapping[str, Any]) -> list[dict[str, Tensor]]:
    """The batches of a run; with replay every retain row comes before any comes again."""
    shuffle, steps = random.Random(job.seed), job.points[-1]

    def drawn(pool: Sequence[Row], n: int) -> list[Row]:
        return [row for _ in range(n // len(pool) + 1) for row in shuffle.sample(pool, len(pool))][:n]

    task, size = drawn(rows["train"], steps * BATCH), ARMS[job.arm].replay
    mixed = drawn([row for each in rows["retain"][str(job.seed)].values() for row in each], steps * size)
    return [collated(task[i * BATCH : (i + 1) * BATCH] + mixed[i * size : (i + 1) * size]) for i in range(steps)]


def train(job: Job, rows: Mapping[str, Any], folder: Path) -> Iterator[tuple[int, nn.Module, float]]:
    """Train; after each of the job's points yield the steps, the model and the CPU seconds of training so far."""
    import torch
    from holdfast import preserve
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(job.seed)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config).train()
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, job.learning_rate, weight_decay=0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARM_UP))
    batches, methods, seconds = batches_of(job, rows), ARMS[job.arm].methods(), 0.0
    retain = rows["retain"][str(job.seed)] if methods else ()
    started = time.process_time()
    with preserve(model, optimizer, methods, retain=retain, seed=job.seed) as session:
        for done, batch in enumerate(batches, start=1):
            (model(**batch).loss + session.loss(batch)).backward()
            session.gradients_ready()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            if done in job.points:
                seconds += time.process_time() - started
                yield done, model, seconds
                started = time.process_time()
