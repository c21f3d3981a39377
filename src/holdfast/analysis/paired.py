"""Drift of many scores: tables with corrected tests, categories, drift reduction.

Read next: `holdfast.analysis.changes`, how sure one change is, and `holdfast.analysis.gate`, which holds them against
budgets.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from holdfast.analysis.changes import change, link_of
from holdfast.analysis.evidence import Change, Flips
from holdfast.analysis.rates import Interval, mcnemar, wilson
from holdfast.analysis.scores import ScoreKind, kind
from holdfast.drift.ledger import Score
from scipy.special import stdtrit
from scipy.stats import false_discovery_control

Correction: TypeAlias = Literal["holm", "bh", "none"]
CORRECTIONS: tuple[Correction, ...] = ("holm", "bh", "none")
LEAST = 20
"""A category is shown, and a budget judged, from this many items on."""


@dataclass(frozen=True)
class Drift:
    """One row of a drift table: what a score did, and how sure that is.

    Args:
        score: its name.
        base: its value before tuning.
        tuned: its value after.
        change: tuned - base, with what is known about it.
        interval: of the change.
        p: that nothing changed; exact McNemar for right-or-wrong items.
        adjusted: `p`, corrected for the number of scores in the table.
        forgetting: the change turned so that above 0 is harm.
    """

    score: str
    base: float
    tuned: float
    change: Change
    interval: Interval
    p: float
    adjusted: float
    forgetting: float


def drifts(
    base: Mapping[str, Score],
    tuned: Mapping[str, Score],
    kinds: Mapping[str, ScoreKind] | None = None,
    *,
    confidence: float = 0.95,
    correction: Correction = "holm",
) -> list[Drift]:
    """Every score that both have, in the base's order, with p-values corrected for how many there are.

    Raises:
        ValueError: if the direction of a score is not known, or a score was measured on different items.

    >>> row, = drifts({"refusal": Score(1.0, items=(1,) * 8)}, {"refusal": Score(0.25, items=(1, 1) + (0,) * 6)})
    >>> row.forgetting, row.p, [round(bound, 2) for bound in row.interval]
    (0.75, 0.03125, [-0.96, -0.1])
    """
    known = {name: kind(name, kinds) for name in base if name in tuned}
    changes = {name: change(base[name], tuned[name], share=known[name].share) for name in known}
    p = [mcnemar(move.lost, move.gained) if isinstance(move, Flips) else move.p() for move in changes.values()]
    return [
        Drift(
            name,
            base[name].value,
            tuned[name].value,
            move,
            move.interval(confidence),
            own,
            corrected,
            -move.value if known[name].higher_is_better else move.value,
        )
        for (name, move), own, corrected in zip(changes.items(), p, adjusted(p, correction), strict=True)
    ]


def adjusted(p: Sequence[float], correction: Correction = "holm") -> list[float]:
    """p-values corrected for their number: Holm (1979; any false alarm) or Benjamini and Hochberg (1995; their share).

    >>> adjusted([0.01, 0.04, 0.03]), adjusted([0.01, 0.04, 0.03], "bh")
    ([0.03, 0.06, 0.06], [0.03, 0.04, 0.04])
    """
    if correction == "none" or not p:
        return list(p)
    if correction == "bh":
        return [float(value) for value in false_discovery_control(p)]
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(np.sort(p) * np.arange(len(p), 0, -1))
    return [float(value) for value in np.minimum(stepped, 1.0)[np.argsort(order)]]


def by_category(score: Score, labels: Sequence[str], least: int = LEAST) -> dict[str, Score]:
    """The score of every category with at least `least` items; the rest are too few to say anything.

    Raises:
        ValueError: if there are no items, they do not make up the value, or there is not one label for each.

    >>> by_category(Score(0.75, items=(1, 1, 0, 1)), ["fraud", "fraud", "fraud", "hate"], least=2)
    {'fraud': Score(value=0.6666666666666666, n=3, items=(1.0, 1.0, 0.0))}
    """
    how = link_of(score) if score.items else None
    if not score.items or how is None or len(labels) != len(score.items):
        has = f"{len(score.items or ())} items" + (", whose mean is not the value" if score.items and not how else "")
        raise ValueError(f"Categories need one label for each item: there are {len(labels)} labels and {has}.")
    found: dict[str, list[float]] = defaultdict(list)
    for label, item in zip(labels, score.items, strict=True):
        found[label].append(item)
    means = {label: math.fsum(items) / len(items) for label, items in found.items() if len(items) >= least}
    return {
        label: Score(math.exp(mean) if how == "log" else mean, items=tuple(found[label]))
        for label, mean in means.items()
    }


def reduction(base: Score, ours: Score, plain: Score, confidence: float = 0.95) -> tuple[float, Interval]:
    """How much of the plain adapter's drift ours avoids, 1 - drift_ours / drift_plain, with Fieller's interval (1954).

    Where the plain adapter's own drift may be 0 at this confidence, no share of it is known: the interval is infinite,
    and the value NaN where that drift is 0 exactly. For a perplexity, drift is that of its logarithm.

    Raises:
        ValueError: if the three do not have the same items.

    >>> base, plain = Score(1.0, items=(1,) * 40), Score(0.5, items=(0, 1) * 20)
    >>> ours = Score(0.9, items=(0, 1, 1, 1, 1, 1, 1, 1, 1, 1) * 4)
    >>> share, (low, high) = reduction(base, ours, plain)
    >>> f"{share:.2f} [{low:.2f}, {high:.2f}]"
    '0.80 [0.61, 0.99]'
    """
    counts = [len(score.items or ()) for score in (base, ours, plain)]
    if min(counts) != max(counts) or not counts[0]:
        raise ValueError(f"A drift reduction needs the same items three times, got {counts}.")
    rows = np.array(sorted(zip(base.items or (), ours.items or (), plain.items or (), strict=True)))
    moves, n = rows[:, 1:] - rows[:, :1], len(rows)
    a, b = (float(mean) for mean in moves.mean(axis=0))
    value = 1 - a / b if b else math.nan
    if n < 2:
        return value, (-math.inf, math.inf)
    (aa, ab), (_, bb) = np.cov(moves.T) * float(stdtrit(n - 1, 0.5 + confidence / 2)) ** 2 / n
    lead, half, rest = b * b - bb, a * b - ab, a * a - aa
    if lead <= 0:
        return value, (-math.inf, math.inf)
    root = math.sqrt(max(half * half - lead * rest, 0.0))
    return value, (1 - float(half + root) / float(lead), 1 - float(half - root) / float(lead))


def interval_of(score: Score, *, share: bool = False, confidence: float = 0.95) -> Interval | None:
    """The interval of one score over its items: Wilson's for right-or-wrong items, else Student's; None without items.

    Args:
        score: with items whose mean is the value, or the value's logarithm.
        share: whether it is a share of items.
        confidence: two-sided.

    >>> [round(end, 3) for end in interval_of(Score(0.9, items=(1,) * 9 + (0,)), share=True)]
    [0.596, 0.982]
    """
    items, link = score.items or (), link_of(score) if score.items else None
    if link is None or not items:
        return None
    if share and set(items) <= {0.0, 1.0}:
        return wilson(round(sum(items)), len(items), confidence)
    if len(items) < 2:
        return None
    mean, error = math.fsum(items) / len(items), float(np.std(items, ddof=1)) / math.sqrt(len(items))
    half = float(stdtrit(len(items) - 1, 0.5 + confidence / 2)) * error
    return (math.exp(mean - half), math.exp(mean + half)) if link == "log" else (mean - half, mean + half)
