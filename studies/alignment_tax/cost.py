"""What a run costs: the arms trained in turn, alone on the machine, for their CPU seconds only; read `tables` next.

The seconds of the sweep itself are not comparable: how much an arm was slowed depends on what ran beside it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from holdfast.drift.ledger import Entry, Ledger, RunKey, Score

from studies.common_sweep import quiet

from .arms import ARMS, STAGES, Job
from .training import train

RATE = 1e-3  # the cost hangs on it where an arm refreshes as needed


def experiment(pipeline: str) -> str:
    """What the ledger calls the timings of a pipeline."""
    return f"{pipeline}, cost"


def measure(pipelines: Sequence[str], names: Sequence[str], path: Path, rounds: int = 2) -> None:
    """Train every arm once a round, in turn; a training that the ledger holds is not repeated."""
    quiet()
    ledger = Ledger(path)
    done = ledger.runs()
    for number in range(rounds):
        for pipeline in pipelines:
            steps = sum(steps for _, steps in STAGES[pipeline])
            for name in (name for name in names if pipeline in ARMS[name].pipelines):
                settings = {"learning_rate": RATE, "steps": steps}
                if RunKey.of(experiment(pipeline), name, settings, number) in done:
                    continue
                [(_, _, seconds)] = deque(train(Job(pipeline, name, RATE, number, (steps,))), maxlen=1)
                scores = {"cpu_seconds": Score(round(seconds, 3))}
                ledger.append(Entry(experiment(pipeline), name, settings, number, "train", scores, {"steps": steps}))
                print(f"round {number + 1} of {rounds}: {pipeline}, {name}: {seconds:.1f} s", flush=True)


def seconds_of(entries: Sequence[Entry]) -> dict[str, float]:
    """By arm, the median CPU seconds of its timed trainings."""
    found: dict[str, list[float]] = {}
    for entry in entries:
        found.setdefault(entry.arm, []).append(entry.scores["cpu_seconds"].value)
    return {arm: median(values) for arm, values in found.items()}
