"""Which method keeps more at equal learning? Frontiers from the ledger, read at matched adaptation.

Whatever learns less forgets less, so a run that forgets little proves nothing by itself. Each arm's sweep over settings
and post-hoc adapter scales gives a front of (adaptation, retention); arms are compared where their fronts have the same
adaptation L, by linear interpolation between the two neighbouring points of an arm's own front,

    r(L) = r_i + (L - a_i) / (a_{i+1} - a_i) * (r_{i+1} - r_i),      a_i <= L <= a_{i+1},

and never outside it: an arm that does not learn as much as L has no value there. Fronts are chosen on validation and
read on test (`holdfast.analysis.points`). Differences are paired by seed, with the interval of
`holdfast.analysis.uncertainty`; they are "within noise" whenever it covers 0.

After Biderman et al. (2024), "LoRA Learns Less and Forgets Less". Read next: docs/frontier.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from holdfast.analysis.points import BASE, Point, front, pareto, points, settings_tried
from holdfast.analysis.readings import SMALLEST, Comparison, Reading, Verdict
from holdfast.analysis.scores import ScoreKind, kind
from holdfast.analysis.uncertainty import Array, interval, resample
from holdfast.drift.ledger import Entry

__all__ = [
    "BASE", "Comparison", "Point", "Reading", "Verdict", "arms", "at_matched_learning", "compare", "front",
    "matched_levels", "pareto", "points", "settings_tried",
]  # fmt: skip


def arms(entries: Sequence[Entry]) -> list[str]:
    """The arms in the order of the ledger, without the base model."""
    return list(dict.fromkeys(entry.arm for entry in entries if entry.arm != BASE))


def matched_levels(
    entries: Sequence[Entry],
    baseline: str,
    adaptation: str = "adaptation",
    *,
    fractions: Sequence[float] = (0.5, 0.75, 0.9),
    chosen_on: str = "validation",
    kinds: Mapping[str, ScoreKind] | None = None,
) -> tuple[float, ...]:
    """Levels of adaptation at these fractions of the way from the base model to the most that the baseline learns.

    The most is the median over seeds on the validation split, so that the test split has no say in where arms are
    compared. Without a base model the way starts at 0.

    >>> from holdfast.drift.ledger import Score
    >>> entries = [Entry("demo", arm, {}, 0, "validation", {"adaptation": Score(value)})
    ...            for arm, value in (("base", 0.0), ("plain LoRA", 0.8))]
    >>> matched_levels(entries, "plain LoRA", fractions=(0.5, 0.75))
    (0.4, 0.6)
    """
    most = max if kind(adaptation, kinds).higher_is_better else min
    start, ends = 0.0, dict[int, float]()
    for entry in entries:
        if entry.status == "done" and entry.split == chosen_on and adaptation in entry.scores:
            value = entry.scores[adaptation].value
            if entry.arm == BASE:
                start = value
            elif entry.arm == baseline:
                ends[entry.seed] = most(ends.get(entry.seed, value), value)
    if not ends:
        raise ValueError(f"No {adaptation!r} of arm {baseline!r} on {chosen_on!r}; there are the arms {arms(entries)}.")
    way = float(np.median(list(ends.values()))) - start
    digits = 2 if way == 0 else max(2, 1 - math.floor(math.log10(abs(way))))
    return tuple(round(start + fraction * way, digits) for fraction in fractions)


def at_matched_learning(
    entries: Sequence[Entry],
    adaptation: str = "adaptation",
    retention: Sequence[str] = ("skills",),
    levels: Sequence[float] = (0.5, 0.7, 0.9),
    *,
    reported: str = "test",
    chosen_on: str = "validation",
    kinds: Mapping[str, ScoreKind] | None = None,
    scaled: bool = True,
    along: str | None = None,
    draws: int = 200,
) -> list[Reading]:
    """What every arm retains at each level of adaptation; ordered by retention score, level, arm.

    Args:
        entries: of one experiment.
        adaptation: the score to match.
        retention: the scores to read.
        levels: of adaptation.
        reported: the split whose values are shown.
        chosen_on: the split on which points are on the front or not.
        kinds: directions and titles of scores that are not in `holdfast.analysis.scores`.
        scaled: whether post-hoc scaled points count as part of an arm's own sweep.
        along: read every score along the front of this one, so that all of them belong to the same settings; by
            default each score has its own front, and no single setting need attain all of them.
        draws: how often the items are resampled.

    >>> from holdfast.drift.ledger import Score
    >>> entries = [Entry("demo", arm, {"scale": scale}, 0, split, {"adaptation": Score(a), "skills": Score(s)})
    ...            for arm, scale, a, s in (("base", 0, 0.0, 1.0), ("plain LoRA", 1, 0.8, 0.6))
    ...            for split in ("validation", "test")]
    >>> [round(reading.mean, 3) for reading in at_matched_learning(entries, levels=[0.4, 0.9])]
    [0.8, nan]
    """
    found, tried = points(entries, chosen_on=chosen_on, reported=reported, scaled=scaled), settings_tried(entries)
    # in the order of seeds, whichever run ended first
    present = sorted({(point.arm, point.seed) for point in found if point.arm != BASE}, key=lambda each: each[1])
    learned, readings = kind(adaptation, kinds), []
    for score in retention:
        curves: dict[tuple[str, int], tuple[Array, Array]] = {}
        for arm, seed in present:
            members = [p for p in front(found, arm, seed, [adaptation, along or score], kinds) if p.has(score)]
            curves[arm, seed] = resampled(members, adaptation, kinds, draws), resampled(members, score, kinds, draws)
        for level in levels:
            for arm in dict.fromkeys(point.arm for point in found if point.arm != BASE):
                own = {seed: read_front(*curve, level) for (whose, seed), curve in curves.items() if whose == arm}
                samples = {seed: values for seed, (values, _) in own.items() if not math.isnan(values[0])}
                gap = max((own[seed][1] for seed in samples), default=math.nan)
                readings.append(Reading(arm, score, level, samples, tuple(own), gap, tried[arm], learned))
    return readings


def resampled(members: Sequence[Point], score: str, kinds: Mapping[str, ScoreKind] | None, draws: int) -> Array:
    """The values of a score along a front, measured and resampled; shape (1 + draws, points)."""
    share = kind(score, kinds).share
    who = [f"{point.arm}|{point.seed}|{sorted(point.settings.items())}" for point in members]
    columns = [resample(p.reported[score], score, name, draws, share) for p, name in zip(members, who, strict=True)]
    return np.stack(columns, axis=1) if columns else np.empty((1 + draws, 0))


def read_front(adaptation: Array, retention: Array, level: float) -> tuple[Array, float]:
    """Retention at the level, for each row; and the distance bridged. NaN in row 0 if the measured front misses it.

    Only resampled rows, which serve the standard error alone, are held at the end of a front that they miss.
    """
    rows = len(adaptation)
    if not adaptation.size:
        return np.full(rows, math.nan), math.nan
    below = np.where(adaptation <= level, adaptation, -np.inf).max(axis=1)
    above = np.where(adaptation >= level, adaptation, np.inf).min(axis=1)
    missed = bool(np.isinf(below[0]) or np.isinf(above[0]))
    below, above = np.where(np.isinf(below), above, below), np.where(np.isinf(above), below, above)

    def at(place: Array) -> Array:  # points of equal adaptation count as their mean
        mean: Array = np.mean(retention, axis=1, where=adaptation == place[:, None])
        return mean

    width = above - below
    weight = np.divide(level - below, width, out=np.zeros(rows), where=width > 0)
    values = at(below) + weight * (at(above) - at(below))
    if missed:
        values[0] = math.nan
    return values, float(width[0])


def compare(
    readings: Sequence[Reading],
    baseline: str,
    *,
    kinds: Mapping[str, ScoreKind] | None = None,
    confidence: float = 0.95,
) -> list[Comparison]:
    """Every arm minus the baseline at matched learning, paired by seed; in the order of the readings.

    Only seeds in which both reach the level count. Every comparison is judged by itself: of 20 true ties one may come
    out otherwise by chance.
    """
    theirs = {(reading.retention, reading.level): reading for reading in readings if reading.arm == baseline}
    if not theirs:
        raise ValueError(f"No arm {baseline!r} to compare with; there are {sorted({r.arm for r in readings})}.")
    found = []
    for mine in readings:
        if mine.arm == baseline:
            continue
        other = theirs[mine.retention, mine.level]
        seeds = tuple(seed for seed in mine.samples if seed in other.samples)
        how = kind(mine.retention, kinds)
        spread = (math.nan,) * 3
        if seeds:
            pairs = np.array([[mine.samples[s], other.samples[s]] for s in seeds])
            pairs = np.log(np.maximum(pairs, SMALLEST)) if how.ratio else pairs
            spread = interval(pairs[:, 0] - pairs[:, 1], confidence)
        found.append(Comparison(mine, other, how, seeds, *spread))
    return found
