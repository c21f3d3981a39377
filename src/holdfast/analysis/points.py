"""Points of a frontier: one setting of one arm at one seed, the scores it is chosen by and the scores reported.

What was tuned on is not what is reported on. Among noisy settings the best-looking one is partly lucky, and an arm with
more settings is luckier; so which settings are on the front is decided on the validation split, and the values reported
are the same settings' test scores, whatever they turn out to be.

Read next: `holdfast.analysis.frontier`.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from holdfast.analysis.scores import ScoreKind, kind
from holdfast.drift.entry import POSTHOC
from holdfast.drift.ledger import JSON, Entry, RunKey, Score

BASE = "base"
"""The arm of the base model: where every arm starts, and what any adapter becomes at scale 0."""


@dataclass(frozen=True)
class Point:
    """One setting of one arm at one seed; `chosen` are its validation scores, `reported` its test scores."""

    arm: str
    seed: int
    settings: Mapping[str, JSON]
    run: str
    chosen: Mapping[str, Score] = field(repr=False)
    reported: Mapping[str, Score] = field(repr=False)

    @property
    def scale(self) -> float:
        """The post-hoc scale of the adapter; 1 where none was set."""
        scale = self.settings.get("scale", 1.0)
        return float(scale) if isinstance(scale, int | float) else 1.0

    def has(self, *scores: str) -> bool:
        """Whether all of these scores were measured on both splits."""
        return all(score in self.chosen and score in self.reported for score in scores)


def points(
    entries: Sequence[Entry], *, chosen_on: str = "validation", reported: str = "test", scaled: bool = True
) -> list[Point]:
    """Pair the validation and the test entry of every setting and seed; the latest of repeated entries counts.

    Args:
        entries: of one experiment; failed ones are passed over.
        chosen_on: the split that decides.
        reported: the split whose values are shown.
        scaled: whether points with a post-hoc scale other than 1 belong to an arm's sweep.

    >>> entries = [Entry("demo", "plain LoRA", {}, 0, split, {"skills": Score(value)})
    ...            for split, value in (("validation", 0.8), ("test", 0.7))]
    >>> points(entries)[0].reported["skills"].value
    0.7
    """
    if len(experiments := {entry.experiment for entry in entries}) > 1:
        raise ValueError(
            f"One experiment at a time, got {sorted(experiments)}: Ledger.entries(experiment=...) selects one."
        )
    pairs: dict[RunKey, dict[str, Entry]] = defaultdict(dict)
    for entry in entries:
        if entry.status == "done" and entry.split in (chosen_on, reported):
            pairs[entry.key][entry.split] = entry
    whole = [(pair[chosen_on], pair[reported]) for pair in pairs.values() if {chosen_on, reported} <= pair.keys()]
    if len(whole) < len(pairs):
        warnings.warn(
            f"{len(pairs) - len(whole)} of {len(pairs)} settings are left out: they have no entry on both "
            f"{chosen_on!r} and {reported!r}.",
            stacklevel=2,
        )
    found = [Point(a.arm, a.seed, a.settings, a.run, chosen=a.scores, reported=b.scores) for a, b in whole]
    return [point for point in found if scaled or point.arm == BASE or point.scale == 1.0]


def pareto(
    candidates: Sequence[Point], scores: Sequence[str], kinds: Mapping[str, ScoreKind] | None = None
) -> list[Point]:
    """The points that no other point beats: as good in every score and better in one, judged on validation.

    Complexity O(candidates^2 * scores).

    >>> entries = [Entry("demo", "plain LoRA", {"scale": scale}, 0, split, {"adaptation": Score(a), "skills": Score(s)})
    ...            for scale, a, s in ((1.0, 0.9, 0.5), (0.5, 0.5, 0.8), (0.3, 0.4, 0.7))
    ...            for split in ("validation", "test")]
    >>> [point.scale for point in pareto(points(entries), ["adaptation", "skills"])]
    [1.0, 0.5]
    """
    signs = [1.0 if kind(score, kinds).higher_is_better else -1.0 for score in scores]
    values = [
        tuple(sign * point.chosen[score].value for sign, score in zip(signs, scores, strict=True))
        for point in candidates
    ]

    def beaten(mine: tuple[float, ...]) -> bool:
        return any(other != mine and all(a >= b for a, b in zip(other, mine, strict=True)) for other in values)

    return [point for point, mine in zip(candidates, values, strict=True) if not beaten(mine)]


def front(
    candidates: Sequence[Point],
    arm: str,
    seed: int,
    scores: Sequence[str],
    kinds: Mapping[str, ScoreKind] | None = None,
) -> list[Point]:
    """One arm's front at one seed, from low to high adaptation (the first score), on the values reported.

    The base model, if measured, is a point of every front, beaten or not: any adapter at scale 0 is exactly the base.
    """
    measured = [point for point in candidates if point.has(*scores)]
    own = [point for point in measured if point.arm == arm and point.seed == seed]
    bases = sorted((point for point in measured if point.arm == BASE), key=lambda point: point.seed != seed)[:1]
    kept = pareto([*bases, *own], scores, kinds)
    kept = [*bases, *(point for point in kept if point not in bases)]
    return sorted(kept, key=lambda point: point.reported[scores[0]].value)


def settings_tried(entries: Sequence[Entry]) -> dict[str, tuple[int, int]]:
    """By arm, how many settings were trained and how many points they make, failed ones included.

    Scales, early checkpoints and repairs (`POSTHOC`) make points of a run that is trained anyway.

    >>> points_of_one_run = ({"scale": 0.5}, {"scale": 1.0}, {"scale": 1.0, "checkpoint": 40})
    >>> settings_tried([Entry("demo", "plain LoRA", s, 0, "test", {"skills": Score(0.5)}) for s in points_of_one_run])
    {'plain LoRA': (1, 3)}
    """
    trained: dict[str, set[str]] = defaultdict(set)
    evaluated: dict[str, set[str]] = defaultdict(set)
    for entry in entries:
        without = {name: value for name, value in entry.settings.items() if name not in POSTHOC}
        trained[entry.arm].add(RunKey.of("", "", without, 0).settings)
        evaluated[entry.arm].add(entry.key.settings)
    return {arm: (len(trained[arm]), len(evaluated[arm])) for arm in trained}
