"""What a run costs: the arms trained in turn, alone on the machine, for their CPU seconds only; read `tables` next.

The seconds of the sweep itself are not comparable: how much an arm was slowed depends on what ran beside it, and
Fishers are shared between its runs. Here every training estimates its own.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from holdfast.drift.ledger import Entry, Ledger, RunKey, Score

from studies.common_sweep import quiet

from .arms import SCENARIOS, jobs
from .training import train


def experiment(scenario: str) -> str:
    """What the ledger calls the timings of a scenario."""
    return f"{scenario}, cost"


def measure(scenarios: Sequence[str], names: Sequence[str], path: Path, work: Path, rounds: int = 2) -> None:
    """Train every arm once a round, in turn; a training that the ledger holds is not repeated."""
    quiet()
    ledger = Ledger(path)
    done = ledger.runs(splits=("train",))
    for number in range(rounds):
        for job in jobs(scenarios, [number], names, work):
            first = jobs([job.scenario], [number], [job.arm], work)[0]
            settings = job.settings(SCENARIOS[job.scenario].points[-1])
            if job != first or RunKey.of(experiment(job.scenario), job.arm, settings, number) in done:
                continue
            with TemporaryDirectory() as empty:  # a Fisher that is remembered would cost nothing
                os.environ["HOLDFAST_CACHE"] = empty
                [(_, _, seconds)] = deque(train(replace(job, points=job.points[-1:])), maxlen=1)
            scores = {"cpu_seconds": Score(round(seconds, 3))}
            ledger.append(Entry(experiment(job.scenario), job.arm, settings, number, "train", scores))
            print(f"round {number + 1} of {rounds}: {job.scenario}, {job.arm}: {seconds:.1f} s", flush=True)
