"""The training of one job: its pool, its batches, its loop; read `formats` next."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from studies.common_training import steps

from .arms import ARMS, BATCH, BESIDE, SCENARIOS, WARM_UP, Job
from .pools import pool

if TYPE_CHECKING:
    from torch import nn


def train(job: Job) -> Iterator[tuple[int, nn.Module, float]]:
    """Train; after each of the job's points yield the steps, the model and the CPU seconds of training so far."""
    import torch
    from holdfast import lab
    from holdfast.integrations.retain_data import to_batches

    torch.manual_seed(job.seed)
    scenario, arm = SCENARIOS[job.scenario], ARMS[job.arm]
    base, tokenizer = lab.load("lab-aligned")
    size = BATCH - BESIDE if arm.pool else BATCH
    task = lab.task(scenario.task, n=job.points[-1] * size, seed=job.seed)
    kept = pool(arm.pool, job.work).batches(tokenizer.pad_token_id) if arm.pool else ()
    model = tuned(base, scenario.rank)
    for done, seconds in steps(
        model, to_batches(task, tokenizer, batch_size=size), arm.methods(job.strength), rate=job.learning_rate,
        warm_up=WARM_UP, retain=kept, tokenizer=tokenizer, seed=job.seed,
    ):  # fmt: skip
        if done in job.points:
            yield done, model, seconds


def tuned(base: nn.Module, rank: int) -> nn.Module:
    """The model that is trained: with an adapter of this rank, or all of its weights."""
    from peft import LoraConfig, get_peft_model

    if not rank:
        return base.requires_grad_(True).train()
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(base, config).train()
