"""Write docs/speed.md and its figure from benchmarks/results: every goal, what was measured, what each method costs.

`python -m scripts.speed_page` writes, `--check` only compares. No number of the page is typed: goals come from
benchmarks/goals.py, the rest from the CSVs. Read next: `scripts.speed_findings`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path

from holdfast.analysis.tables import markdown_table

from benchmarks.goals import COSTS, LARGE, ONE_PASS, SMALL, TIME, Cost
from scripts.speed_figure import Bar, cost_png
from scripts.speed_findings import MET, MISSED, ROUNDS, Finding, Table, findings, read, share, shown

ROOT = Path(__file__).parents[1]
RESULTS, PAGE, FIGURE = ROOT / "benchmarks" / "results", ROOT / "docs" / "speed.md", "results/speed/cost.png"
TOP = f"""\
# Speed: what each method costs

<!-- written by `python -m scripts.speed_page` from benchmarks/results/*.csv: do not edit -->

Every number is a ratio of two medians of one run in which the variants took turns, so that what else the machine did
fell on all alike; in square brackets the least and the greatest ratio of a round. Time is CPU time of one thread, user
and system; wall time stands beside it. Variants of one objective agreed in value and gradient before they were timed.
[How it is measured](../benchmarks/README.md).

![what a training step costs with each method, plain LoRA = 1]({FIGURE})

"""
COSTING = """
Each against its own plain step, the same model and batch, of the size given; the cost of a method falls with the tokens
of a step where it acts once a step (penalties, projections), and does not where it acts on every token.
"""
TABLE = """
## The table

Goals were set after prototypes and are not moved when they are missed. *Bound* is what no form of the method can pass:
measured in the same run, or counted. Metrics are those of the variant divided by those of what stands behind the "/".
"""
BOTTOM = """
## Run it

    make bench                                   # everything, and this page; it goes on where it was stopped
    make bench BENCH=--quick                     # every script at its smallest, nothing written
    python benchmarks/divergence.py --chunk-rows # which height of a chunk is best here
    python -m scripts.speed_page                 # this page
"""


def page(results: Path) -> str:
    """Return the page that the results speak for."""
    every = findings(results)
    places = list(dict.fromkeys(place for one in every if (place := one.place)))
    parts = [TOP, "## In short\n", *in_short(every), "", "## What a step costs\n", *costs(results), COSTING]
    parts += [TABLE, markdown_table(table_rows(every, places)), "", *notes(every)]
    parts += [*where(places), *heights(read(results / "divergence.csv")), BOTTOM]
    return "\n".join(parts)


def in_short(every: Sequence[Finding]) -> list[str]:
    """Count the goals, and name those that are missed."""
    goals = [one for one in every if one.measure.at_most is not None]
    met, missed = ([one for one in goals if one.verdict == verdict] for verdict in (MET, MISSED))
    rest = len(goals) - len(met) - len(missed)
    lines = [f"Of {len(goals)} goals {len(met)} are met, {len(missed)} missed, {rest} not measured here."]
    if few := sum(bool(one.few_rounds) for one in met + missed):
        lines[0] += f" {few} of these verdicts stand on fewer than {ROUNDS} rounds."
    if missed:
        lines += ["", "Missed:", ""]
    for one in missed:
        sizes = f" ({one.measure.sizes})" if one.measure.sizes else ""
        lines.append(f"- **{one.row.name}**, {one.row.asks}{sizes}: {one.distance}.")
    return lines


def costs(results: Path) -> list[str]:
    """Say what each method costs, in words."""
    lines = []
    for model, some in groupby(COSTS, key=lambda cost: cost.model):
        lines += [f"{model[0].upper()}{model[1:]}:", ""]
        for cost in some:
            row = of_step(results, cost)
            lines.append(f"- **{cost.method}**: {in_words(row) if row else 'not measured'}")
        lines.append("")
    return lines


def of_step(results: Path, cost: Cost) -> Mapping[str, str] | None:
    """Return the row of a results file that says what a method costs."""
    return cost.measure.found(read(results / f"{cost.file}.csv"))


def bars(results: Path) -> list[Bar]:
    """The bars of the figure: each method, with the size of the model that it was measured on."""
    found = ((cost, of_step(results, cost)) for cost in COSTS)
    return [
        (f"{c.method} · {c.model.split(' p')[0]}", c.space, float(row["value"]) if row else None) for c, row in found
    ]


def in_words(row: Mapping[str, str]) -> str:
    """A ratio of steps as a sentence.

    >>> in_words({"value": "1.419", "low": "", "high": ""})
    "a step takes 42 % more time than plain LoRA's (1.42 of it)."
    >>> in_words({"value": "1.002", "low": "0.99", "high": "1.01"})
    "a step takes as long as plain LoRA's (1.00 of it [0.990, 1.01])."
    """
    ratio = float(row["value"])
    less = "as long as" if abs(ratio - 1) < 0.005 else f"{share(ratio)} {'more' if ratio > 1 else 'less'} time than"
    return f"a step takes {less} plain LoRA's ({ratio:.2f} of it{spread(row)})."


def spread(row: Mapping[str, str]) -> str:
    """The least and the greatest of the rounds, where they were kept."""
    return f" [{shown(float(row['low']))}, {shown(float(row['high']))}]" if row["low"] else ""


def table_rows(every: Sequence[Finding], places: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    """All findings; a row's name and question stand at its first number."""
    shown_before: set[str] = set()
    rows = []
    for one in every:
        names = {"row": "", "what": ""} if one.row.name in shown_before else {"row": one.row.name, "what": one.row.asks}
        shown_before.add(one.row.name)
        rows.append(names | table_row(one, places))
    return rows


def table_row(one: Finding, places: Sequence[tuple[str, str]]) -> dict[str, str]:
    """A finding as a row of the page's table."""
    measured = {"measured": "", "wall": "", "rounds": "", "bound": "" if one.bound is None else shown(one.bound)}
    if one.found and one.value is not None:
        rival = "" if one.rival is None else f" ({shown(one.rival)})"
        wall = "" if one.wall is None else shown(one.wall)
        measured |= {"measured": f"{shown(one.value)}{spread(one.found)}{rival}", "wall": wall}
        measured["rounds"] = one.found["rounds"]
    at_most = one.measure.at_most
    verdict = (f"**{MISSED}**: {one.distance}" if one.verdict == MISSED else one.verdict) + one.few_rounds
    return {
        "sizes": one.measure.sizes,
        "metric": one.measure.metric.removesuffix(", ratio"),
        "goal": "" if at_most is None else f"≤ {at_most:g}",
        **measured,
        "verdict": verdict if one.found else f"{verdict}: `{one.row.command}`",
        "where": letter(places.index(one.place)) if one.place else "",
    }


def letter(number: int) -> str:
    """a, b, c, ..."""
    return chr(ord("a") + number)


def notes(every: Sequence[Finding]) -> list[str]:
    """What the rows say besides."""
    rows = {one.row.name: one.row for one in every}
    return [f"- *{name}.* {row.note}" for name, row in rows.items() if row.note]


def where(places: Sequence[tuple[str, str]]) -> list[str]:
    """The machines and commits that the table's last column names."""
    lines = ["", "Where it was measured:", ""]
    return [*lines, *(f"- ({letter(i)}) commit {commit}: {machine}" for i, (commit, machine) in enumerate(places))]


def heights(rows: Table) -> list[str]:
    """What the height of a chunk costs, where it was swept."""
    start = f"{ONE_PASS}, chunks of "
    swept = [row for row in rows if row["variant"].startswith(start) and row["metric"] == TIME]
    lines = ["", "## The height of a chunk", ""]
    if not swept:
        return [*lines, "Not measured: `python benchmarks/divergence.py --chunk-rows`."]
    lines += ["One pass against the three products on whole logits; the least of a line is the height to take.", ""]
    found = []
    for shape in (SMALL, LARGE):
        for dtype in ("float32", "bfloat16"):
            some = {
                row["variant"].removeprefix(start): row
                for row in swept
                if (row["shape"], row["dtype"]) == (shape, dtype)
            }
            if some:
                best = min(some, key=lambda height: float(some[height]["value"]))
                cells = ", ".join(
                    f"{height}: {shown(float(row['value']))}{spread(row)}" for height, row in some.items()
                )
                found.append({"hidden/vocabulary": shape, "dtype": dtype, "rows: ratio": cells, "least at": best})
    return [*lines, markdown_table(found)]


def main() -> None:
    """Write the page and its figure, or say that it is out of date."""
    new = page(RESULTS)
    if "--check" in sys.argv:
        same = PAGE.exists() and new == PAGE.read_text()
        sys.exit(0 if same else "docs/speed.md is not what benchmarks/results say: run `make docs`.")
    cost_png(bars(RESULTS), PAGE.parent / FIGURE)
    PAGE.write_text(new)


if __name__ == "__main__":
    main()
