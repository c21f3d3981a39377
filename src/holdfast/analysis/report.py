"""The report: one page that says what was kept at equal learning, what is within noise, and how that was found out.

It is a single file that loads nothing from anywhere: figure, tables, costs, versions, and every run behind them. All of
it is computed from ledger entries; the template only sets it.

Read next: `holdfast.analysis.frontier_parts`, what most of the page shows; docs/frontier.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from holdfast.analysis.frontier_parts import frontier_parts
from holdfast.analysis.pages import pages, write_whole
from holdfast.analysis.report_words import Cost, Summary, costs, summaries
from holdfast.analysis.scores import KNOWN, ScoreKind
from holdfast.drift.ledger import Entry

__all__ = ["Cost", "Summary", "costs", "summaries", "write_report"]


def write_report(
    entries: Sequence[Entry],
    path: str | Path,
    *,
    baseline: str = "plain LoRA",
    title: str = "What was kept at equal learning",
    retention: Sequence[str] = ("skills", "refusal", "story_perplexity"),
    adaptation: str = "adaptation",
    levels: Sequence[float] | None = None,
    note: str = "",
    kinds: Mapping[str, ScoreKind] | None = None,
    scaled: bool = True,
    along: str | None = None,
    interactive: bool = True,
) -> Path:
    """Write the page.

    Args:
        entries: of one experiment, failed ones included (`Ledger.entries(experiment, status=None)`).
        path: of the page.
        baseline: the arm that the others are compared with.
        title: of the page.
        retention: the scores that are compared.
        adaptation: the score at which they are matched.
        levels: of adaptation; `matched_levels` of the baseline if None.
        note: a paragraph under the title, for what the reader must know about this experiment.
        kinds: directions and titles of scores that are not in `holdfast.analysis.scores`.
        scaled: whether post-hoc scaled points count as part of an arm's own sweep.
        along: the score whose front decides the settings for all; by default each score has its own.
        interactive: a figure that answers to the mouse, 5 MB; else a picture.
    """
    parts = frontier_parts(
        entries, baseline=baseline, retention=retention, adaptation=adaptation, levels=levels, kinds=kinds,
        scaled=scaled, along=along, interactive=interactive,
    )  # fmt: skip
    page = (
        pages()
        .get_template("report.html.j2")
        .render(
            **parts,
            title=title,
            note=note,
            entries=entries,
            scores=list(dict.fromkeys(score for entry in entries for score in entry.scores)),
            known={**KNOWN, **(kinds or {})},
            environments=list({str(entry.environment): entry.environment for entry in entries}.values()),
        )
    )
    return write_whole(path, page)
