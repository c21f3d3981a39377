"""The training of one job: its retain rows, its batches, its loop; read `judging` next."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from studies.common_training import steps

from . import story_rows
from .arms import ALPHA, ARMS, BATCH, LAB, RANK, SCENARIOS, WARM_UP, Job

if TYPE_CHECKING:
    from torch import nn


def retain_rows(task: str, seed: int, n: int) -> dict[str, list[dict[str, Any]]]:
    """What a Fisher can be of, by set, all of the train split: of an answer to a prompt only the answer counts."""
    from holdfast import lab

    text = [row for row in lab.retain(24 * n, seed=2000 + seed) if "<|user|>" not in row["text"]]
    return {
        "alignment": lab.safety_sft(n, seed=3000 + seed),
        "skills": lab.retain(n, seed=1000 + seed, form="completion"),
        "text": text[:n],
        "task": lab.task(task, n=n, seed=4000 + seed),
    }


def train(job: Job) -> Iterator[tuple[int, nn.Module, float]]:
    """Train; after each of the job's points yield the steps, the model and the CPU seconds of training so far."""
    import torch
    from holdfast import lab
    from holdfast.integrations.retain_data import to_batches
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(job.seed)
    n, scenario = job.points[-1] * BATCH, SCENARIOS[job.scenario]
    if job.scenario in LAB:
        base, tokenizer = lab.load("lab-aligned")
        task, retain = lab.task(job.scenario, n=n, seed=job.seed), retain_rows(job.scenario, job.seed, scenario.rows)
    else:
        base, tokenizer = story_rows.load(job.work)
        task, retain = story_rows.training(job.work, n, job.seed, scenario.rows)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    model, methods = get_peft_model(base, config).train(), ARMS[job.arm].methods(scenario, job.strength)
    batches = to_batches(task, tokenizer, batch_size=BATCH)
    for done, seconds in steps(
        model, batches, methods, rate=job.learning_rate, warm_up=WARM_UP, retain=retain, tokenizer=tokenizer,
        seed=job.seed,
    ):  # fmt: skip
        if done in job.points:
            yield done, model, seconds
