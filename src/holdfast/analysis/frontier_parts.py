"""The parts of a page that show one experiment at matched learning: what the templates `frontier_*.html.j2` set.

Two pages have them: the report of one experiment, and the page over any ledgers. Everything is computed here and in the
modules it calls; the templates only set it. Read next: `holdfast.analysis.report`.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence

from holdfast.analysis.figure import frontier_figure, frontier_html_div
from holdfast.analysis.frontier import (
    BASE,
    Reading,
    arms,
    at_matched_learning,
    compare,
    matched_levels,
    settings_tried,
)  # fmt: skip
from holdfast.analysis.hypervolume import AreaError, area_rows, areas
from holdfast.analysis.joint_front import joint_front, joint_front_rows
from holdfast.analysis.null_check import NoCopies, NullCheck, null_check
from holdfast.analysis.panels import COLOURS
from holdfast.analysis.report_words import costs, summaries
from holdfast.analysis.scores import ScoreKind, kind
from holdfast.drift.ledger import Entry
from markupsafe import Markup

__all__ = ["CONFIDENCE", "frontier_parts"]

CONFIDENCE = 0.95


def frontier_parts(
    entries: Sequence[Entry],
    *,
    baseline: str,
    retention: Sequence[str],
    adaptation: str = "adaptation",
    levels: Sequence[float] | None = None,
    kinds: Mapping[str, ScoreKind] | None = None,
    scaled: bool = True,
    along: str | None = None,
    interactive: bool = True,
    still: bool = True,
    library: bool = True,
    heading: str = "h2",
) -> dict[str, object]:
    """What the templates `frontier_*.html.j2` show of one experiment, on this page or another; as in `write_report`.

    Args:
        entries: of one experiment, failed ones included.
        baseline: the arm that the others are compared with.
        retention: the scores that are compared.
        adaptation: the score at which they are matched.
        levels: of adaptation; `matched_levels` of the baseline if None.
        kinds: directions and titles of scores that are not in `holdfast.analysis.scores`.
        scaled: whether post-hoc scaled points count as part of an arm's own sweep.
        along: the score whose front decides the settings for all.
        interactive: a figure that answers to the mouse; else a picture.
        still: a picture too, for readers without scripts.
        library: whether the figure brings plotly with it; a page needs it once.
        heading: the tag of the sections' titles.
    """
    levels = matched_levels(entries, baseline, adaptation, kinds=kinds) if levels is None else tuple(levels)
    readings = at_matched_learning(entries, adaptation, retention, levels, kinds=kinds, scaled=scaled, along=along)
    comparisons = compare(readings, baseline, kinds=kinds, confidence=CONFIDENCE)
    picture, live = io.BytesIO(), None
    if still or not interactive:
        frontier_figure(entries, retention, adaptation, levels=levels, kinds=kinds, scaled=scaled).savefig(picture)
    if interactive:
        live = Markup(
            frontier_html_div(
                entries, retention, adaptation, levels=levels, kinds=kinds, scaled=scaled, include_plotlyjs=library
            )
        )
    learned = [one.scores[adaptation].value for one in entries if adaptation in one.scores and one.status == "done"]
    rows, why_no_rows = _areas(entries, baseline, adaptation, retention, kinds, scaled)
    return {
        "baseline": baseline,
        "adaptation": kind(adaptation, kinds),
        "others": [arm for arm in arms(entries) if arm != baseline],
        "levels": levels,
        "retention": [(score, kind(score, kinds)) for score in retention],
        "readings": {(one.arm, one.retention, one.level): one for one in readings},
        "comparisons": {(one.arm.arm, one.arm.retention, one.arm.level): one for one in comparisons},
        "summaries": summaries(comparisons),
        "colours": {arm: COLOURS[number % len(COLOURS)] for number, arm in enumerate(arms(entries))},
        "clear": sum(one.verdict in ("better", "worse") for one in comparisons),
        "judged": sum(one.verdict != "not reached" for one in comparisons),
        "chance": 1 - CONFIDENCE,
        "copies": _copies(readings, baseline, kinds),
        "areas": rows,
        "why_no_areas": why_no_rows,
        "unbeaten": {
            kind(score, kinds).title: joint_front_rows(
                joint_front(entries, adaptation, score, kinds=kinds, scaled=scaled), adaptation, score, kinds
            )
            for score in retention
        },
        "seeds": list(dict.fromkeys(entry.seed for entry in entries if entry.arm != BASE)),
        "wide": (max(learned) - min(learned)) / 3,
        "figure": live,
        "picture": base64.b64encode(picture.getvalue()).decode(),
        "costs": costs(entries, baseline),
        "tried": settings_tried(entries),
        "scaled": scaled,
        "along": kind(along, kinds) if along else None,
        "heading": heading,
    }


def _copies(readings: Sequence[Reading], baseline: str, kinds: Mapping[str, ScoreKind] | None) -> NullCheck | None:
    """How often two copies of the baseline tie; None where its seeds are too few to make copies."""
    try:
        return null_check(readings, baseline, kinds=kinds, confidence=CONFIDENCE)
    except NoCopies:
        return None


def _areas(
    entries: Sequence[Entry],
    baseline: str,
    adaptation: str,
    retention: Sequence[str],
    kinds: Mapping[str, ScoreKind] | None,
    scaled: bool,
) -> tuple[list[dict[str, str]], str]:
    """The rows of the table of areas, or why there is none."""
    try:
        return area_rows(areas(entries, adaptation, retention, kinds=kinds, scaled=scaled), baseline, kinds), ""
    except (AreaError, ImportError) as error:
        return [], str(error)
