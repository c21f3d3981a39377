"""Which settings of which arm would one choose? The Pareto set over all arms together, on validation.

A setting counts as the mean over its seeds. It is in the set if no setting of any arm has as much of both scores and
more of one, on validation; the test scores stand beside it. Being in the set is no verdict: it knows no noise, and of
two arms that do not differ the one with more settings has more of it. Read next: `holdfast.analysis.frontier`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from holdfast.analysis.points import BASE, Point, pareto, points
from holdfast.analysis.scores import ScoreKind, kind
from holdfast.drift.ledger import Entry, RunKey, Score

__all__ = ["joint_front", "joint_front_rows"]


def joint_front(
    entries: Sequence[Entry],
    adaptation: str = "adaptation",
    retention: str = "skills",
    *,
    reported: str = "test",
    chosen_on: str = "validation",
    kinds: Mapping[str, ScoreKind] | None = None,
    scaled: bool = True,
) -> list[Point]:
    """The settings that no setting of any arm beats, from low to high adaptation; scores are means over seeds.

    Settings that lack a seed which their arm has elsewhere are left out: a mean of fewer seeds is luckier. The base
    model takes part. A point's `seed` is the number of its seeds.

    Args:
        entries: of one experiment.
        adaptation: the score of what was learned.
        retention: the score of what was kept.
        reported: the split whose values are shown.
        chosen_on: the split on which settings beat each other.
        kinds: directions and titles of scores that are not in `holdfast.analysis.scores`.
        scaled: whether post-hoc scaled points take part.

    >>> entries = [Entry("demo", arm, {}, 0, split, {"adaptation": Score(a), "skills": Score(s)})
    ...            for arm, a, s in (("base", 0.0, 0.9), ("plain LoRA", 0.8, 0.5), ("TMKL", 0.8, 0.6))
    ...            for split in ("validation", "test")]
    >>> [point.arm for point in joint_front(entries)]
    ['base', 'TMKL']
    """
    found = points(entries, chosen_on=chosen_on, reported=reported, scaled=scaled)
    same: dict[tuple[str, str], list[Point]] = defaultdict(list)
    for point in found:
        if point.has(adaptation, retention):
            same[point.arm, RunKey.of("", "", point.settings, 0).settings].append(point)
    most: dict[str, int] = defaultdict(int)
    for (arm, _), members in same.items():
        most[arm] = max(most[arm], len(members))
    means = [_mean(members, (adaptation, retention)) for (arm, _), members in same.items() if len(members) == most[arm]]
    return sorted(pareto(means, [adaptation, retention], kinds), key=lambda point: point.chosen[adaptation].value)


def joint_front_rows(
    chosen: Sequence[Point],
    adaptation: str = "adaptation",
    retention: str = "skills",
    kinds: Mapping[str, ScoreKind] | None = None,
) -> list[dict[str, str]]:
    """One row for each setting of `joint_front`, as text: its scores on the split it was chosen on, and as reported."""
    rows = []
    for point in chosen:
        row = {"arm": point.arm, "settings": ", ".join(f"{name} {value}" for name, value in point.settings.items())}
        for score in (adaptation, retention):
            how = kind(score, kinds)
            row[how.title] = how.show(point.reported[score].value)
            row[f"{how.title} (chosen on)"] = how.show(point.chosen[score].value)
        rows.append(row | {"seeds": "" if point.arm == BASE else str(point.seed)})
    return rows


def _mean(members: Sequence[Point], scores: Sequence[str]) -> Point:
    """The mean of one setting over its seeds."""
    chosen, reported = (
        {score: Score(sum(each[score].value for each in split) / len(members)) for score in scores}
        for split in ([p.chosen for p in members], [p.reported for p in members])
    )
    one = members[0]
    return Point(one.arm, len(members), one.settings, "", chosen, reported)
