"""How sure the change of a score is: for every kind of evidence an interval, and a test that agrees with it.

    no item changed: [0, 0] · right-or-wrong items: z(d) solved for d · other items: quantiles of draws · none: ± z SE

Right-or-wrong items: the score interval of Tango (1998), which stays honest where hardly anything flips and a bootstrap
does not. All other items: a bootstrap, BCa (Efron, 1987) widened for small samples (Hesterberg, 2015).

Read next: `holdfast.analysis.changes`, which evidence two scores give.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from holdfast.analysis.rates import Interval
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import ndtr, ndtri, stdtr, stdtrit

Array: TypeAlias = NDArray[np.float64]


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
        if 0 < below < 1:
            w = float(ndtri(np.clip(below, 0.5 / count, 1 - 0.5 / count))) - self.bias
            z = w / max(1 + self.acceleration * w, 1e-6) - self.bias
        else:  # no draw came near: how skewed the draws are says nothing of where they never were
            z = float(ndtri(0.5 / count))
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
