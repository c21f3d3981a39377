"""The sweep of the studies: jobs that the ledger lacks, the processes that perform them, what of it is published."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Protocol, TypeVar

from holdfast.analysis.points import BASE, front, points
from holdfast.analysis.scores import ScoreKind
from holdfast.drift.ledger import Entry, Ledger, RunKey


class Job(Protocol):
    """One training run and what the ledger holds when it is done."""

    @property
    def name(self) -> str:
        """What it is called while it runs."""

    @property
    def expected(self) -> float:
        """CPU seconds that it may take."""

    def keys(self) -> list[RunKey]:
        """What the ledger holds when this run is done."""


J = TypeVar("J", bound=Job)


def sweep(jobs: Sequence[J], perform: Callable[[J], list[Entry]], ledger: Ledger, processes: int) -> None:
    """Perform what the ledger lacks, slow runs first, and tell how long it may take."""
    done = ledger.runs()
    todo = sorted((job for job in jobs if not done.issuperset(job.keys())), key=lambda job: -job.expected)
    total = sum(job.expected for job in todo)
    print(
        f"{len(jobs) - len(todo)} of {len(jobs)} runs are in {ledger.path}; {total / processes / 60:.1f} minutes to go"
    )
    started, spent = time.perf_counter(), 0.0
    for number, (job, entries) in enumerate(performed(todo, perform, processes), start=1):
        for entry in entries:
            ledger.append(entry)
        spent, took = spent + job.expected, time.perf_counter() - started
        left = took / spent * (total - spent) / 60
        print(f"{number}/{len(todo)} {job.name}: {took / 60:.1f} min, {left:.1f} to go", flush=True)


def performed(
    todo: Sequence[J], perform: Callable[[J], list[Entry]], processes: int
) -> Iterator[tuple[J, list[Entry]]]:
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
    warnings.filterwarnings("ignore", message="orthogonal_projection: halves")  # the bases fit their retain rows well
    os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


def on_fronts(
    entries: Sequence[Entry], pairs: Sequence[tuple[str, str]], kinds: Mapping[str, ScoreKind]
) -> set[RunKey]:
    """The results of one experiment that lie on a front of any of these pairs of scores, learnt and kept."""
    found, kept = points(entries), set[RunKey]()
    for arm, seed in {(point.arm, point.seed) for point in found if point.arm != BASE}:
        for pair in pairs:
            members = front(found, arm, seed, pair, kinds)
            kept |= {RunKey.of(entries[0].experiment, m.arm, m.settings, m.seed) for m in members}
    return kept


def publish(source: Path, target: Path, kept: Collection[RunKey], detailed: Collection[str]) -> None:
    """Copy a ledger; results of single items stay where an interval needs them: at test points of a front.

    Args:
        source: the whole ledger.
        target: the one that is published.
        kept: on a front.
        detailed: scores whose items are kept there.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_suffix(".unfinished")
    unfinished.unlink(missing_ok=True)
    copy = Ledger(unfinished)
    for entry in Ledger(source).entries():
        whole = detailed if entry.split == "test" and entry.key in kept else ()
        scores = {name: score if name in whole else score.without_items() for name, score in entry.scores.items()}
        copy.append(replace(entry, scores=scores))
    unfinished.replace(target)
