"""What benchmarks/results say to every goal of benchmarks/goals.py: the number, the bound, met or missed.

A goal that is missed is called so, with its distance to the bound; what nobody measured is "not measured", and a peer
that was not there "not installed": nothing is filled in. Read next: `scripts.speed_page`.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.goals import ROWS, Measure, Row

Table = Sequence[Mapping[str, str]]
MET, MISSED, OPEN = "met", "missed", "not measured"
ROUNDS = 7  # that the table asks for


@dataclass(frozen=True)
class Finding:
    """One number beside its goal; `found` is its row of the CSV, `value` is None where that is no number."""

    row: Row
    measure: Measure
    found: Mapping[str, str] | None = None
    value: float | None = None
    wall: float | None = None
    bound: float | None = None
    rival: float | None = None

    @property
    def verdict(self) -> str:
        """Whether the goal is met; what is not a number says itself."""
        if self.value is None:
            return self.found["value"] if self.found else OPEN
        if self.measure.at_most is None:
            return "reported"
        return MET if self.value <= self.measure.at_most else MISSED

    @property
    def distance(self) -> str:
        """How far away a missed goal is, and the bound."""
        if self.value is None or self.measure.at_most is None:
            return ""
        goal = self.measure.at_most
        words = f"{shown(self.value)} for {goal:g}, {share(self.value / goal)} too much"
        if self.bound is None:
            return f"{words}; no bound is known"
        words += f"; {share(self.value / self.bound)} {'above' if self.value > self.bound else 'below'} the bound"
        return f"{words} of {shown(self.bound)}" + (", so that no form can meet the goal" if self.bound > goal else "")

    @property
    def few_rounds(self) -> str:
        """What a verdict on fewer rounds than asked for must say; errors and peaks of memory need no rounds."""
        count = self.found["rounds"] if self.found and self.value is not None else ""
        return f", on {count} round{'s' * (count != '1')} alone" if count and int(count) < ROUNDS else ""

    @property
    def place(self) -> tuple[str, str] | None:
        """Commit, and the machine with what ran on it."""
        if not self.found or self.value is None:
            return None
        row = self.found
        return row["commit"], f"{row['machine']}, {row['threads']} thread, {row['versions']}, {row['date']}"


def read(path: Path) -> list[dict[str, str]]:
    """Return the rows of a results file, none if there is no file; columns that came later are empty in old rows."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [{"shape": "", "low": "", "high": ""} | row for row in csv.DictReader(file)]


def findings(results: Path, rows: Sequence[Row] = ROWS) -> list[Finding]:
    """Return what a folder of results says to every goal."""
    return [finding(row, measure, read(results / f"{row.script}.csv")) for row in rows for measure in row.measures]


def finding(row: Row, measure: Measure, table: Table) -> Finding:
    """Look one number up, and what stands beside it."""
    found = measure.found(table)
    value = number(found)
    if found is None or value is None:
        return Finding(row, measure, found)

    def beside(**changes: str) -> float | None:
        return number(replace(measure, **changes).found(table))

    bound = measure.bound
    if isinstance(bound, str):
        bound = over(beside(variant=bound, **seconds(measure)), beside(variant=measure.peer, **seconds(measure)))
    if measure.bound_mib:
        bound = over(measure.bound_mib, beside(variant=measure.peer, **seconds(measure)))
    wall = beside(metric=measure.metric.replace("cpu", "wall")) if "cpu" in measure.metric else None
    rival = beside(variant=measure.rival) if measure.rival else None
    return Finding(row, measure, found, value, wall, bound, rival)


def seconds(measure: Measure) -> dict[str, str]:
    """What makes of a ratio the number that was divided: another metric, no peer."""
    return {"metric": measure.metric.removesuffix(", ratio"), "peer": ""}


def number(row: Mapping[str, str] | None) -> float | None:
    """Return the number of a row, None where there is a word or no row."""
    try:
        return None if row is None else float(row["value"])
    except ValueError:
        return None


def over(mine: float | None, theirs: float | None) -> float | None:
    """Divide what is there."""
    return mine / theirs if mine is not None and theirs else None


def shown(value: float) -> str:
    """A number as the page shows it.

    >>> shown(0.4719), shown(1.0), shown(12.4), shown(1.9e-6)
    ('0.472', '1.00', '12.4', '1.9e-06')
    """
    return f"{value:.2g}" if 0 < abs(value) < 1e-3 else f"{value:#.3g}"


def share(ratio: float) -> str:
    """How far a ratio is from 1.

    >>> share(1.12), share(0.97)
    ('12 %', '3 %')
    """
    return f"{abs(ratio - 1):.0%}".replace("%", " %")
