"""What changed between base and tuned, item by item: the change of one score, with an interval and a test.

Both models answer the same items, so what an item's difficulty does to both cancels in the pair:

    drift = tuned - base        (signed; a `ScoreKind` says which sign is forgetting)

How an interval is made was chosen by measured coverage (docs/gate.md). Right-or-wrong items: the score interval of
Tango (1998), which stays honest where hardly anything flips and a bootstrap does not. All other items: a bootstrap over
items, BCa (Efron, 1987) widened for small samples (Hesterberg, 2015). Items are sorted first, so order cannot matter.

Read next: `holdfast.analysis.paired`, tables of changes.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np
from holdfast.drift.ledger import Score
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import ndtr, ndtri, stdtr, stdtrit
from scipy.stats import binom

Array: TypeAlias = NDArray[np.float64]
Interval: TypeAlias = tuple[float, float]


def wilson(hits: int, n: int, confidence: float = 0.95) -> Interval:
    """The interval of a rate, `hits` of `n` items (Wilson, 1927); of no items, [0, 1].

    Raises:
        ValueError: if `hits` is not between 0 and `n`.

    >>> [round(bound, 3) for bound in wilson(9, 10)]
    [0.596, 0.982]
    """
    if not 0 <= hits <= n:
        raise ValueError(f"{hits} hits of {n} items cannot be: pass 0 <= hits <= n.")
    if n == 0:
        return 0.0, 1.0
    z, rate = float(ndtri(0.5 + confidence / 2)), hits / n
    middle = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return (middle - half if hits else 0.0), (middle + half if hits < n else 1.0)


def mcnemar(lost: int, gained: int, *, mid: bool = False) -> float:
    """Two-sided p-value that flips both ways are equally likely (McNemar, 1947), exact: binomial over all flips.

    Args:
        lost: items right for the base and wrong for the tuned model.
        gained: the other way round.
        mid: count half of the probability of what was seen (Fagerland et al., 2013): less cautious, still sound.

    >>> round(mcnemar(1, 7), 4), round(mcnemar(1, 7, mid=True), 4)
    (0.0703, 0.0391)
    """
    fewer, flips = min(lost, gained), lost + gained
    tail = binom.cdf(fewer, flips, 0.5) - (0.5 * binom.pmf(fewer, flips, 0.5) if mid else 0.0)
    return min(1.0, 2 * float(tail))


@dataclass(frozen=True)
class Change(ABC):
    """How one score moved from base to tuned, and how sure that is.

    Args:
        value: tuned - base, or (tuned - base) / base if relative. NaN if that divides by zero.
        n: how many items it rests on, if known.
        how: in words, how its interval is made.
    """

    value: float
    n: int | None
    how: str

    @abstractmethod
    def interval(self, confidence: float = 0.95) -> Interval:
        """The two-sided interval; infinite where nothing can be said."""

    @abstractmethod
    def p(self, against: float = 0.0) -> float:
        """Two-sided p-value of a true change of `against`; below 1 - confidence where the interval excludes it."""


@dataclass(frozen=True)
class Unchanged(Change):
    """No item changed: the interval is [0, 0]. `unseen` says what it cannot rule out."""

    binary: bool = False

    def interval(self, confidence: float = 0.95) -> Interval:
        return 0.0, 0.0

    def p(self, against: float = 0.0) -> float:
        return 1.0 if against == 0.0 else 0.0

    def unseen(self, level: float = 0.05) -> float:
        """The share of such items that may change although none of these did: 1 - level^(1/n), about 3/n.

        0 where items are real numbers: two models that differ do not agree on them to the last digit.

        >>> round(Unchanged(0.0, 100, "", binary=True).unseen(), 4)
        0.0295
        """
        return 1 - level ** (1 / self.n) if self.binary and self.n else 0.0


@dataclass(frozen=True)
class Flips(Change):
    """Right-or-wrong items: z(d) = (gained - lost - n d) / sqrt(n (2 q + d (1 - d))), q the likeliest share lost.

    The numerator is drawn half an item towards 0. Without that a gate cries wolf up to twice as often as it says.
    """

    lost: int = 0
    gained: int = 0

    def interval(self, confidence: float = 0.95) -> Interval:
        z, end = float(ndtri(0.5 + confidence / 2)), 1 - 1e-12
        low = -1.0 if self.value <= -end else float(brentq(lambda d: self._z(d) - z, -end, self.value))
        high = 1.0 if self.value >= end else float(brentq(lambda d: self._z(d) + z, self.value, end))
        return low, high

    def p(self, against: float = 0.0) -> float:
        return 2 * float(ndtr(-abs(self._z(against))))

    def _z(self, change: float) -> float:
        up, down = (self.gained, self.lost) if change >= 0 else (self.lost, self.gained)
        n, d = self.n or 0, abs(change)
        off = up - down - n * d
        off = math.copysign(max(abs(off) - 0.5, 0.0), off)  # half an item nearer: flips come whole
        if off == 0:
            return 0.0
        half = up + down - (2 * n - up + down) * d
        q = (half + math.sqrt(half * half + 8 * n * down * d * (1 - d))) / (4 * n)
        variance = n * (2 * q + d * (1 - d))
        z = off / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, off)
        return z if change >= 0 else -z


@dataclass(frozen=True)
class Resampled(Change):
    """Items of any other kind: `draws` are the changes that other items could have given, in order."""

    draws: Array = field(default_factory=lambda: np.zeros(0), repr=False)
    bias: float = 0.0
    acceleration: float = 0.0

    def interval(self, confidence: float = 0.95) -> Interval:
        tail = 0.5 - confidence / 2
        low, high = (self._share(float(stdtrit(self._df, t)) * self._wider) for t in (tail, 1 - tail))
        last = len(self.draws) - 1
        ends = self.draws[[max(0, math.floor(low * last)), min(last, math.ceil(high * last))]]
        return (-math.inf, math.inf) if np.isnan(ends).any() else (float(ends[0]), float(ends[1]))

    def p(self, against: float = 0.0) -> float:
        count = len(self.draws)
        below = ((self.draws < against).sum() + 0.5 * (self.draws == against).sum()) / count
        w = float(ndtri(np.clip(below, 0.5 / count, 1 - 0.5 / count))) - self.bias
        z = w / max(1 + self.acceleration * w, 1e-6) - self.bias
        return min(1.0, 2 * float(stdtr(self._df, -abs(z) / self._wider)))

    @property
    def _df(self) -> int:
        return max(1, (self.n or 2) - 1)

    @property
    def _wider(self) -> float:
        return math.sqrt((self._df + 1) / self._df)

    def _share(self, z: float) -> float:
        """Which share of the draws lies below the bound whose normal quantile is z (BCa)."""
        w = self.bias + z
        return float(ndtr(self.bias + w / max(1 - self.acceleration * w, 1e-6)))


@dataclass(frozen=True)
class Apart(Change):
    """No shared items: a normal interval from both standard errors, infinite where one is not known."""

    error: float = math.inf

    def interval(self, confidence: float = 0.95) -> Interval:
        if math.isnan(self.value) or math.isinf(self.error):
            return -math.inf, math.inf
        half = float(ndtri(0.5 + confidence / 2)) * self.error
        return self.value - half, self.value + half

    def p(self, against: float = 0.0) -> float:
        if math.isnan(self.value) or math.isinf(self.error):
            return 1.0
        off = abs(self.value - against)
        return 2 * float(ndtr(-off / self.error)) if self.error else float(off == 0)


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
        ValueError: if the two were not measured on the same items.

    >>> before, after = Score(0.9, items=(1,) * 9 + (0,)), Score(0.6, items=(1,) * 6 + (0,) * 4)
    >>> fall = change(before, after)
    >>> round(fall.value, 3), [round(bound, 2) for bound in fall.interval()]
    (-0.3, [-0.65, 0.13])
    """
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
