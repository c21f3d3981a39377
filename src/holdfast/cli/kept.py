"""What was kept at equal learning, as the terminal shows it: the table, the verdicts, and the bar of the runs before.

`holdfast compare` and `holdfast demo` say it alike. Read next: `holdfast.analysis.frontier`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

    from ..analysis.frontier import Comparison, Reading
    from ..analysis.scores import ScoreKind
    from ..drift.ledger import Entry


def tell_verdicts(comparisons: Sequence[Comparison], baseline: str, console: Console) -> None:
    """Print what each arm is better and worse at than the baseline, and how much of that is noise."""
    from rich.text import Text

    from ..analysis.report import summaries

    for summary in summaries(comparisons):
        console.print(Text.assemble((summary.arm, "bold"), " ", summary.sentence))
    console.print(noise(comparisons, baseline), highlight=False, markup=False)


def kept_table(
    entries: Sequence[Entry],
    readings: Sequence[Reading],
    comparisons: Sequence[Comparison],
    baseline: str,
    learn: str,
    keep: Sequence[str],
    *,
    kinds: Mapping[str, ScoreKind] | None = None,
    titles: Sequence[str] = (),
) -> Table:
    """What every arm keeps at each level of learning: test split, mean over seeds, a star beyond noise.

    Args:
        entries: of one experiment.
        readings: of `at_matched_learning`.
        comparisons: of the readings, with the baseline.
        baseline: the arm that the others are compared with.
        learn: the score that is matched.
        keep: the scores that are compared.
        kinds: of scores that `analysis.scores` does not have.
        titles: short ones for the columns of `keep`.
    """
    from rich.table import Table
    from rich.text import Text

    from ..analysis.frontier import BASE, arms
    from ..analysis.report import costs
    from ..analysis.scores import kind

    how = {score: kind(score, kinds) for score in (learn, *keep)}
    seconds = {cost.arm: f"{cost.seconds[0]:.1f}" if cost.seconds else "–" for cost in costs(entries, baseline)}
    base = next(entry for entry in entries if entry.arm == BASE and entry.split == "test")
    table = Table(title=Text(f"Kept at equal learning: test split, mean over seeds; * = beyond noise from {baseline}"))
    table.add_column("arm", no_wrap=True)
    for column in (how[learn].title, *(titles or [how[score].title for score in keep]), "settings (points)", "s/run"):
        table.add_column(column, justify="right")
    values = [how[score].show(base.scores[score].value) if score in base.scores else "–" for score in (learn, *keep)]
    table.add_row("the base, untuned", *values, "", "")
    clear = {(c.arm.arm, c.arm.retention, c.arm.level) for c in comparisons if c.verdict in ("better", "worse")}
    tried = {reading.arm: reading.tried for reading in readings}
    by_place = {(one.arm, one.retention, one.level): one for one in readings}
    for level in dict.fromkeys(reading.level for reading in readings):
        table.add_section()
        for arm in (arm for arm in arms(entries) if arm in tried):
            own = [(score, by_place[arm, score, level]) for score in keep]
            cells = [
                how[score].show(one.mean) + "*" * ((arm, score, level) in clear) + _some_seeds(one)
                if one.values else "not reached"
                for score, one in own
            ]  # fmt: skip
            settings, points = tried[arm]
            table.add_row(Text(arm), how[learn].show(level), *cells, f"{settings} ({points})", seconds[arm])
    for arm in (arm for arm in arms(entries) if arm not in tried):
        table.add_section()
        table.add_row(Text(arm), "no finished run")
    return table


def _some_seeds(reading: Reading) -> str:
    """Say so where not all seeds reach the level: those that do are the lucky ones."""
    return "" if len(reading.values) == len(reading.seeds) else f" ({reading.reached} seeds)"


def noise(comparisons: Sequence[Comparison], baseline: str) -> str:
    """Say how many of the differences are within noise."""
    judged = [one for one in comparisons if one.verdict != "not reached"]
    count = sum(one.verdict == "within noise" for one in judged)
    return f"{count} of {len(judged)} differences from {baseline} are within noise; of 20 true ties one would not be."


def runs_bar(console: Console | None = None, unit: str = "") -> Progress:
    """A bar for many runs: how much is done, and how long the rest will take."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:.0f}/{task.total:.0f}" + unit),
        TimeElapsedColumn(), TextColumn("left:"), TimeRemainingColumn(), console=console,
    )  # fmt: skip
