"""The sweep: its jobs, the processes that perform them, the ledger, what of it is published; read `readings` next."""

from __future__ import annotations

import math
import multiprocessing
import os
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from holdfast.analysis.points import BASE, front, points
from holdfast.drift.ledger import Entry, Ledger, RunKey

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
    todo = sorted((job for job in jobs if not done.issuperset(job.keys())), key=lambda job: -job.expected)
    for job in {job.pipeline: job for job in todo}.values():
        if RunKey.of(job.pipeline, "base", {"scale": 0.0}, 0) not in done:
            for split, scores in Judge(job.items, job.probe).scores().items():
                ledger.append(Entry(job.pipeline, "base", {"scale": 0.0}, 0, split, scores))
    total = sum(job.expected for job in todo)
    print(f"{len(jobs) - len(todo)} of {len(jobs)} runs are in {path}; {total / processes / 60:.1f} minutes to go")
    started, spent = time.perf_counter(), 0.0
    for number, (job, entries) in enumerate(performed(todo, processes), start=1):
        for entry in entries:
            ledger.append(entry)
        spent, took = spent + job.expected, time.perf_counter() - started
        left = took / spent * (total - spent) / 60
        name = f"{job.pipeline}, {job.arm}, rate {job.learning_rate:g}, seed {job.seed}"
        print(f"{number}/{len(todo)} {name}: {took / 60:.1f} min, {left:.1f} to go", flush=True)


def performed(todo: Sequence[Job], processes: int) -> Iterator[tuple[Job, list[Entry]]]:
    """Yield jobs with their entries as they are done; one process is this one."""
    if processes == 1:
        quiet()
        yield from ((job, perform(job)) for job in todo)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, initializer=start_worker) as pool:
        waiting = {pool.submit(perform, job): job for job in todo}
        for future in as_completed(waiting):
            if error := future.exception():
                print(f"failed, to be run again: {waiting[future]}: {error!r}", flush=True)
            yield waiting[future], [] if error else future.result()


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


def start_worker() -> None:
    """One thread each, and no worker outlives the sweep."""

    def end_with_parent() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    quiet()


def quiet() -> None:
    """One thread, and no word of the hosts' about what is deprecated."""
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FutureWarning)
    warnings.filterwarnings("ignore", message="orthogonal_projection: halves")  # the base fits its retain rows well
    os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


def publish(source: Path, target: Path) -> None:
    """Copy the ledger; results of single prompts stay where an interval needs them: at test points of a front."""
    kept: set[RunKey] = set()
    whole = Ledger(source).entries()
    for pipeline in STAGES:
        found = points([entry for entry in whole if entry.experiment == pipeline])
        for arm, seed in {(point.arm, point.seed) for point in found if point.arm != BASE}:
            for learnt, score in ((axis, score) for axis, scores in SHOWN.items() for score in scores):
                members = front(found, arm, seed, [learnt, score], KINDS)
                kept |= {RunKey.of(pipeline, member.arm, member.settings, member.seed) for member in members}
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_suffix(".unfinished")
    unfinished.unlink(missing_ok=True)
    slim = Ledger(unfinished)
    for entry in whole:
        whole_scores = DETAILED if entry.split == "test" and entry.key in kept else ()
        scores = {name: s if name in whole_scores else s.without_items() for name, s in entry.scores.items()}
        slim.append(replace(entry, scores=scores))
    unfinished.replace(target)
