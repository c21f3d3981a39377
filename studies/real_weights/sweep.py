"""The sweep: what one job adds to the ledger, and what of it is published; read `readings` next."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from holdfast.analysis.points import BASE
from holdfast.drift.ledger import Entry, Ledger, RunKey

from studies import common_sweep

from .arms import SPLITS, TASKS, Job
from .judging import Plain, judge
from .readings import KINDS, LEARNT, SHOWN
from .rows import load, measured
from .training import train

if TYPE_CHECKING:
    from torch import nn


def perform(job: Job) -> list[Entry]:
    """Train and judge; return one entry for each number of steps, scale and split."""
    rows, plain, entries = measured(job.work, job.task), Plain(job.work), list[Entry]()

    def pause(step: int, model: nn.Module, seconds: float) -> None:
        cost = {"train_cpu_seconds": round(seconds, 3), "steps": step}
        for scale in job.scales:
            whole, settings = plain.merge(model, scale), job.settings(step, scale)
            for split in SPLITS:
                scores = judge(whole, rows[split])
                entries.append(Entry(job.task, job.arm, settings, job.seed, split, scores, cost, run=job.name))

    train(job, pause)
    return entries


def run(todo: Sequence[Job], ledger: Path, processes: int) -> None:
    """Perform what the ledger lacks, of the base first."""
    common_sweep.quiet()
    done = Ledger(ledger).runs()
    for task, work in {job.task: job.work for job in todo}.items():
        if RunKey.of(task, BASE, {"scale": 0.0}, 0) not in done:
            model, _ = load(work)
            for split, rows in measured(work, task).items():
                Ledger(ledger).append(Entry(task, BASE, {"scale": 0.0}, 0, split, judge(model.eval(), rows)))
        common_sweep.sweep([job for job in todo if job.task == task], perform, Ledger(ledger), processes)


def publish(source: Path, target: Path) -> None:
    """Copy the ledger, without the results of single rows that no interval needs."""
    kept = set[RunKey]()
    for task in TASKS:
        if entries := Ledger(source).entries(task):
            pairs = [(LEARNT, score) for score in SHOWN]
            kept |= common_sweep.on_fronts(entries, pairs, KINDS)
    common_sweep.publish(source, target, kept, tuple(KINDS))
