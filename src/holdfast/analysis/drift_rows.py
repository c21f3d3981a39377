"""What the drift report shows, before any setting: a row for every score, and one for each of its categories.

    drift = tuned − base, in the score's unit        beyond noise: its p, corrected for all scores of the arm, < 0.05

Numbers are those of `holdfast.analysis.paired`; only words are made here.

Read next: `holdfast.analysis.drift_axis`, where rows are drawn; `holdfast.analysis.drift_words`, the verdicts.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, TypeAlias

from holdfast.analysis.changes import change
from holdfast.analysis.drift_units import DISTANCE, POINTS, SHARE, Unit, unit_of
from holdfast.analysis.evidence import Change, Unchanged
from holdfast.analysis.gate import Judgement
from holdfast.analysis.paired import LEAST, Drift, adjusted, by_category, drifts
from holdfast.analysis.rates import Interval, wilson
from holdfast.analysis.scores import ScoreKind, find
from holdfast.drift.score import Score

LEVEL = 0.05
Outcome: TypeAlias = Literal["worse", "better", "within noise", "drifted", "identical", "not known"]
Kinds: TypeAlias = Mapping[str, ScoreKind]
JUDGED = ("refusal", "over_refusal", "balanced", "pair_accuracy", "broken", "unsure")
"""Scores that a judge reads from answers; `refusal.its-name` is what a second judge reads from the same ones."""


@dataclass(frozen=True)
class Row:
    """One score of one arm: what it did, how sure that is, and what to call it.

    Args:
        drift: as `holdfast.analysis.paired.drifts` has it.
        change: in the unit: of a perplexity the relative one.
        unit: what it is counted in.
        kind: how values are printed.
        directed: whether it is known which way is harm.
        budgets: the gate's, in the unit, with their words.
        second: whether it is a second instrument's reading of answers that another row is of.
    """

    drift: Drift
    change: Change
    unit: Unit
    kind: ScoreKind
    directed: bool = True
    budgets: tuple[tuple[float, str], ...] = ()
    second: bool = False

    @property
    def value(self) -> float:
        """The drift in the unit."""
        return self.change.value * self.unit.factor

    @property
    def interval(self) -> Interval:
        """The 95 % interval of the drift, in the unit."""
        low, high = self.change.interval()
        return low * self.unit.factor, high * self.unit.factor

    @property
    def sure(self) -> bool:
        """Whether there is a drift and an interval."""
        return all(map(math.isfinite, (self.value, *self.interval)))

    @property
    def outcome(self) -> Outcome:
        """What became of the score, in a word or two."""
        if isinstance(self.change, Unchanged):
            return "identical"
        if not self.sure:
            return "not known"
        if self.drift.adjusted >= LEVEL:
            return "within noise"
        if not self.directed or self.unit == DISTANCE:
            return "drifted"
        return "worse" if self.drift.forgetting > 0 else "better"

    def shown(self, value: float) -> str:
        """A value before or after tuning, as text."""
        return f"{100 * value:.1f} %" if self.unit == POINTS else self.kind.show(value).replace("-", "−")

    @property
    def drift_text(self) -> str:
        """The drift with its unit."""
        return self.unit.show(self.value) if math.isfinite(self.value) else "not defined"

    @property
    def interval_text(self) -> str:
        """The interval in brackets; where no item changed an interval of no width would promise too much."""
        if isinstance(self.change, Unchanged):
            return "no item changed"
        if not self.sure:
            return "no interval"
        return "[{}, {}]".format(*(self.unit.show(end, suffix=False) for end in self.interval))

    @property
    def p_text(self) -> str:
        """The corrected p-value."""
        return "< 0.001" if self.drift.adjusted < 0.001 else f"{self.drift.adjusted:.3f}"


class Rows(NamedTuple):
    """The scores that can be compared, by name, and why the others cannot."""

    rows: dict[str, Row]
    apart: dict[str, str]


def rows_of(
    base: Mapping[str, Score], tuned: Mapping[str, Score], kinds: Kinds | None = None, unit: Unit | None = None
) -> Rows:
    """A row for every score that base and tuned share, with p-values corrected for all of them (Holm).

    Args:
        base: scores before tuning, in the order in which they are shown.
        tuned: scores after.
        kinds: how to read scores that `holdfast.analysis.scores` does not know.
        unit: of all of them, if it does not follow from their names.

    >>> before = {"refusal": Score(1.0, items=(1,) * 8)}
    >>> rows_of(before, before).rows["refusal"].outcome
    'identical'
    """
    found, rows, apart = dict[str, Drift](), dict[str, Row](), dict[str, str]()
    for name in dict.fromkeys((*base, *tuned)):
        if name not in base or name not in tuned:
            apart[name] = f"measured on the {'base' if name in base else 'tuned model'} only"
            continue
        one, other, known = base[name], tuned[name], find(name, kinds)
        if one.categories and other.categories and one.categories != other.categories:
            apart[name] = "the categories of its items differ, so they are not the same items in the same order"
            continue
        reading = known or ScoreKind(name, True, ".3g")
        try:
            (drift,) = drifts({name: one}, {name: other}, {name: reading})
            own = unit or unit_of(name, one, other, known)
            move = change(one, other, relative=True, share=reading.share) if own == SHARE else drift.change
        except ValueError as error:
            apart[name] = str(error)
            continue
        found[name], rows[name] = drift, Row(drift, move, own, reading, known is not None)
    corrected = adjusted([drift.p for drift in found.values()])
    for (name, drift), p in zip(found.items(), corrected, strict=True):
        second = first_of(name, rows) != name
        rows[name] = replace(rows[name], drift=replace(drift, adjusted=p), second=second)
    return Rows(rows, apart)


def first_of(name: str, names: Collection[str]) -> str:
    """The first instrument's score of the same answers; the name itself where there is none.

    A judge of harm has an `unsure` of its own, and no other instrument says the same.

    >>> first_of("refusal.phrases", ["refusal", "refusal.phrases"]), first_of("refusal.phrases", ["refusal.phrases"])
    ('refusal', 'refusal.phrases')
    >>> first_of("unsure.harm", ["unsure", "harmful.harm", "unsure.harm"])
    'unsure.harm'
    """
    family, _, judge = name.partition(".")
    of_harm = family == "unsure" and f"harmful.{judge}" in names
    return family if family in JUDGED and family in names and not of_harm else name


def with_budgets(rows: Mapping[str, Row], judgement: Judgement) -> dict[str, Row]:
    """The rows with the gate's budgets for whole scores, turned into the unit of the row."""
    marked = dict(rows)
    for verdict in judgement.verdicts:
        budget, row = verdict.budget, marked.get(verdict.budget.score)
        if row is None or budget.category is not None:
            continue
        bound, of = budget.bound() * row.unit.factor, abs(row.drift.base)
        if budget.relative and row.unit != SHARE:
            bound *= of
        elif row.unit == SHARE and not budget.relative:
            bound = bound / of if of else math.nan
        if math.isfinite(bound):
            marked[budget.score] = replace(row, budgets=(*row.budgets, (bound, row.unit.show(bound))))
    return marked


class Part(NamedTuple):
    """One category of a score: its row, and the intervals of both rates, if they are rates."""

    row: Row
    before: Interval | None
    after: Interval | None


def parts_of(row: Row, base: Score, tuned: Score) -> tuple[dict[str, Part], dict[str, int]]:
    """A score by category, and the size of categories that are too small to be shown.

    Raises:
        ValueError: if the score's items do not make up its value.
    """
    labels = base.categories or ()
    before, after = by_category(base, labels), by_category(tuned, labels)
    shown = rows_of(before, after, dict.fromkeys(before, row.kind), row.unit).rows
    few = {label: n for label, n in sorted(Counter(labels).items()) if n < LEAST}
    parts = {
        label: Part(replace(shown[label], directed=row.directed), _wilson(before[label]), _wilson(after[label]))
        for label in sorted(shown)
    }
    return parts, few


def _wilson(score: Score) -> Interval | None:
    items = score.items or ()
    return wilson(int(sum(items)), len(items)) if items and set(items) <= {0.0, 1.0} else None
