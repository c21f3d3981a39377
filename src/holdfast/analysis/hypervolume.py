"""How much of the plane an arm's front dominates: one number for a whole sweep, beside the verdict at equal learning.

    area = | ∪ᵢ [a₀, aᵢ] × [r₀, rᵢ] |      (aᵢ, rᵢ): adaptation and retention of the arm's front, (a₀, r₀): the corner

The front is chosen on validation and its area taken on test, by seed, like every front here; the union of rectangles is
computed by `moocore`. a₀ is what the base model scores; r₀, the worst retention that counts for anything, is stated.

What it does not say: it depends on the corner; an arm that reaches far is rewarded for it, also where it keeps little;
and a point can add to it but never take away, so an arm with more settings or scales has more. Whether an arm keeps
more is decided at equal learning (`holdfast.analysis.frontier`). Read next: docs/frontier.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, cast

import numpy as np
from holdfast.analysis.frontier import resampled
from holdfast.analysis.points import BASE, Point, front, points
from holdfast.analysis.scores import ScoreKind, kind
from holdfast.analysis.uncertainty import Array, interval
from holdfast.drift.ledger import Entry

__all__ = ["Area", "AreaComparison", "AreaError", "area_rows", "areas", "compare_areas", "dominated"]

Corner = tuple[float, float]


class AreaError(ValueError):
    """Why no area can be taken, all faults at once."""

    def __init__(self, what: str, faults: Sequence[str]) -> None:
        self.faults = tuple(faults)
        super().__init__(what + "".join(f"\n  - {fault}" for fault in self.faults))


@dataclass(frozen=True)
class Area:
    """What one arm's fronts dominate in adaptation and one retention score.

    Args:
        arm: whose fronts.
        retention: the score.
        corner: adaptation and retention from which the area counts.
        samples: by seed, the area and then its resamplings over items; shape (1 + draws,).
        points: on the fronts of all seeds, the base model apart.
    """

    arm: str
    retention: str
    corner: Corner
    samples: Mapping[int, Array] = field(repr=False)
    points: int

    @property
    def values(self) -> dict[int, float]:
        """By seed, the area."""
        return {seed: float(sample[0]) for seed, sample in self.samples.items()}

    def interval(self, confidence: float = 0.95) -> tuple[float, float, float]:
        """Mean over seeds and its interval, over seeds and items."""
        return interval(np.array([*self.samples.values()]), confidence) if self.samples else (math.nan,) * 3


@dataclass(frozen=True)
class AreaComparison:
    """The area of one arm minus that of the baseline, paired by seed."""

    arm: Area
    baseline: Area
    seeds: tuple[int, ...]
    difference: float
    low: float
    high: float

    @property
    def verdict(self) -> Literal["larger", "smaller", "within noise"]:
        """In plain words; "within noise" if the interval covers 0, always so with one seed."""
        if not self.seeds or self.low <= 0 <= self.high:
            return "within noise"
        return "larger" if self.difference > 0 else "smaller"


def dominated(places: Array, corner: Corner, higher_is_better: tuple[bool, bool] = (True, True)) -> float:
    """The area that points [n, 2] dominate, from a corner; points that do not beat the corner in both add nothing.

    Raises:
        ImportError: if the library moocore is not installed.
    """
    return _moocore()(places, ref=corner, maximise=higher_is_better)


def areas(
    entries: Sequence[Entry],
    adaptation: str = "adaptation",
    retention: Sequence[str] = ("skills",),
    *,
    corner: Mapping[str, float] | None = None,
    reported: str = "test",
    chosen_on: str = "validation",
    kinds: Mapping[str, ScoreKind] | None = None,
    scaled: bool = True,
    draws: int = 200,
) -> list[Area]:
    """The area of every arm's front at every seed; ordered by retention score, then arm.

    Args:
        entries: of one experiment.
        adaptation: the score of what was learned.
        retention: the scores of what was kept, one area for each.
        corner: by score, from where the area counts. Adaptation's is the base model's; a retention score's is the worst
            that any point of any arm has on the split reported (validation may be harder, and all areas then be 0 or
            too large), so that it moves when arms are added: state it for a number that is to be compared with another
            ledger's.
        reported: the split whose values make the area.
        chosen_on: the split on which points are on the front or not.
        kinds: directions and titles of scores that are not in `holdfast.analysis.scores`.
        scaled: whether post-hoc scaled points count as part of an arm's own sweep.
        draws: how often the items are resampled.

    Raises:
        AreaError: lists every score without a corner, and every corner without a score.
        ImportError: if the library moocore is not installed.
    """
    found = points(entries, chosen_on=chosen_on, reported=reported, scaled=scaled)
    corners = _corners(found, adaptation, retention, corner or {}, kinds)
    made = []
    for score in retention:
        better = kind(adaptation, kinds).higher_is_better, kind(score, kinds).higher_is_better
        for arm in dict.fromkeys(point.arm for point in found if point.arm != BASE):
            fronts = {
                seed: front(found, arm, seed, [adaptation, score], kinds)
                for seed in dict.fromkeys(p.seed for p in found if p.arm == arm and p.has(adaptation, score))
            }
            samples = {}
            for seed, members in fronts.items():
                places = np.stack([resampled(members, name, kinds, draws) for name in (adaptation, score)], axis=-1)
                samples[seed] = np.array([dominated(each, corners[score], better) for each in places])
            count = sum(point.arm != BASE for members in fronts.values() for point in members)
            made.append(Area(arm, score, corners[score], samples, count))
    return made


def compare_areas(found: Sequence[Area], baseline: str, *, confidence: float = 0.95) -> list[AreaComparison]:
    """Every arm's area minus the baseline's, paired by seed; in the order of `found`."""
    theirs = {area.retention: area for area in found if area.arm == baseline}
    if not theirs:
        raise ValueError(f"No arm {baseline!r} to compare with; there are {sorted({area.arm for area in found})}.")
    made = []
    for mine in found:
        if mine.arm != baseline:
            other = theirs[mine.retention]
            seeds = tuple(seed for seed in mine.samples if seed in other.samples)
            pairs = [mine.samples[seed] - other.samples[seed] for seed in seeds]
            spread = interval(np.array(pairs), confidence) if seeds else (math.nan,) * 3
            made.append(AreaComparison(mine, other, seeds, *spread))
    return made


def area_rows(
    found: Sequence[Area], baseline: str, kinds: Mapping[str, ScoreKind] | None = None
) -> list[dict[str, str]]:
    """One row for each arm and retention score, as text; the columns are the keys, in order."""
    against = {(one.arm.arm, one.arm.retention): one for one in compare_areas(found, baseline)}
    rows = []
    for area in found:
        one, how = against.get((area.arm, area.retention)), kind(area.retention, kinds)
        rows.append(
            {
                "score": how.title,
                "counted from": f"{area.corner[0]:.3g}, {how.show(area.corner[1])}",
                "arm": area.arm,
                "area": _shown(area.interval(), len(area.samples), ".3g"),
                "difference": _shown((one.difference, one.low, one.high), len(one.seeds), "+.2g") if one else "",
                "verdict": one.verdict if one else "",
                "seeds": str(len(area.samples)),
                "points on fronts": str(area.points),
            }
        )
    return rows


def _shown(spread: tuple[float, float, float], seeds: int, how: str) -> str:
    mean, low, high = (f"{value:{how}}" for value in spread)
    return "–" if not seeds else f"{mean} (one seed)" if seeds == 1 else f"{mean} [{low}, {high}]"


def _corners(
    found: Sequence[Point],
    adaptation: str,
    retention: Sequence[str],
    stated: Mapping[str, float],
    kinds: Mapping[str, ScoreKind] | None,
) -> dict[str, Corner]:
    """Where the area of each retention score is counted from."""
    base = next((p.reported[adaptation].value for p in found if p.arm == BASE and p.has(adaptation)), None)
    start, faults = stated.get(adaptation, base), []
    if start is None:
        faults.append(f"no base model has {adaptation!r} on both splits: state corner={{{adaptation!r}: ...}}")
    worst = dict[str, float]()
    for score in retention:
        pick = min if kind(score, kinds).higher_is_better else max
        values = [point.reported[score].value for point in found if point.has(adaptation, score)]
        if not values:
            faults.append(f"no point has {adaptation!r} and {score!r} on both splits")
        else:
            worst[score] = stated.get(score, pick(values))
    faults += [
        f"corner states {name!r}, which is not compared" for name in stated if name not in (adaptation, *retention)
    ]
    if faults:
        raise AreaError("No area can be taken:", faults)
    return {score: (cast(float, start), worst[score]) for score in retention}


def _moocore() -> Callable[..., float]:
    try:
        from moocore import hypervolume
    except ImportError as error:
        raise ImportError(
            "The area that a front dominates is computed by moocore, which is not installed: pip install moocore "
            "(or 'holdfast[report]'). Comparisons at equal learning do not need it."
        ) from error
    return cast(Callable[..., float], hypervolume)
