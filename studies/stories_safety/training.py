"""The training of one job: its batches and its loop; read `judging` next."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from studies.common_training import steps

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
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(job.seed)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config).train()
    batches, methods, retain = batches_of(job, rows), ARMS[job.arm].methods(), rows["retain"][str(job.seed)]
    for done, seconds in steps(
        model, batches, methods, rate=job.learning_rate, warm_up=WARM_UP, retain=retain, seed=job.seed
    ):
        if done in job.points:
            yield done, model, seconds
