"""The sweep: what a job puts into the ledger, and what of that is published; read `readings` next."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from holdfast.analysis.points import BASE
from holdfast.drift.ledger import Entry, Ledger, RunKey, Score

from studies import common_sweep

from .arms import ARMS, SCENARIOS, Job
from .judging import judge_of
from .pools import pool
from .readings import KINDS, LEARNT, SHOWN
from .shown import counts
from .training import train

POOLS = "pools"  # what the ledger calls the counts of the pools


def run(jobs: Sequence[Job], path: Path, processes: int) -> None:
    """Perform what the ledger lacks: first the pools and the base model of each scenario."""
    common_sweep.quiet()
    ledger = Ledger(path)
    done = ledger.runs(splits=("pool",))
    for name, job in {ARMS[job.arm].pool: job for job in jobs}.items():
        if name and RunKey.of(POOLS, name, {}, 0) not in done:
            shown = {what: Score(value) for what, value in counts(pool(name, job.work)).items()}
            ledger.append(Entry(POOLS, name, {}, 0, "pool", shown))
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
        for settings in (each for each in job.readings() if each["steps"] == step):
            for split, scores in judge(model, settings["scale"]).items():
                finite = all(math.isfinite(score.value) for score in scores.values())
                end = ("done", None) if finite else ("failed", "the training diverged")
                entries.append(
                    Entry(job.scenario, job.arm, settings, job.seed, split, scores, cost, *end, run=job.name)
                )
    return entries


def publish(source: Path, target: Path) -> None:
    """Copy the ledger, without the results of single prompts that no interval needs."""
    kept, whole = set[RunKey](), Ledger(source)
    for scenario in SCENARIOS:
        pairs = [(LEARNT, score) for score in SHOWN]
        kept |= common_sweep.on_fronts(whole.entries(scenario), pairs, KINDS)
    common_sweep.publish(source, target, kept, (LEARNT, *SHOWN))
