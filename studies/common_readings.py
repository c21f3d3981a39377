"""What the studies' pages read from a ledger: the base's scores, one reading, and how it is shown in a table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from holdfast.analysis.frontier import Reading
from holdfast.analysis.points import BASE
from holdfast.analysis.scores import ScoreKind
from holdfast.analysis.uncertainty import interval
from holdfast.drift.ledger import Entry, Score


def at_start(entries: Sequence[Entry]) -> Mapping[str, Score]:
    """The base's scores on the test split."""
    return next(entry.scores for entry in entries if entry.arm == BASE and entry.split == "test")


def reading(readings: Sequence[Reading], arm: str, score: str, level: float) -> Reading:
    """One arm's reading of one score at one level."""
    return next(one for one in readings if (one.arm, one.retention, one.level) == (arm, score, level))


def within(title: str) -> str:
    """A title within a sentence."""
    return title[0].lower() + title[1:]


def counted(n: int, what: str) -> str:
    """A number of things, in words."""
    return f"{n} {what}{'s' * (n != 1)}"


def bounds(one: Reading) -> tuple[float, float]:
    """The ends of the 95 % interval of a reading over seeds and items; infinite with one seed."""
    _, low, high = interval(np.stack(list(one.samples.values())))
    return float(low), float(high)


def cell(one: Reading, kind: ScoreKind, wide: float) -> str:
    """A reading with the half-width of its interval; † if the line that it is read on bridges more than `wide`."""
    if not one.values:
        return "–"
    low, high = bounds(one)
    half = f" ± {kind.show((high - low) / 2)}" if math.isfinite(high) else ""
    return kind.show(one.mean) + half + " †" * (one.gap > wide)
