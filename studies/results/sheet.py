"""The form that all result pages have: the verdict first, then what it rests on; read `tmkl`, one of them, next."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from holdfast.analysis.figure import frontier_figure

from studies.common_readings import at_start

from .columns import Column

HOW = """\
Whatever learns less forgets less, so arms are compared where they have learnt equally much ([how](../frontier.md)):
each arm's own settings, adapter scales and early checkpoints make its front, chosen on validation rows and read on
test rows. An arm is thus at its best at every level. Intervals (95 %) are over seeds and test items, paired by seed.
*Better* and *worse* are beyond noise; *within noise* means that these seeds cannot tell, not that the arms are equal.
Over many comparisons a verdict is *better* or *worse* where one side leads by more of them than true ties would give
by chance in 1 of 20 cases, if they were independent, and the other has fewer than that; *mixed* where both have as
many, or the lead is smaller. Scores and levels of one run are not independent: read the counts, and how many different
scores they are of.
"""


@dataclass(frozen=True)
class Sheet:
    """A page, part by part; all but the figure and the controls must say something.

    Attributes:
        title: a heading.
        name: of its file.
        ledgers: what it is made of.
        claim: what the paper says, with its number.
        verdict: in a few lines, what came out.
        setup: what was run.
        result: at matched learning, with intervals.
        controls: what else could explain it.
        limits: what it does not show.
        commands: with which its ledgers were made.
    """

    title: str
    name: str
    ledgers: str
    claim: str
    verdict: str
    setup: str
    result: str
    controls: str
    limits: str
    commands: str

    def text(self) -> str:
        """The page as Markdown."""
        return "\n".join(
            [
                f"# {self.title}\n",
                f"<!-- written by `python -m studies.results page` from {self.ledgers}: do not edit -->\n",
                f"**Claim.** {self.claim}\n",
                f"## Verdict\n\n{self.verdict}\n",
                f"## Set-up\n\n{self.setup}\n\n{HOW}",
                f"## Result at matched learning\n\n{self.result}\n",
                f"## Controls\n\n{self.controls}\n",
                f"## Limits\n\n{self.limits}\n",
                f"## Run it\n\n{self.commands}\n    python -m studies.results page        # writes this page\n",
            ]
        )


def draw(each: Column, names: list[str], scores: list[str], place: Path) -> None:
    """The frontier figure of some arms around the levels; the base, and what lies far below, is out."""
    shown = [entry for entry in each.entries if entry.arm in (*names, "base")]
    figure = frontier_figure(shown, scores, each.learnt, levels=each.levels, kinds=each.kinds)
    base = at_start(each.entries)
    for axes, score in zip(figure.axes, scores, strict=False):
        known = [
            value
            for one in each.readings
            if one.retention == score and one.arm in names
            for value in one.values.values()
        ]
        values = [base[score].value, *known]
        if each.kinds[score].ratio:
            axes.set_yscale("log")
            axes.set_ylim(1.5 * max(values), min(values) / 1.5)
        else:
            room = 0.1 * (max(values) - min(values)) or 0.1
            axes.set_ylim(max(values) + room, min(values) - room)
        width = each.levels[0] - each.levels[-1]
        axes.set_xlim(each.levels[0] + 0.15 * width, max(each.levels[-1] - 0.3 * width, 0))
    place.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(place, dpi=100)
