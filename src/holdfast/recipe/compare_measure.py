"""Measures what a run of a comparison trained: every checkpoint, scale and repair on both splits; and the base.

    a repair    the intruder dimensions of the adapter scaled down; where there are none, it is measured as it is and
                the entry says so (`not_measured`)

Read next: `compare_job`, whose points these are; `holdfast.methods.intruder_dimensions`.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

from ..core.errors import WrongSetup
from ..drift.ledger import JSON, Entry, Score
from ..drift.measuring import measure
from ..drift.models import Models, Side
from ..drift.probe import BASE, Probe
from ..methods.intruder_dimensions import repair_intruders
from .compare_scores import SPLITS
from .measure import at_scale
from .processes import count
from .run import losses
from .sides import load

if TYPE_CHECKING:
    from torch import nn

    from .compare_job import Job

Change: TypeAlias = "Callable[[nn.Module], AbstractContextManager[object]]"


def measured(
    job: Job, probes: Mapping[str, Collection[str]], costs: Mapping[int | None, Mapping[str, float]], share: float
) -> Iterator[Entry]:
    """Yield the entries of all points of a run that is trained; in a worker.

    Args:
        job: the run.
        probes: by split, names of the probes that are run.
        costs: by checkpoint (None: the end), what the run had cost.
        share: of the run's work that this is, for the count.
    """
    points = list(job.points())
    found = load(job.recipe.model, {p.trained: str(job.result(p.checkpoint)) for p in points}, say=print)
    sides = dict(found.models.sides)
    repaired = dict.fromkeys(point.trained for point in points if point.repair is not None)
    as_it_is = {name: why for name in repaired if (why := _why_no_repair(sides[name]))}
    for point in points:
        change: Change = partial(at_scale, scale=point.scale)
        if point.repair is not None and point.trained not in as_it_is:
            change = partial(repair_intruders, factor=point.repair)
        sides[point.name] = changed(found.models.sides[point.trained], change)
    models = Models(sides, found.models.tokenizer, batch_size=found.models.batch_size)
    for split in SPLITS:
        names = probes.get(split, ())
        chosen = [probe for probe in job.comparing.probes(split) if probe.name in names] if names else []
        for point in points:
            started = time.perf_counter()
            scores = _scores(job, models, point.name, split, chosen)
            lost = [name for name, score in scores.items() if score.faults()]
            no_repair = as_it_is.get(point.trained, "") if point.repair is not None else ""
            yield job.entry(
                point.settings, split, scores,
                cost={**costs[point.checkpoint], "evaluate_seconds": time.perf_counter() - started},
                status="failed" if lost else "done",
                error=f"{', '.join(lost)} not finite: diverged" if lost else None,
                models={BASE: dict(found.described[BASE])}, not_measured={"repair": no_repair} if no_repair else {},
            )  # fmt: skip
            count(share / len(points) / len(SPLITS))


def _scores(job: Job, models: Models, side: str, split: str, probes: Sequence[Probe]) -> dict[str, Score]:
    """The losses on a split's data, and what the probes find."""
    with models.on(side) as model:
        scores = dict(losses(job.recipe, model, models.tokenizer, split))
    if probes:
        scores |= measure(models, probes, sides=[side])[side].scores
        models.forget(side)
    return scores


def changed(side: Side, change: Change) -> Side:
    """Return the side as it is inside a context: with its adapter turned down, say."""

    @contextmanager
    def inside() -> Iterator[nn.Module]:
        with side() as model, change(model):
            yield model

    return inside


def _why_no_repair(side: Side) -> str:
    """Say why a repair would change nothing; empty where it does."""
    try:
        with side() as model, warnings.catch_warnings(action="ignore"), repair_intruders(model, 1.0) as counts:
            return "" if any(counts.values()) else f"it has no intruder dimension, in any of {len(counts)} layers"
    except WrongSetup as error:
        return " ".join(str(error).split())


def base_entries(job: Job, wanted: Collection[str]) -> tuple[list[Entry], dict[str, list[str]]]:
    """Measure the model before training with every probe of the suite; in a worker.

    Args:
        job: any, for what it measures.
        wanted: names of scores.

    Returns:
        Its entries, and by split the names of the probes that give a wanted score.
    """
    found, entries, chosen = load(job.recipe.model, {}, say=print), list[Entry](), dict[str, list[str]]()
    models = found.models
    for split in SPLITS:
        with models.on(BASE) as model:
            scores = dict(losses(job.recipe, model, models.tokenizer, split))
        left_out, chosen[split] = dict[str, str](), []
        for probe in job.comparing.probes(split):
            if why := probe.unfit(models):
                left_out[probe.name] = why
                continue
            its = measure(models, [probe], sides=[BASE])[BASE].scores
            scores |= its
            chosen[split] += [probe.name] if {*its} & {*wanted} else []
        models_are: dict[str, JSON] = {BASE: dict(found.described[BASE])}
        entries.append(
            Entry(job.recipe.experiment, BASE, {}, 0, split, scores, models=models_are, not_measured=left_out)
        )
    return entries, chosen
