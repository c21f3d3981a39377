"""The tables of the pages: what each arm keeps at equal learning, and who is better in how many comparisons."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

from holdfast.analysis.points import settings_tried
from holdfast.analysis.tables import markdown_table

from studies.common_readings import at_start, cell, counted, within

from .columns import Column
from .words import marks, seeds_told, verdict, where_read

MARKS = {"better": "✓ ", "worse": "✗ "}
KEY = """\
± is the half-width of the 95 % interval over seeds and items; ✓ and ✗: better or worse than *{theirs}* beyond noise;
† marks a line between two points of a front that bridges more than a third of what was learnt; a dash: no seed gets
there. *Points* are settings with their scales and checkpoints.
"""


def question_table(questions: Sequence[tuple[str, str, str]], columns: Sequence[Column]) -> str:
    """One row for each question: in how many comparisons the first arm is better ✓, worse ✗ or neither =."""
    rows = []
    for question, mine, theirs in questions:
        found = [each.pairs(mine, theirs) for each in columns]
        if any(found):
            cells = {each.title: marks(own) for each, own in zip(columns, found, strict=True)}
            rows.append({"": question, "against": theirs, "verdict": verdict([*chain(*found)]), **cells})
    return markdown_table(rows)


def kept_table(each: Column, theirs: str, level: float | None = None) -> str:
    """One row for each arm: what it keeps at a level (the second), marked where it differs from another arm."""
    level = each.levels[1] if level is None else level
    base, tried = at_start(each.entries), settings_tried(each.entries)
    scores = list(dict.fromkeys(one.retention for one in each.readings))
    titles = {score: within(each.kinds[score].title) for score in scores}
    first = {titles[score]: each.kinds[score].show(base[score].value) for score in scores}
    rows: list[dict[str, str]] = [{"arm": "*base model*", "seeds": "", **first, "settings": "", "points": ""}]
    wide = abs(base[each.learnt].value - each.levels[-1]) / 3
    for arm in each.arms:
        against = {one.arm.retention: one for one in each.pairs(arm, theirs) if one.arm.level == level}
        own = [one for one in each.readings if (one.arm, one.level) == (arm, level)]
        cells = {}
        for one in own:
            mark = MARKS.get(against[one.retention].verdict, "") if one.retention in against else ""
            cells[titles[one.retention]] = mark + cell(one, each.kinds[one.retention], wide)
        trained, points = tried[arm]
        rows.append({"arm": arm, "seeds": own[0].reached, **cells, "settings": str(trained), "points": str(points)})
    return markdown_table(rows)


def numbers_table(each: Column, mine: str, theirs: str) -> str:
    """One row for each score: the difference at every level, with its interval."""
    rows: dict[str, dict[str, str]] = {}
    for one in each.pairs(mine, theirs):
        row = rows.setdefault(one.arm.retention, {"score": one.kind.title})
        row[f"at {one.arm.level:g}"] = MARKS.get(one.verdict, "") + one.numbers
    return markdown_table([*rows.values()])


def best_table(each: Column, mine: Sequence[str], rivals: Sequence[str]) -> str:
    """Each of some arms against the best of their rivals, in every score at every level."""
    rows = []
    for name in mine:
        for one in each.against_best(name, rivals):
            rows.append(
                {
                    "arm": name,
                    "where": where_read(one),
                    "best rival": one.baseline.arm,
                    "difference [95 %]": one.numbers,
                    "verdict": one.verdict,
                    "seeds": str(len(one.seeds)),
                }
            )
    return markdown_table(rows)


def opening(each: Column) -> str:
    """What was run and tried in one experiment."""
    tried = settings_tried([entry for entry in each.entries if entry.arm in each.arms]).values()
    levels = ", ".join(f"{level:g}" for level in each.levels)
    return (
        f"{counted(len(tried), 'arm')}, {counted(sum(n for n, _ in tried), 'setting')} trained, "
        f"{counted(sum(n for _, n in tried), 'point')} with scales and early checkpoints, each with "
        f"{seeds_told(each)} Arms are compared at {levels}."
    )
