"""What is read off the fronts of arms at one level of adaptation, and how two arms differ there, in numbers and words.

    difference = mean over seeds of (arm - baseline), each seed's pair at the same level     (of a ratio: of logarithms)

Read next: `holdfast.analysis.frontier`, which makes them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, TypeAlias

from holdfast.analysis.scores import KNOWN, ScoreKind
from holdfast.analysis.uncertainty import Array

__all__ = ["SMALLEST", "Comparison", "Reading", "Verdict"]

Verdict: TypeAlias = Literal["better", "worse", "within noise", "not reached"]
SMALLEST = 1e-6  # of a score that is compared by ratio


@dataclass(frozen=True)
class Reading:
    """What one arm retains at one level of adaptation: a value for every seed whose front reaches the level.

    Args:
        arm: whose front.
        retention: the score that is read.
        level: of adaptation.
        samples: by seed, the value read and then its resamplings over items; shape (1 + draws,).
        seeds: all seeds of the arm.
        gap: the widest distance in adaptation that was bridged by interpolation.
        tried: how many settings were trained, and how many points they make with post-hoc scales.
        learned: how adaptation is read.
    """

    arm: str
    retention: str
    level: float
    samples: Mapping[int, Array] = field(repr=False)
    seeds: tuple[int, ...]
    gap: float
    tried: tuple[int, int]
    learned: ScoreKind = KNOWN["adaptation"]

    @cached_property
    def values(self) -> dict[int, float]:
        """By seed, the retention at the level; seeds that do not reach it are absent."""
        return {seed: float(sample[0]) for seed, sample in self.samples.items()}

    @property
    def mean(self) -> float:
        """Over the seeds that reach the level; NaN if none does."""
        return sum(self.values.values()) / len(self.values) if self.values else math.nan

    @property
    def reached(self) -> str:
        """In words, how many seeds reach the level."""
        return f"{len(self.values)} of {len(self.seeds)}"

    @property
    def place(self) -> str:
        """In words, where it is read."""
        return f"{self.learned.title} {self.learned.show(self.level)}"


@dataclass(frozen=True)
class Comparison:
    """One arm minus the baseline, for one retention score at one level of adaptation, paired by seed.

    Of a score that is compared by ratio, `difference`, `low` and `high` are of its logarithms.
    """

    arm: Reading
    baseline: Reading
    kind: ScoreKind
    seeds: tuple[int, ...]
    difference: float
    low: float
    high: float

    @property
    def verdict(self) -> Verdict:
        """In plain words; "within noise" if the interval covers 0, or the difference shows no digit but 0."""
        if not self.seeds:
            return "not reached"
        if self.low <= 0 <= self.high or self._shown(abs(self.difference)) == self._shown(0.0):
            return "within noise"
        return "better" if (self.difference > 0) == self.kind.higher_is_better else "worse"

    @property
    def means(self) -> tuple[float, float]:
        """Of the arm and of the baseline, over the seeds that are compared; NaN if there are none."""
        if not self.seeds:
            return math.nan, math.nan
        mine, theirs = (sum(reading.values[s] for s in self.seeds) for reading in (self.arm, self.baseline))
        return mine / len(self.seeds), theirs / len(self.seeds)

    @property
    def numbers(self) -> str:
        """The difference and its interval, as text."""
        if not self.seeds:
            return "–"
        mean, low, high = (self._shown(value) for value in (self.difference, self.low, self.high))
        return f"{mean} (one seed)" if len(self.seeds) == 1 else f"{mean} [{low}, {high}]"

    def _shown(self, value: float) -> str:
        return f"×{math.exp(min(value, 99)):.2g}" if self.kind.ratio else self.kind.show(value, signed=True)

    def sentence(self) -> str:
        """The verdict with its numbers."""
        where = f"{self.kind.title} at {self.arm.place}"
        if not self.seeds:
            reached = (
                f"{self.arm.arm} reaches it in {self.arm.reached} seeds, {self.baseline.arm} in {self.baseline.reached}"
            )
            return f"{where}: not reached ({reached})."
        mine, theirs = (self.kind.show(mean) for mean in self.means)
        pair = f"{mine} against {theirs} for {self.baseline.arm}"
        seeds = f"{len(self.seeds)} seed{'s' * (len(self.seeds) > 1)}"
        return f"{where}: {self.arm.arm} is {self.verdict}, {pair}; {self.numbers}, {seeds}."
