"""The sweep: its jobs, the processes that perform them, the ledger, what of it is published; read `readings` next."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from holdfast.drift.ledger import Entry, Ledger, RunKey

from studies.common_sweep import on_fronts, sweep
from studies.common_sweep import publish as copy_published

from .arms import ARMS, POINTS, RATES_OF, SCALED, STAGES, Job
from .judging import Judge, judge_of
from .readings import DETAILED, KINDS, SHOWN
from .training import train

if TYPE_CHECKING:
    from torch import nn


def jobs(pipelines: Sequence[str], seeds: Sequence[int], arms: Sequence[str]) -> list[Job]:
    """Every run of these pipelines, seeds and arms."""
    return [
        Job(pipeline, name, rate, seed, POINTS[pipeline])
        for pipeline, name, seed in product(pipelines, arms, seeds)
        if pipeline in ARMS[name].pipelines
        for rate in RATES_OF.get(pipeline, ARMS[name].rates)
    ]


def run(jobs: Sequence[Job], path: Path, processes: int = 2) -> None:
    """Perform what the ledger lacks, slow runs first, and tell how long it may take."""
    ledger = Ledger(path)
    done = ledger.runs()
    todo = [job for job in jobs if not done.issuperset(job.keys())]
    for job in {job.pipeline: job for job in todo}.values():
        if RunKey.of(job.pipeline, "base", {"scale": 0.0}, 0) not in done:
            for split, scores in Judge(job.items, job.probe).scores().items():
                ledger.append(Entry(job.pipeline, "base", {"scale": 0.0}, 0, split, scores))
    sweep(jobs, perform, ledger, processes)


def perform(job: Job) -> list[Entry]:
    """Train and judge; return one entry for each point and split."""
    judge, entries = judge_of(job.items, job.probe), []
    run = f"{job.pipeline}-{job.arm}-{job.learning_rate:g}-{job.seed}"

    def add(arm: str, settings: dict[str, float], adapted: nn.Module, seconds: float) -> None:
        for split, scores in judge.scores(adapted, settings.get("scale", 1.0)).items():
            cost = {"train_cpu_seconds": round(seconds, 3), "steps": settings["steps"]}
            entries.append(Entry(job.pipeline, arm, settings, job.seed, split, scores, cost, run=run))

    for step, model, seconds in train(job):
        add(job.arm, job.settings(step), model, seconds)
        for scale in job.scales if step == job.points[-1] else ():
            add(SCALED, job.settings(step, scale), model, seconds)
    return entries


def publish(source: Path, target: Path) -> None:
    """Copy the ledger, without the results of single prompts that no interval needs."""
    pairs, kept = [(axis, score) for axis, scores in SHOWN.items() for score in scores], set[RunKey]()
    for pipeline in STAGES:
        kept |= on_fronts(Ledger(source).entries(pipeline), pairs, KINDS)
    copy_published(source, target, kept, DETAILED)
