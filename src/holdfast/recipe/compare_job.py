"""One run of a comparison: trained as `holdfast train` does it, and measured at every checkpoint, scale, repair, split.

    output/runs/<name>/        the run: its recipe, progress and checkpoints, and what it trained, until it is measured
    output/runs/<name>.log     what it said

Read next: `compare_measure`, how it is measured; `compare`, which makes the jobs and keeps their entries.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..core.errors import HoldfastError, WrongSetup
from ..drift.ledger import JSON, Entry, RunKey, Score
from .compare_measure import measured
from .compare_scores import SPLITS
from .config import Recipe
from .progress import Progress
from .run import result_folder, run

if TYPE_CHECKING:
    from .compare_settings import Comparing

TRAINING = 0.7  # of a run's work, for the bar; the rest is measuring
END = "result"


class Point(NamedTuple):
    """What is measured of a run.

    Attributes:
        checkpoint: number of steps after which; None: the end.
        scale: of its adapter.
        repair: what its intruder dimensions keep of their strength; None: all.
        settings: what the ledger has for it.
    """

    checkpoint: int | None
    scale: float
    repair: float | None
    settings: Mapping[str, JSON]

    @property
    def trained(self) -> str:
        """Name of what was trained."""
        return END if self.checkpoint is None else f"step-{self.checkpoint}"

    @property
    def name(self) -> str:
        """Name of what is measured."""
        return f"{self.trained} x {self.scale:g}" + (f" repaired {self.repair:g}" if self.repair is not None else "")


@dataclass(frozen=True)
class Job:
    """One training run and the points that are measured of it.

    Attributes:
        recipe: the run, with its seed, arm, scales and folder.
        settings: what the ledger calls it.
        comparing: whose job it is.
    """

    recipe: Recipe
    settings: Mapping[str, JSON]
    comparing: Comparing = field(repr=False)

    def points(self) -> Iterator[Point]:
        """Yield what is measured: every checkpoint and the end, at every scale, and at scale 1 with every repair."""
        for checkpoint in (*self.comparing.checkpoints, None):
            early: dict[str, JSON] = {} if checkpoint is None else {"checkpoint": checkpoint}
            for scale in self.recipe.scales:
                yield Point(checkpoint, scale, None, {**self.settings, "scale": scale, **early})
            for repair in self.comparing.repairs:
                yield Point(checkpoint, 1.0, repair, {**self.settings, "scale": 1.0, "repair": repair, **early})

    def keys(self) -> set[tuple[RunKey, str]]:
        """Return what the ledger holds when this job is done."""
        recipe = self.recipe
        made = {RunKey.of(recipe.experiment, recipe.arm, point.settings, recipe.seed) for point in self.points()}
        return {(key, split) for key in made for split in SPLITS}

    def result(self, checkpoint: int | None) -> Path:
        """Return the folder of what is measured."""
        stages = len(self.recipe.stages)
        if checkpoint is None:
            return result_folder(self.recipe, stages - 1)
        return self.recipe.output / f"stage-{stages}" / f"early-{checkpoint}"

    def entry(self, settings: Mapping[str, JSON], split: str, scores: Mapping[str, Score], **more: Any) -> Entry:
        """Return a line of the ledger."""
        recipe = self.recipe
        return Entry(recipe.experiment, recipe.arm, settings, recipe.seed, split, scores, **more)

    def failed(self, error: str) -> list[Entry]:
        """Return the entries of a run that failed: one for each point, without scores."""
        return [
            self.entry(point.settings, split, {}, status="failed", error=" ".join(error.split())[:600] or "no reason")
            for point in self.points()
            for split in SPLITS
        ]


def perform(job: Job, probes: Mapping[str, Collection[str]], keep: bool) -> list[Entry]:
    """Train and measure; in a worker.

    Args:
        job: what to do.
        probes: by split, names of the probes that are run.
        keep: whether what was trained stays on disk.
    """
    try:
        costs = _train(job)
        entries = list(measured(job, probes, costs, 1 - TRAINING))
    except Exception:
        _delete(job, keep)
        raise
    _delete(job, keep)
    return entries


def _train(job: Job) -> Mapping[int | None, Mapping[str, float]]:
    """Train what is not trained yet; return what it had cost at every checkpoint and at the end (None).

    Of checkpoints only the steps are known; seconds are of the whole run.
    """
    recipe = replace(job.recipe, measured={})
    last, share = len(recipe.stages) - 1, TRAINING / len(recipe.stages)
    if recipe.output.is_dir() and _deleted(job, Progress(recipe)):
        shutil.rmtree(recipe.output)

    def prepare(trainer: Any, number: int) -> None:
        from .compare_callback import go_along

        early = {steps: job.result(steps) for steps in job.comparing.checkpoints} if number == last else {}
        go_along(trainer, share, early)

    [entry] = run(recipe, print, prepare).entries
    if entry.status == "failed":
        raise HoldfastError(f"The training diverged: {entry.error}.")
    steps = (Progress(recipe).stage(last) or {}).get("steps", math.nan)
    if missing := [checkpoint for checkpoint in job.comparing.checkpoints if not job.result(checkpoint).is_dir()]:
        raise WrongSetup(
            f"The last stage ended after {steps:g} steps, before checkpoint {missing[0]}. Ask for earlier checkpoints."
        )
    early = {number: {"steps": entry.cost["steps"] - steps + number} for number in job.comparing.checkpoints}
    return {None: entry.cost, **{number: {**entry.cost, **its} for number, its in early.items()}}


def _deleted(job: Job, progress: Progress) -> bool:
    """Say whether something is gone that the run had made, or passed by before it was asked for."""
    stages = range(len(job.recipe.stages))
    finished = [number for number in stages if progress.stage(number) is not None]
    made = [result_folder(job.recipe, number) for number in finished]
    kept = (job.recipe.output / f"stage-{len(stages)}").glob("checkpoint-*")  # TRL's, from which it would go on
    passed = max((int(path.name.rpartition("-")[2]) for path in kept), default=0)
    if len(finished) == len(stages):
        passed = max(job.comparing.checkpoints, default=0)
    made += [job.result(checkpoint) for checkpoint in job.comparing.checkpoints if checkpoint <= passed]
    return not all(folder.is_dir() for folder in made)


def _delete(job: Job, keep: bool) -> None:
    """Remove what was trained and its checkpoints; recipe, progress and log stay."""
    if not keep:
        for folder in [path for path in job.recipe.output.glob("*") if path.is_dir()]:
            shutil.rmtree(folder)
