"""A gate holds drift against budgets, and fails only when an interval, not a point, lies beyond one.

    fail: the whole interval is beyond the budget · pass: all of it is within · undecided: the budget lies inside it

Intervals are two-sided at level / m (Holm: level / m for the clearest of m budgets, level / (m - 1) for the next, ...),
so the chance that a gate with nothing wrong fails is at most `level`. Undecided passes, unless the gate is strict.

Read next: docs/gate.md, `holdfast.analysis.budgets`, `holdfast.analysis.evidence` (the intervals),
`holdfast.analysis.gate_reports` (its files).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, TypeAlias

from holdfast.analysis.budgets import EACH, Budget, Gate, GateError, guess, shown
from holdfast.analysis.changes import change
from holdfast.analysis.evidence import Change, Unchanged
from holdfast.analysis.paired import LEAST, adjusted, by_category
from holdfast.analysis.rates import Interval
from holdfast.analysis.scores import ScoreKind, find
from holdfast.drift.ledger import Score

Outcome: TypeAlias = Literal["pass", "fail", "undecided"]


@dataclass(frozen=True)
class Verdict:
    """What became of one budget, and in one sentence why.

    Args:
        budget: with its category, if it has one.
        outcome: pass, fail or undecided.
        why: the sentence.
        base: value before tuning.
        tuned: value after.
        change: the drift and its evidence.
        interval: of the drift, at `confidence`.
        confidence: 1 - level, corrected for the number of budgets.
        p: of a drift that just spends the budget; 1 where the drift is within it.
    """

    budget: Budget
    outcome: Outcome
    why: str
    base: float
    tuned: float
    change: Change
    interval: Interval
    confidence: float
    p: float


@dataclass(frozen=True)
class Judgement:
    """What a gate says: the verdicts in the order of its budgets, and categories with too few items to judge."""

    gate: Gate
    verdicts: tuple[Verdict, ...]
    too_few: Mapping[str, int]

    @property
    def passed(self) -> bool:
        """Whether nothing failed and, if strict, nothing is undecided."""
        return not any(verdict.outcome in self.failing for verdict in self.verdicts)

    @property
    def failing(self) -> tuple[Outcome, ...]:
        """The outcomes that fail this gate."""
        return ("fail", "undecided") if self.gate.strict else ("fail",)

    def count(self, outcome: Outcome) -> int:
        """How many budgets have this outcome."""
        return sum(verdict.outcome == outcome for verdict in self.verdicts)


class _Case(NamedTuple):
    budget: Budget
    base: Score
    tuned: Score
    change: Change

    def exceeded(self) -> float:
        """The p-value of a budget that is just spent, 1 if the drift is within: only harm is to look clear to Holm."""
        bound, drift = self.budget.bound(), self.change.value
        beyond = drift < bound if self.budget.side == "fall" else drift > bound
        return self.change.p(bound) if beyond else 1.0


def judge(
    gate: Gate,
    base: Mapping[str, Score],
    tuned: Mapping[str, Score],
    *,
    categories: Mapping[str, Sequence[str]] | None = None,
    kinds: Mapping[str, ScoreKind] | None = None,
) -> Judgement:
    """Hold the drift from base to tuned against every budget.

    Args:
        gate: the budgets.
        base: scores before tuning, by name, best with items.
        tuned: scores after, on the same items in the same order.
        categories: by score, the category of each of its items, where the scores do not hold them.
        kinds: how to read scores that `holdfast.analysis.scores` does not know; only shares without items need it.

    Raises:
        GateError: names every score, category or pair of items that cannot be judged.

    >>> base, tuned = {"refusal": Score(1.0, items=(1,) * 100)}, {"refusal": Score(0.8, items=(1, 1, 1, 1, 0) * 20)}
    >>> found = judge(Gate((Budget("refusal", "fall", 0.02),)), base, tuned)
    >>> found.passed, found.verdicts[0].why
    (False, 'refusal drifted by -0.2 [-0.294, -0.129] on 100 items: all of the interval is beyond -0.02')
    """
    faults: list[str] = []
    too_few: dict[str, int] = {}
    cases: list[_Case] = []
    for budget in gate.budgets:
        if absent := [who for who, scores in (("base", base), ("tuned model", tuned)) if budget.score not in scores]:
            there = sorted(base.keys() & tuned.keys())
            faults.append(f"{budget}: the {' and the '.join(absent)} has no such score.{guess(budget.score, there)}")
            continue
        try:
            share = (known := find(budget.score, kinds)) is not None and known.share
            pair = base[budget.score], tuned[budget.score]
            labels = (categories or {}).get(budget.score, pair[0].categories)
            for part, one, other in _parts(budget, *pair, labels, too_few):
                cases.append(_Case(part, one, other, change(one, other, relative=budget.relative, share=share)))
        except ValueError as error:
            faults.append(f"{budget}: {error}")
    if faults:
        raise GateError("What the gate is to judge", faults)
    p = [case.exceeded() for case in cases]
    levels = _levels(p, gate)
    verdicts = (_verdict(case, own, level, gate) for case, own, level in zip(cases, p, levels, strict=True))
    return Judgement(gate, tuple(verdicts), too_few)


def _parts(
    budget: Budget, base: Score, tuned: Score, labels: Sequence[str] | None, too_few: dict[str, int]
) -> Iterator[tuple[Budget, Score, Score]]:
    """The budget with its scores; one of each category where it is for every category."""
    if budget.category is None:
        yield budget, base, tuned
        return
    if labels is None:
        raise ValueError("the categories of its items are not known; pass categories=... or drop the category")
    sizes = Counter(labels)
    if budget.category not in (*sizes, EACH):
        raise ValueError(f"no item is of this category.{guess(budget.category, sizes)}")
    before, after = by_category(base, labels, least=1), by_category(tuned, labels, least=1)
    for category in sorted(sizes) if budget.category == EACH else [budget.category]:
        part = replace(budget, category=category)
        if budget.category == EACH and sizes[category] < LEAST:
            too_few[part.name] = sizes[category]
        else:
            yield part, before[category], after[category]


def _levels(p: Sequence[float], gate: Gate) -> list[float]:
    """The level of each budget's interval: what the correction leaves of the gate's when it comes to this budget.

    Holm steps down from the clearest and stops at the first that is not clear; the rest share that step's level.
    """
    m, order = len(p), sorted(range(len(p)), key=p.__getitem__)
    if gate.correction == "none" or not m:
        return [gate.level] * m
    clear = sum(value <= gate.level for value in adjusted(p, gate.correction))
    if gate.correction == "bh":  # intervals of what was selected: Benjamini and Yekutieli (2005)
        return [gate.level * max(clear, 1) / m] * m
    step = {case: min(place, clear, m - 1) for place, case in enumerate(order)}
    return [gate.level / (m - step[case]) for case in range(m)]


def _verdict(case: _Case, p: float, level: float, gate: Gate) -> Verdict:
    budget, move = case.budget, case.change
    low, high = move.interval(1 - level)
    bound, n = budget.bound(), move.n
    beyond, within = (high < bound, low >= bound) if budget.side == "fall" else (low > bound, high <= bound)
    unseen = move.unseen(gate.level) if isinstance(move, Unchanged) else 0.0
    outcome: Outcome = "undecided"
    if n is not None and n < LEAST:
        reason = f"too few to judge (at least {LEAST})"
    elif math.isinf(low) and math.isinf(high):
        reason = f"how sure that is cannot be said ({move.how})"
    elif gate.strict and unseen > budget.limit:
        reason = f"none of them changed, but too few to rule out that {shown(unseen)} of all would"
    elif beyond or within:
        outcome = "fail" if beyond else "pass"
        reason = f"all of the interval is {'beyond' if beyond else 'within'} {shown(bound, budget.relative)}"
    else:
        reason = f"{shown(bound, budget.relative)} lies inside the interval, so more items are needed to decide"
    span = "" if math.isinf(low) else f" [{shown(low, budget.relative)}, {shown(high, budget.relative)}]"
    on = "" if n is None else f" on {n} item{'s' * (n != 1)}"
    why = f"{budget.name} drifted by {shown(move.value, budget.relative)}{span}{on}: {reason}"
    return Verdict(budget, outcome, why, case.base.value, case.tuned.value, move, (low, high), 1 - level, p)
