"""What pages quote of the results: the verdicts in the README, and in docs/choose.md which method kept what.

    <!-- results: ... -->  what stands between two such lines is written  <!-- end of results -->

Read `page` first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from holdfast.analysis.frontier import Comparison
from holdfast.analysis.tables import markdown_table

from .columns import Column, column
from .comparisons import DECAY, FULL, MASKED, PLAIN, REPLAY, STUDIES
from .default import MORE, TRUE_DATA
from .sheet import Sheet
from .words import marks, verdict

START, END = "<!-- results: python -m studies.results page -->", "<!-- end of results -->"
NAMES = ("combinations_shift", "combinations_second", "default_safety", "default_word_problems", "default_plays")
WORRIES: Mapping[str, tuple[str, ...]] = {
    "refusals": ("refusals_loss",),
    "harmless look-alikes": ("look_alikes_loss",),
    "skills": ("skills_loss",),
    "a rare skill": ("rare_skill_loss",),
    "the base's own text": ("stories_loss",),
    "other text": ("oz_loss", "wikitext_loss"),
}
"""What may be lost, and the scores that tell it."""
ARMS = (DECAY, "L2-SP", FULL, MASKED, "TMKL, prompts too", "fisher", "projection", REPLAY, *MORE, TRUE_DATA)


def evidence(results: Path) -> str:
    """Two tables, a row for each method and a column for each worry: against plain LoRA, and against self-replay.

    Args:
        results: the folder with the ledgers.
    """
    columns = [each for name in NAMES if (each := column(results, name))]
    ran = ", ".join(f"*{each.title}* ({len(each.seeds)} seeds)" for each in columns)
    absent = [f"*{STUDIES[name].title}*" for name in NAMES if not any(e.entries[0].experiment == name for e in columns)]
    return "\n".join(
        [
            f"Of {ran}{'; not run yet: ' + ', '.join(absent) if absent else ''}.\n",
            "**Against plain LoRA at its best, at equal learning:**\n",
            table(columns, PLAIN, [*ARMS]),
            "\n**Against self-replay:**\n",
            table(columns, REPLAY, [PLAIN, *(name for name in ARMS if name != REPLAY)]),
        ]
    )


def table(columns: Sequence[Column], theirs: str, names: Sequence[str]) -> str:
    """How often each arm is better ✓, worse ✗ or neither = than another; bold: one side leads beyond chance.

    Scores that plain LoRA improves beyond noise are counted by themselves: there is nothing to keep.
    """
    rows = []
    for name in names:
        both = [(one, each.gained(one)) for each in columns for one in each.pairs(name, theirs)]
        kept = [one for one, gained in both if not gained]
        if both:
            own = {worry: [one for one in kept if one.arm.retention in scores] for worry, scores in WORRIES.items()}
            cells = {worry: cell(some) for worry, some in own.items()}
            rows.append(
                {"method": name, **cells, "all": cell(kept), "gains": cell([one for one, gained in both if gained])}
            )
    return markdown_table(rows)


def cell(found: Sequence[Comparison]) -> str:
    """The counts of some comparisons, bold where they lead or trail by more than chance.

    >>> cell([])
    '–'
    """
    return f"**{marks(found)}**" if verdict(found) in ("better", "worse") else marks(found)


def headlines(sheets: Mapping[str, Sheet], folder: str) -> str:
    """The first paragraph of every page's verdict, with a link to the page.

    Args:
        sheets: by the name of the file.
        folder: in which they are, seen from the page that quotes them.
    """
    lines = []
    for name, sheet in sheets.items():
        first = sheet.verdict.split("\n\n")[0].split("\n")[0].replace("**", "")
        lines.append(f"- **[{sheet.title.split(':')[0]}]({folder}/{name}.md).** {first}")
    return "\n".join(lines)


def quote(page: Path, text: str) -> None:
    """Write a text into a page, between the two marks.

    Args:
        page: a Markdown file.
        text: what is to stand there.

    Raises:
        ValueError: the marks are not there, once each and in order.
    """
    before, start, rest = page.read_text(encoding="utf-8").partition(START)
    _, end, after = rest.partition(END)
    if not start or not end or START in after or END in after:
        raise ValueError(f"{page} has not one {START} with one {END} after it: put both lines where results belong.")
    page.write_text(f"{before}{START}\n{text}\n{END}{after}", encoding="utf-8")
