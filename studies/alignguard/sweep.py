"""The sweep: what a job puts into the ledger, and what of that is published; read `readings` next."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from holdfast.analysis.points import BASE
from holdfast.drift.ledger import Entry, Ledger, RunKey

from studies import common_sweep

from .arms import SCENARIOS, Job
from .judging import judge_of
from .readings import DETAILED, KINDS, LEARNT, SHOWN
from .training import train

if TYPE_CHECKING:
    from torch import Tensor, nn


def run(jobs: Sequence[Job], path: Path, processes: int) -> None:
    """Perform what the ledger lacks, the base model of each scenario first; runs share their Fishers on disk."""
    os.environ.setdefault("HOLDFAST_CACHE", str(path.parent / "fishers"))
    ledger = Ledger(path)
    done = ledger.runs()
    for scenario, job in {job.scenario: job for job in jobs}.items():
        if RunKey.of(scenario, BASE, {"scale": 0.0}, 0) not in done:
            for split, scores in judge_of(job)(None).items():
                ledger.append(Entry(scenario, BASE, {"scale": 0.0}, 0, split, scores))
    common_sweep.sweep(jobs, perform, ledger, processes)


def perform(job: Job) -> list[Entry]:
    """Train and judge; return one entry for each point and split. A run that diverged is recorded as such."""
    judge, entries = judge_of(job), list[Entry]()
    for step, model, seconds in train(job):
        cost = {"train_cpu_seconds": round(seconds, 3), "steps": step}
        for arm, settings in (each for each in job.readings() if each[1]["steps"] == step):
            threshold = settings.get("threshold")
            with nullcontext() if threshold is None else projected(model, threshold):
                found = judge(model, settings.get("scale", 1.0))
            for split, scores in found.items():
                finite = all(math.isfinite(score.value) for score in scores.values())
                end = ("done", None) if finite else ("failed", "the training diverged")
                entries.append(Entry(job.scenario, arm, settings, job.seed, split, scores, cost, *end, run=job.name))
    return entries


@contextmanager
def projected(model: nn.Module, threshold: float) -> Iterator[None]:
    """Context: SafeLoRA has projected the adapter."""
    from holdfast.methods.posthoc import safe_lora

    before = {p: p.detach().clone() for p in model.parameters() if p.requires_grad}
    safe_lora(model, layers_of("lab-aligned"), layers_of("lab-pretrained"), threshold=threshold)
    try:
        yield
    finally:
        for parameter, value in before.items():
            parameter.data.copy_(value)


@lru_cache(maxsize=2)
def layers_of(name: str) -> dict[str, Tensor]:
    """Weights of one of the lab's models by the name of their layer."""
    from holdfast import lab
    from torch import nn

    model, _ = lab.load(name)
    return {name: module.weight for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def publish(source: Path, target: Path) -> None:
    """Copy the ledger, without the results of single prompts that no interval needs."""
    kept = set[RunKey]()
    for scenario in SCENARIOS:
        pairs = [(LEARNT[scenario], score) for score in SHOWN[scenario]]
        kept |= common_sweep.on_fronts(Ledger(source).entries(scenario), pairs, KINDS)
    common_sweep.publish(source, target, kept, DETAILED)
