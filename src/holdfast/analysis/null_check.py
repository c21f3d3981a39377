"""Does the procedure cry wolf? Two copies of one arm, made from its own seeds, compared as any two arms are.

Two copies do not differ, so at least 95 % of their comparisons must say "within noise". A reading at equal learning
depends on its own seed alone, so copies are made from the readings of `at_matched_learning`, each seed by weights c:

    reading of a copy's seed = Σ_s c_s · reading of seed s,    Σ_s c_s = 1      (one c for all scores and levels)

- "halves" (from six seeds on): the seeds are dealt at random into two halves and paired at random; c picks one seed.
  Nothing is assumed, and what is checked is a comparison of half as many seeds.
- "drawn" (from three seeds on): c_s = 1/S + g_s - mean(g), g_s ~ N(0, 1/(S - 1)). Each copy has as many new seeds as
  the arm has real ones, with their mean and covariance: the procedure as it is used, if seeds scatter normally.

Every time, the items are resampled too, as they are for the intervals, the same ones for both copies.

What this checks: whether the interval is wide enough for these seeds, scores and levels. What it does not: seeds with
long tails, of which three or five tell nothing; real arms share the data order of a seed and copies do not; other base
models, tasks or test items; settings chosen after a look at the test split. Read next: docs/frontier.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import numpy as np
from holdfast.analysis.frontier import compare
from holdfast.analysis.rates import wilson
from holdfast.analysis.readings import SMALLEST, Reading
from holdfast.analysis.scores import ScoreKind, kind
from holdfast.analysis.uncertainty import Array

__all__ = ["NoCopies", "NullCheck", "Way", "null_check"]

Way: TypeAlias = Literal["halves", "drawn"]
LEAST: Mapping[Way, int] = {"halves": 4, "drawn": 3}
HALVES_FROM = 6
"""Four seeds can be dealt and paired in six ways only; six seeds in sixty, and each half still has three."""


class NoCopies(ValueError):
    """Why no copies of an arm can be made."""


@dataclass(frozen=True)
class NullCheck:
    """How often two copies of one arm tie.

    Args:
        arm: which.
        way: how copies were made.
        seeds: of the arm.
        compared: seeds in each copy.
        readings: scores and levels that were compared each time.
        resamplings: how many times.
        share: of comparisons that were "within noise".
        low: lower end of its 95 % interval; one resampling counts as one trial however many readings it has.
        high: its upper end.
        confidence: of the intervals that were checked: the share there ought to be at least.
    """

    arm: str
    way: Way
    seeds: int
    compared: int
    readings: int
    resamplings: int
    share: float
    low: float
    high: float
    confidence: float

    @property
    def holds(self) -> bool:
        """Whether the share may be as large as it ought to be, given how many resamplings there were."""
        return self.high >= self.confidence

    def sentence(self) -> str:
        """In plain words, with the interval and how it was found."""
        how = {
            "halves": f"its {self.seeds} seeds dealt into two halves of {self.compared}",
            "drawn": f"{self.compared} seeds each, drawn anew with the mean and covariance of its {self.seeds}",
        }
        share, low, high = (f"{100 * value:.0f}" for value in (self.share, self.low, self.high))
        told = (
            f"Two copies of {self.arm} tie in {share} % of {self.resamplings} resamplings (95 % interval {low} to "
            f"{high} %): {how[self.way]}, their items resampled."
        )
        return told if self.holds else f"{told} That is too few: “better” and “worse” are said too easily here."


def null_check(
    readings: Sequence[Reading],
    arm: str,
    *,
    kinds: Mapping[str, ScoreKind] | None = None,
    confidence: float = 0.95,
    resamplings: int = 400,
    way: Way | None = None,
    seed: int = 0,
) -> NullCheck:
    """Compare two copies of one arm many times, and count how often they tie.

    Args:
        readings: of `at_matched_learning`; those of other arms are passed over.
        arm: of which copies are made.
        kinds: directions and titles of scores that are not in `holdfast.analysis.scores`.
        confidence: of the intervals that are checked.
        resamplings: how often two copies are made.
        way: how; "halves" from six seeds on if None, else "drawn".
        seed: of the resampling itself.

    Raises:
        NoCopies: if the arm has too few seeds, or reaches no level with enough of them.

    >>> own = Reading("plain LoRA", "skills", 0.5, {s: np.array([v]) for s, v in enumerate((0.5, 0.6, 0.7))},
    ...               (0, 1, 2), gap=0.1, tried=(1, 4))
    >>> null_check([own], "plain LoRA", resamplings=100).holds
    True
    """
    own, way = _own(readings, arm, way)
    seeds = own[0].seeds
    random, shares, judged = np.random.default_rng(seed), list[float](), 0
    draws = max(len(sample) for reading in own for sample in reading.samples.values()) - 1
    for _ in range(resamplings):
        row = int(random.integers(1, draws + 1)) if draws else 0
        weights = _weights(random, len(seeds), way)
        copies = [_copy(reading, name, weights[name], row, kinds) for reading in own for name in weights]
        verdicts = [found.verdict for found in compare(copies, "one", kinds=kinds, confidence=confidence)]
        ties = [verdict == "within noise" for verdict in verdicts if verdict != "not reached"]
        judged = max(judged, len(ties))
        shares += [sum(ties) / len(ties)] if ties else []
    if not shares:
        raise NoCopies(f"No two copies of {arm!r} reach the same level: add seeds, or lower levels.")
    share, compared = sum(shares) / len(shares), len(weights["one"])
    low, high = wilson(round(share * len(shares)), len(shares))
    return NullCheck(arm, way, len(seeds), compared, judged, len(shares), share, low, high, confidence)


def _own(readings: Sequence[Reading], arm: str, way: Way | None) -> tuple[list[Reading], Way]:
    """The readings of which copies can be made, and how.

    Raises:
        NoCopies: if there are none, or too few seeds.
    """
    own = [reading for reading in readings if reading.arm == arm]
    if not own:
        raise NoCopies(f"No arm {arm!r} to copy; there are {sorted({reading.arm for reading in readings})}.")
    count = len(own[0].seeds)
    way = way or ("halves" if count >= HALVES_FROM else "drawn")
    if way not in LEAST:
        raise NoCopies(f"Copies are made by {' or '.join(LEAST)}, not {way!r}.")
    if count < LEAST[way]:
        raise NoCopies(f"Copies by {way!r} take {LEAST[way]} seeds, {arm!r} has {count}: add seeds.")
    # a new seed takes a share of every seed, and one that misses a level has no value there
    usable = [reading for reading in own if reading.values and (way == "halves" or len(reading.values) == count)]
    if not usable:
        raise NoCopies(f"No level is reached by {'any' if way == 'halves' else 'every'} seed of {arm!r}: lower levels.")
    return usable, way


def _weights(random: np.random.Generator, seeds: int, way: Way) -> dict[str, Array]:
    """How the seeds of each copy are made of the arm's; shape (seeds of a copy, seeds of the arm)."""
    if way == "halves":
        dealt = np.eye(seeds)[random.permutation(seeds)]
        return {"one": dealt[: seeds // 2], "another": dealt[seeds // 2 : 2 * (seeds // 2)]}
    made = {}
    for name in ("one", "another"):
        away = random.standard_normal((seeds, seeds)) / math.sqrt(seeds - 1)
        made[name] = 1 / seeds + away - away.mean(axis=1, keepdims=True)
    return made


def _copy(reading: Reading, name: str, weights: Array, row: int, kinds: Mapping[str, ScoreKind] | None) -> Reading:
    """One reading of a copy: what its seeds would read, with the items of resampling `row` in place of the measured."""
    ratio, samples = kind(reading.retention, kinds).ratio, dict[int, Array]()
    for number, shares in enumerate(weights):
        parts = [(share, reading.samples.get(s)) for share, s in zip(shares, reading.seeds, strict=True) if share]
        known = np.array([values for _, values in parts if values is not None])
        if len(known) < len(parts):
            continue
        mix = np.array([share for share, _ in parts])
        # of what is compared by ratio the logarithms are mixed, so that no loss falls below 0
        mixed = np.exp(mix @ np.log(np.maximum(known, SMALLEST))) if ratio else mix @ known
        samples[number] = np.concatenate([mixed[row : row + 1], mixed[1:]])
    return replace(reading, arm=name, samples=samples, seeds=tuple(range(len(weights))))
