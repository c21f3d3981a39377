"""Write docs/results/demo/README.md and its figure from the ledger beside them: no number there is typed by hand.

`make demo-docs` runs the demo afresh, copies its ledger here and calls this; `make docs` only calls this.
"""

from __future__ import annotations

import sys
from pathlib import Path

from holdfast.analysis.figure import frontier_png
from holdfast.analysis.frontier import arms, at_matched_learning, compare, matched_levels, settings_tried
from holdfast.analysis.report import costs, summaries
from holdfast.analysis.scores import kind
from holdfast.analysis.tables import comparison_rows, markdown_table
from holdfast.cli.demo import BASELINE, NOTE, PANELS, SHOWN
from holdfast.drift.ledger import Ledger

FOLDER = Path(__file__).parents[1] / "docs" / "results" / "demo"


def page() -> str:
    """The page as Markdown."""
    entries = Ledger(FOLDER / "ledger.jsonl").entries("demo", status=None)
    entries.sort(key=lambda entry: entry.arm != BASELINE)  # what the others are compared with comes first
    levels = tuple(dict.fromkeys(matched_levels(entries, BASELINE)))
    readings = at_matched_learning(entries, "adaptation", SHOWN, levels)
    comparisons = compare(readings, BASELINE)
    frontier_png(entries, FOLDER / "frontier.png", PANELS, levels=levels)
    base = next(entry for entry in entries if entry.arm == "base" and entry.split == "test")
    seconds = {cost.arm: cost for cost in costs(entries, BASELINE)}
    tried = settings_tried(entries)
    seeds = sorted({entry.seed for entry in entries if entry.arm != "base"})
    rows = []
    for level in levels:
        for arm in arms(entries):
            row = {"adaptation": f"{level:.2f}", "arm": arm}
            for reading in (r for r in readings if r.arm == arm and r.level == level):
                known = kind(reading.retention)
                row[known.title] = (
                    f"{known.show(reading.mean)} ({reading.reached})" if reading.values else "not reached"
                )
            rows.append(row)
    costing = [
        {
            "arm": arm, "settings trained": tried[arm][0], "points with scales": tried[arm][1],
            "seconds a run": f"{(seconds[arm].seconds or (0.0,))[0]:.1f}", "ratio": f"{seconds[arm].ratio:.2f}",
        }
        for arm in arms(entries)
    ]  # fmt: skip
    environment = base.environment
    before = ", ".join(f"{kind(score).title.lower()} {kind(score).show(base.scores[score].value)}" for score in SHOWN)
    return "\n".join(
        [
            "# The demo: what was kept at equal learning",
            "",
            "<!-- Written by scripts/demo_page.py from ledger.jsonl; do not edit. -->",
            f"{NOTE}",
            "",
            f"`holdfast demo --seeds {len(seeds)}`; {', '.join(f'{k} {v}' for k, v in environment.items())}. "
            "`make demo-docs` runs it again and writes this page; `make docs` writes it from the ledger beside it.",
            "",
            "![frontier](frontier.png)",
            "",
            "## In words",
            "",
            *[f"- **{one.arm}** {one.sentence}" for one in summaries(comparisons)],
            "",
            f"{sum(c.verdict == 'within noise' for c in comparisons)} of "
            f"{sum(c.verdict != 'not reached' for c in comparisons)} differences from {BASELINE} are within noise.",
            "",
            "## Kept at equal learning",
            "",
            "Test split; mean over the seeds that reach the level (in brackets: how many do). Settings were chosen on "
            f"the validation split. Before tuning: {before}.",
            "",
            markdown_table(rows),
            "",
            f"## Differences from {BASELINE}, with 95 % intervals",
            "",
            markdown_table(comparison_rows(comparisons)),
            "",
            "## Cost and effort",
            "",
            markdown_table(costing),
            "",
        ]
    )


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    new = page()
    if "--check" in sys.argv:
        sys.exit(
            0 if new == (FOLDER / "README.md").read_text() else "docs/results/demo is out of date: run `make docs`."
        )
    (FOLDER / "README.md").write_text(new)
