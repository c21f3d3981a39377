"""The sweep: its jobs, the ledger that they fill, and what of it is published; read `readings` next."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from holdfast.analysis.points import BASE, front, points
from holdfast.drift.ledger import Entry, Ledger, RunKey, Score

from .arms import ARMS, EXPERIMENT, SCALED, SIZES, Job
from .judging import judge, merged
from .readings import ALONG, KINDS, LEARNT
from .rows import prepare
from .training import train

if TYPE_CHECKING:
    from torch import nn


def perform(job: Job, rows: Mapping[str, Any], folder: Path) -> list[Entry]:
    """Train and judge; return one entry for each point and split."""
    entries: list[Entry] = []
    run = f"{job.arm}-{job.learning_rate:g}-{job.seed}"

    def add(arm: str, settings: dict[str, float], model: nn.Module, seconds: float) -> None:
        cost = {"train_cpu_seconds": round(seconds, 3), "steps": settings["steps"]}
        for split, scores in judge(merged(model, settings.get("scale", 1.0)), rows).items():
            entries.append(Entry(EXPERIMENT, arm, settings, job.seed, split, scores, cost, run=run))

    for step, model, seconds in train(job, rows, folder):
        add(job.arm, job.settings(step), model, seconds)
        if job.arm == "naive" and step == job.points[-1]:
            for scale in (*job.scales, 1.0):
                add(SCALED, job.settings(step, scale), model, seconds)
    return entries


def jobs(names: Sequence[str], seeds: Sequence[int]) -> list[Job]:
    """Every run of these arms and seeds, whole seeds after each other."""
    return [Job(name, rate, seed) for seed, name in product(seeds, names) for rate in ARMS[name].rates]


def run(todo: Sequence[Job], data: Path, work: Path, sizes: Mapping[str, int] = SIZES) -> Path:
    """Perform what the ledger in the working folder lacks; return the ledger."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="orthogonal_projection: halves")  # the base fits its own stories well
    work.mkdir(parents=True, exist_ok=True)
    rows, folder, ledger = prepare(data, work, sizes), work / "stories260K", Ledger(work / "ledger.jsonl")
    done = ledger.runs(EXPERIMENT)
    if RunKey.of(EXPERIMENT, BASE, {"scale": 0.0}, 0) not in done:
        for split, scores in judge(AutoModelForCausalLM.from_pretrained(folder), rows).items():
            ledger.append(Entry(EXPERIMENT, BASE, {"scale": 0.0}, 0, split, scores))
    left = [job for job in todo if not done.issuperset(job.keys())]
    print(f"{len(todo) - len(left)} of {len(todo)} runs are in {ledger.path}")
    started = time.perf_counter()
    for number, job in enumerate(left, start=1):
        for entry in perform(job, rows, folder):
            ledger.append(entry)
        took = (time.perf_counter() - started) / 60
        name = f"{job.arm}, rate {job.learning_rate:g}, seed {job.seed}"
        print(
            f"{number}/{len(left)} {name}: {took:.1f} min, {took / number * (len(left) - number):.1f} to go", flush=True
        )
    return ledger.path


def publish(source: Path, target: Path) -> None:
    """Copy a ledger; results of single rows stay where an interval needs them: at test points of a front."""
    entries = Ledger(source).entries(EXPERIMENT)
    found, kept = points(entries), {RunKey.of(EXPERIMENT, BASE, {"scale": 0.0}, 0)}
    for arm, seed in {(point.arm, point.seed) for point in found if point.arm != BASE}:
        members = front(found, arm, seed, [LEARNT, ALONG], KINDS)
        kept |= {RunKey.of(EXPERIMENT, member.arm, member.settings, member.seed) for member in members}
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_suffix(".unfinished")
    unfinished.unlink(missing_ok=True)
    slim = Ledger(unfinished)
    for entry in entries:
        whole_rows = entry.split == "test" and entry.key in kept
        scores = {name: rounded(score) if whole_rows else Score(round(score.value, 6), n=score.n)
                  for name, score in entry.scores.items()}  # fmt: skip
        slim.append(replace(entry, scores=scores))
    unfinished.replace(target)


def rounded(score: Score) -> Score:
    """The score with four digits of each row's result, and their mean."""
    items = tuple(round(item, 4) for item in score.items or ())
    return Score(fmean(items), items=items)
