"""What a run costs: the arms trained in turn, for their CPU seconds only; read `tables` next.

The seconds of the sweep itself are not comparable: how much an arm was slowed depends on what ran beside it.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from holdfast.drift.ledger import Entry, Ledger, RunKey, Score

from studies.common_sweep import quiet

from .arms import ARMS, jobs
from .training import kept_batches, train


def experiment(scenario: str) -> str:
    """What the ledger calls the timings of a scenario."""
    return f"{scenario}, cost"


def measure(scenarios: Sequence[str], names: Sequence[str], path: Path, rounds: int = 1) -> None:
    """Train every arm once a round, in turn; a training that the ledger holds is not repeated."""
    quiet()
    ledger = Ledger(path)
    done = ledger.runs(splits=("train",))
    for number in range(rounds):
        first = {(job.scenario, job.arm): job for job in reversed(jobs(scenarios, [number], names))}
        for (scenario, name), job in reversed(first.items()):
            settings = job.settings(job.points[-1])
            if RunKey.of(experiment(scenario), name, settings, number) in done:
                continue
            kept_batches.cache_clear()
            started = time.process_time()
            if ARMS[name].beside:
                kept_batches(ARMS[name].beside, number)
            before = time.process_time() - started
            with TemporaryDirectory() as empty:  # what the base says of the pool is made anew, as for a first run
                os.environ["HOLDFAST_CACHE"] = empty
                [(_, _, seconds)] = deque(train(replace(job, points=job.points[-1:])), maxlen=1)
            scores = {"cpu_seconds": Score(round(seconds, 3)), "before_cpu_seconds": Score(round(before, 3))}
            ledger.append(Entry(experiment(scenario), name, settings, number, "train", scores))
            print(f"round {number + 1} of {rounds}: {scenario}, {name}: {seconds:.1f} s", flush=True)
