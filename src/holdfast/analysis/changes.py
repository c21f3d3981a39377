"""What changed between base and tuned, item by item: the change of one score, with an interval and a test.

Both models answer the same items, so what an item's difficulty does to both cancels in the pair:

    drift = tuned - base        (signed; a `ScoreKind` says which sign is forgetting)

How an interval is made was chosen by measured coverage (docs/gate.md). Items are sorted first, so order cannot matter.

Read next: `holdfast.analysis.evidence`, the intervals; `holdfast.analysis.paired`, tables of changes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Literal

import numpy as np
from holdfast.analysis.evidence import Apart, Array, Change, Flips, Resampled, Unchanged
from holdfast.drift.ledger import Score
from scipy.special import ndtri


@lru_cache(maxsize=256)  # page, table, gate and terminal ask for the same ones, and a bootstrap takes its time
def change(
    base: Score, tuned: Score, *, relative: bool = False, share: bool = False, draws: int = 10_000, seed: int = 0
) -> Change:
    """How a score moved from base to tuned, paired item by item where both have items.

    Args:
        base: measured before tuning.
        tuned: measured on the same items, in the same order.
        relative: as a share of the base's value; for a perplexity, exp(mean of tuned - base log-losses) - 1.
        share: whether the score is a share, whose error follows from n where there are no items.
        draws: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        ValueError: if the two were not measured on the same items, or not by the same instrument.

    >>> before, after = Score(0.9, items=(1,) * 9 + (0,)), Score(0.6, items=(1,) * 6 + (0,) * 4)
    >>> fall = change(before, after)
    >>> round(fall.value, 3), [round(bound, 2) for bound in fall.interval()]
    (-0.3, [-0.65, 0.13])
    """
    if base.instrument != tuned.instrument:
        raise ValueError(
            f"The base was measured with {base.instrument or 'an unnamed instrument'} and the tuned model with "
            f"{tuned.instrument or 'an unnamed one'}: that says nothing of drift. Measure both with one."
        )
    if base.items is None or tuned.items is None:
        return _apart(base, tuned, relative, share)
    if len(base.items) != len(tuned.items) or not base.items:
        raise ValueError(
            f"The base was measured on {len(base.items)} items and the tuned model on {len(tuned.items)}: "
            "a pair needs both. Measure both on the same items, at least one."
        )
    link = link_of(base)
    if link is None or link != link_of(tuned):  # as in docs/ledger.md: such items do not make up the value
        return _apart(base, tuned, relative, share)
    order = sorted(zip(base.items, tuned.items, strict=True))
    before, after = np.array(order).T
    n, binary = len(before), set(base.items) | set(tuned.items) <= {0.0, 1.0}
    if (before == after).all():
        return Unchanged(0.0, n, "no item changed", binary=binary)
    if binary and link == "mean" and not relative:
        lost, gained = int((before > after).sum()), int((before < after).sum())
        return Flips((gained - lost) / n, n, f"score interval, {lost} lost and {gained} gained", lost, gained)
    if n < 2:
        return Apart(_moved(link, relative)(before, after).item(), n, "one item has no spread")
    return _resampled(before, after, _moved(link, relative), draws, seed)


def link_of(score: Score) -> Literal["mean", "log"] | None:
    """Whether the items' mean is the value or its logarithm."""
    mean = math.fsum(score.items or ()) / len(score.items or (0,))
    if math.isclose(mean, score.value, rel_tol=1e-4, abs_tol=1e-6):
        return "mean"
    logarithm = math.log(score.value) if score.value > 0 else math.inf
    return "log" if math.isclose(mean, logarithm, rel_tol=1e-4, abs_tol=1e-6) else None


def _moved(link: Literal["mean", "log"], relative: bool) -> Callable[[Array, Array], Array]:
    """The change as a function of the two mean items."""
    if link == "log":
        return (lambda x, y: np.expm1(y - x)) if relative else (lambda x, y: np.exp(y) - np.exp(x))
    if not relative:
        return lambda x, y: y - x
    return lambda x, y: np.divide(y - x, x, out=np.full_like(x, np.nan), where=x != 0)


def _resampled(before: Array, after: Array, moved: Callable[[Array, Array], Array], draws: int, seed: int) -> Change:
    n, random = len(before), np.random.default_rng(seed)
    means = np.empty((draws, 2))
    for start in range(0, draws, step := max(1, 1_000_000 // n)):
        drawn = random.integers(n, size=(min(step, draws - start), n))
        means[start : start + step] = np.stack([before[drawn].mean(axis=1), after[drawn].mean(axis=1)], axis=1)
    values = np.sort(moved(means[:, 0], means[:, 1]))
    value = float(moved(before.mean(keepdims=True), after.mean(keepdims=True)).item())
    if np.isnan(values).any() or math.isnan(value):
        return Apart(value, n, "no interval: the base's value may be 0, and nothing is a share of that")
    without = moved((before.sum() - before) / (n - 1), (after.sum() - after) / (n - 1))  # each item left out once
    pull = without.mean() - without
    cubes, squares = float((pull**3).sum()), float((pull**2).sum())
    below = ((values < value).sum() + 0.5 * (values == value).sum()) / draws
    return Resampled(
        value,
        n,
        "bootstrap over items (BCa)",
        draws=values,
        bias=float(ndtri(np.clip(below, 0.5 / draws, 1 - 0.5 / draws))),
        acceleration=cubes / (6 * squares**1.5) if squares > 1e-30 else 0.0,
    )


def _apart(base: Score, tuned: Score, relative: bool, share: bool) -> Change:
    def error(score: Score) -> float:
        known, link = score.standard_error, link_of(score) if score.items else None
        if link:
            known = score.without_items().standard_error
        if link == "log" and known is not None:
            known *= score.value  # of exp(mean), to first order
        if known is None and share and score.n:
            middle = (score.value * score.n + 2) / (score.n + 4)  # Agresti and Coull (1998)
            known = math.sqrt(max(middle * (1 - middle), 0.0) / (score.n + 4))
        return math.inf if known is None else known

    value, both = tuned.value - base.value, math.hypot(error(base), error(tuned))
    if relative:
        scale = abs(base.value) or math.nan
        ratio = tuned.value / base.value if base.value else math.nan
        value, both = value / scale, math.hypot(ratio * error(base), error(tuned)) / scale
    known = [score.n for score in (base, tuned) if score.n]
    how = "no paired items: both standard errors" if both < math.inf else "neither items nor a standard error"
    return Apart(value, min(known, default=None), how, error=both if both == both else math.inf)
