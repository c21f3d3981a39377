"""How soon an arm has learnt as much: steps of its quickest setting until a level of task loss; read `tables` next."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise

from holdfast.analysis.points import BASE
from holdfast.drift.ledger import Entry

from .readings import LEARNT

Curve = Sequence[tuple[float, float]]  # steps and loss, in the order of steps


def crossing(curve: Curve, level: float) -> float:
    """The steps at which a curve first falls to a level, on straight lines in the logarithm of its loss; or infinity.

    >>> crossing([(0, 4.0), (10, 1.0), (20, 0.25)], 0.5)
    15.0
    >>> crossing([(0, 4.0), (10, 1.0)], 0.5)
    inf
    """
    for (start, high), (end, low) in pairwise(curve):
        if low <= level:
            way = math.log(high / level) / math.log(high / low) if high > level else 0.0
            return start + way * (end - start)
    return math.inf


def steps_to(entries: Sequence[Entry], arm: str, level: float) -> dict[int, float]:
    """By seed, the steps that an arm takes to a level on test, at its quickest setting on validation; unscaled."""
    curves: dict[tuple[int, str], dict[tuple[float, ...], list[tuple[float, float]]]] = defaultdict(dict)
    start = {entry.split: (0.0, entry.scores[LEARNT].value) for entry in entries if entry.arm == BASE}
    for entry in sorted(entries, key=lambda entry: entry.settings.get("steps", 0)):
        if entry.arm == arm and entry.status == "done" and "scale" not in entry.settings:
            tried = entry.settings["learning_rate"], entry.settings.get("strength", 0.0)
            curve = curves[entry.seed, entry.split].setdefault(tried, [start[entry.split]])
            curve.append((entry.settings["steps"], entry.scores[LEARNT].value))
    found = {}
    for seed in sorted({seed for seed, _ in curves}):
        judged = curves[seed, "validation"]
        quickest = min(judged, key=lambda tried: crossing(judged[tried], level))
        found[seed] = crossing(curves[seed, "test"][quickest], level)
    return found
