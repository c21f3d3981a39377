"""What the drift report says first: verdicts in words on what drifted beyond noise, and on what the gate says of it.

    "k of n scores drifted beyond noise": n with an interval, k of them with corrected p < 0.05

A divergence is always above 0, and what a second judge reads from the same answers is no score more: neither counts.

Read next: `holdfast.analysis.drift_rows`, the numbers; `holdfast.analysis.drift_report`, the page.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from holdfast.analysis.budgets import Budget, shown
from holdfast.analysis.drift_rows import Row, first_of
from holdfast.analysis.drift_units import DISTANCE, POINTS, SHARE
from holdfast.analysis.gate import Judgement
from holdfast.analysis.paired import LEAST

NAMED = 3
"""Scores named in a verdict, of each direction."""
CLEAR = {"worse": "for the worse", "better": "for the better", "drifted": "in a direction not known to be good or bad"}
WORDS = {"worse": "Worse", "better": "Better", "drifted": "Direction not known", "moved": "Moved"}
MOVED = "Its outputs have moved. Whether for better or worse was not measured."
OTHERWISE = "A second instrument says otherwise"
NOTHING = "Nothing could be compared with the base."


class Line(NamedTuple):
    """One score or budget under a verdict: the word before it, its sentence, and the evidence in small print."""

    word: str
    text: str
    small: str = ""


class Headline(NamedTuple):
    """The verdict on one arm: its tone ("bad", "good" or "calm"), one sentence, and what stands under it."""

    tone: str
    sentence: str
    lines: tuple[Line, ...] = ()


def headline(rows: Mapping[str, Row]) -> Headline:
    """What drifted beyond noise, in one sentence, and the largest of it with numbers, rates first."""
    of: dict[str, list[Row]] = {}
    own = [row for row in rows.values() if not row.second]
    for row in sorted(own, key=_rates_first):
        of.setdefault("moved" if row.unit == DISTANCE and row.outcome == "drifted" else row.outcome, []).append(row)
    lines = [Line(word, _told(row)) for outcome, word in WORDS.items() for row in of.get(outcome, ())[:NAMED]]
    lines += _otherwise(rows)
    if unsure := len(of.get("not known", ())):
        lines.append(Line("Not known", f"Of {_count(unsure, 'score')} it cannot be said how sure the drift is."))
    if rows and all(row.outcome == "identical" for row in rows.values()):
        return Headline("calm", f"Identical to the base on every item of {_count(len(own), 'score')}.")
    judged = [row for row in own if row.sure and row.unit != DISTANCE]
    if not judged:
        return Headline("calm", MOVED if "moved" in of else NOTHING, tuple(lines))
    scores, ways = _count(len(judged), "score"), [word for word in CLEAR if word in of]
    if ways:
        clear = sum(len(of[word]) for word in ways)
        told = [f"{len(of[word])} {CLEAR[word]}" for word in ways]
        how = f": {', '.join(told)}" if len(ways) > 1 else f",{' all' * (clear > 1)} {CLEAR[ways[0]]}"
        tone = "bad" if "worse" in of else "good" if "better" in of else "calm"
        return Headline(tone, f"{clear} of {scores} drifted beyond noise{how}.", tuple(lines))
    sentence = f"Not shown to have drifted: none of {scores} moved beyond noise."
    return Headline("calm", sentence, (*lines, *_not_ruled_out(of.get("within noise", ()))))


def _not_ruled_out(within: Sequence[Row]) -> Iterator[Line]:
    """The largest harm to a rate that its interval still holds."""
    harms = [
        (-row.interval[0] if row.kind.higher_is_better else row.interval[1], row)
        for row in within if row.directed and row.unit == POINTS
    ]  # fmt: skip
    if harms:
        most, row = max(harms, key=lambda harm: harm[0])
        way = "fall" if row.kind.higher_is_better else "rise"
        what = f"a {way} of “{row.kind.title}” by {POINTS.show(most, signed=False)} is not ruled out."
        yield Line("Not the same as no drift", f"by these items {what}")


def _otherwise(rows: Mapping[str, Row]) -> list[Line]:
    """Where only one of two instruments reads a drift from the same answers: a reason to read them."""
    lines = []
    for row in sorted((row for row in rows.values() if row.second), key=_rates_first):
        first = rows[first_of(row.drift.score, rows)]
        if row.outcome != first.outcome and {row.outcome, first.outcome} & CLEAR.keys():
            told = _told(row) if row.outcome in CLEAR else f"“{row.kind.title}” is {row.outcome}."
            lines.append(Line(OTHERWISE, told))
    return lines[:NAMED]


def _rates_first(row: Row) -> tuple[bool, bool, float]:
    """Rates by size, then perplexities, then what is counted otherwise: only drifts in one unit compare."""
    return row.unit != POINTS, row.unit != SHARE, -abs(row.value) if row.sure else 0.0


def _told(row: Row) -> str:
    """One score's drift in words."""
    verb = "rose" if row.value > 0 else "fell"
    values = f"from {row.shown(row.drift.base)} to {row.shown(row.drift.tuned)}"
    return f"“{row.kind.title}” {verb} {values} ({row.drift_text}, 95 % interval {row.interval_text})."


def gate_headline(found: Judgement, rows: Mapping[str, Row]) -> Headline:
    """What the gate says, in one sentence, and why, of every budget that is exceeded or undecided."""
    m, beyond, undecided = len(found.verdicts), found.count("fail"), found.count("undecided")
    budgets = _count(m, "budget")
    if not m:
        sentence = "The gate judged nothing: it has no budget that applies."
    elif beyond:
        sentence = f"The gate failed: {beyond} of {budgets} exceeded{f', {undecided} undecided' * bool(undecided)}."
    elif not found.passed:
        sentence = f"The gate failed, being strict: {undecided} of {budgets} undecided, none shown to be exceeded."
    elif undecided:
        word = "is undecided" if undecided == m else "passed"
        sentence = f"The gate {word}: {undecided} of {budgets} could not be decided, none is shown to be exceeded."
    else:
        sentence = f"The gate passed: the drift is within {'all ' * (m > 1)}{budgets}."
    lines = [
        Line(word, f"{_allowed(verdict.budget, rows)}.", f"{verdict.why}.")
        for outcome, word in (("fail", "Exceeded"), ("undecided", "Undecided"))
        for verdict in found.verdicts if verdict.outcome == outcome
    ]  # fmt: skip
    if found.too_few:
        lines.append(Line("Not judged", f"fewer than {LEAST} items: {', '.join(found.too_few)}."))
    return Headline("bad" if not found.passed else "calm" if undecided or not m else "good", sentence, tuple(lines))


def _allowed(budget: Budget, rows: Mapping[str, Row]) -> str:
    """A budget in words, with the score's title, and in points where it is of a rate."""
    if budget.score not in rows:
        return str(budget)
    row, of = rows[budget.score], f" of “{budget.category}”" if budget.category else ""
    points = row.unit == POINTS and not budget.relative
    limit = f"{100 * budget.limit:g} points" if points else shown(budget.limit, budget.relative)
    return f"“{row.kind.title}”{of} may {budget.side} by at most {limit}"


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'s' * (n != 1)}"
