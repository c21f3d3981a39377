"""`strength="auto"`: a budget on drift in place of a strength, which is found while training.

    m <- m · (drift / aim)^RATE            dual ascent, in the logarithm of the multiplier m of the constraint
    strength = unit · m · expected / aim   expected = drift · (drift / drift before)

aim is a little less than the budget, unit the method's own default strength. Dual ascent alone learns too slowly for a
run of some hundred steps and overshoots; the second line answers at once, to where the drift is going: a proportional
and a derivative term beside the integral one, as in PID Lagrangian methods (Stooke et al., arXiv 2007.03964). All
ratios are bounded, so that one measurement neither lets go of a model nor pins it down. Far below the budget strength
is next to nothing, so neither the start of a run nor one that stays within budget is held back.
Read next: `held_out`, which measures; `budget_settings`; docs/budget.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import fields
from itertools import chain
from typing import TypedDict, cast

from torch import Tensor, nn

from .budget_settings import KL, parted
from .errors import WrongSetup
from .held_out import HeldOut, Measure, drift_by
from .method import Method

AIM = 0.8  # share of the budget that is aimed at: drift fluctuates, and the budget is an upper bound
RATE = 0.4
LEAD = 2.0  # bound of drift / drift before, and of its inverse
SLOWEST, FARTHEST = math.exp(-1), 4.0  # bounds of drift / aim as both lines see it, the first only of the multiplier
LEAST, MOST = 0.1, 1e6  # of the multiplier


class Found(TypedDict):
    """What a checkpoint holds of one budget: plain numbers, which JSON keeps to the last bit."""

    multiplier: float
    drift: float
    strength: float


class Record(TypedDict):
    """What a checkpoint holds of all budgets: of which step they have been set for, and on which sequences."""

    begun: int
    held_out: str | None
    found: dict[str, Found]


def unit_of(method: Method) -> float:
    """Return the strength that a method of this class has where nothing is said; 1 where that is 0.

    >>> from holdfast.methods import UpdateDecay
    >>> unit_of(UpdateDecay(strength="auto", budget=0.02))
    0.001
    """
    default = next(field.default for field in fields(method) if field.name == "strength")
    return float(default) if isinstance(default, int | float) and default > 0 else 1.0


class Budget:
    """The budget of one method, and a copy of the method which has the strength that was found.

    Args:
        method: with `strength="auto"`; it stays as it is.

    Attributes:
        method: the copy that acts; its strength is 0 until something has drifted.
        measure: the name of what is measured; empty: KL on held-out sequences.
        limit: the budget, in nats a token or the unit of its measure.
        drift: as it was measured last.

    >>> from holdfast.methods import FullKL
    >>> budget = Budget(FullKL(strength="auto", budget=0.1))
    >>> for drift in (0.0, 0.001, 0.08, 0.08):
    ...     budget.follow(drift)
    ...     print(round(budget.method.strength, 4))
    0.0
    0.0034
    0.2696
    0.1348
    """

    def __init__(self, method: Method) -> None:
        self.asked, self.method = method, copy(method)
        self.measure, self.limit = cast(tuple[str, float], parted(method.budget))  # Method.faults has seen to it
        self.multiplier, self.drift, self._unit = 1.0, 0.0, unit_of(method)
        self._act(0.0)

    def _act(self, strength: float) -> None:
        object.__setattr__(self.method, "strength", strength)  # of our copy alone: configurations stay as they are

    def follow(self, drift: float) -> None:
        """Choose the strength of the next steps by a drift that has just been measured."""
        aim = AIM * self.limit
        # a run that diverged is as far off as can be
        now, before = (each / aim if math.isfinite(each) else FARTHEST for each in (drift, self.drift))
        expected = now * min(max(now / before if before else LEAD, 1 / LEAD), LEAD)
        self.multiplier *= min(max(now, SLOWEST), FARTHEST) ** RATE
        self.multiplier = min(max(self.multiplier, LEAST), MOST)
        self.drift = drift
        self._act(self._unit * self.multiplier * min(expected, FARTHEST))

    def state(self) -> Found:
        """Return what a run needs to go on."""
        return {"multiplier": self.multiplier, "drift": self.drift, "strength": self.method.strength}

    def load(self, found: Found) -> None:
        """Go on from what `state` returned."""
        self.multiplier, self.drift = found["multiplier"], found["drift"]
        self._act(found["strength"])


class Budgets:
    """All budgets of a session; without any it does nothing.

    Args:
        methods: of the session, in their order.
        log: called with a method's place, a name and a value.
        model: what measures are called with.
        measures: by name, those of the user's that budgets are on.

    Attributes:
        acting: the methods as they act: the same, but for those whose strength is found.
        held_out: measures the KL; the session sets it where there is a budget on it.
        sets: names of the retain sets that the methods with such a budget read; empty: all of them.

    Raises:
        WrongSetup: if a budget is on a measure that is not there.
    """

    def __init__(
        self,
        methods: Sequence[Method],
        log: Callable[[int, str, Tensor | float], None],
        model: nn.Module,
        measures: Mapping[str, Measure],
    ) -> None:
        self._budgets = {i: Budget(method) for i, method in enumerate(methods) if method.is_auto}
        self.acting = [self._budgets[i].method if i in self._budgets else m for i, m in enumerate(methods)]
        self.held_out: HeldOut | None = None
        self._model, self._measures = model, measures
        for budget in self._budgets.values():
            if budget.measure not in (KL, *measures):
                raise WrongSetup(
                    f"{budget.asked.name} has a budget on {budget.measure!r}, and no such measure was given "
                    f"({', '.join(measures) or 'none at all'}). Pass measures={{{budget.measure!r}: function}}, which "
                    "takes the model and returns how far it has drifted."
                )
        named = [getattr(method, "data", ()) for method in methods if method.needs_held_out]
        self.sets = frozenset(chain(*named)) if all(named) else frozenset()
        self._log, self._begun = log, -1

    def begin(self, step: int) -> None:
        """Measure the drift where it is due at this step, once, and set the strengths; all processes must call it."""
        due = [budget for budget in self._budgets.values() if step % budget.asked.budget_every == 0]
        if due and step != self._begun:
            drifts = {name: self._drift(name) for name in dict.fromkeys(budget.measure for budget in due)}
            for budget in due:
                budget.follow(drifts[budget.measure])
        self._begun = step

    def _drift(self, measure: str) -> float:
        if measure != KL:
            return drift_by(self._measures[measure], self._model)
        assert self.held_out is not None  # the session has seen to it
        return self.held_out.drift()

    def log(self) -> None:
        """Log each strength of this step, and the drift by which it was chosen."""
        for i, budget in self._budgets.items():
            self._log(i, "strength", budget.method.strength)
            self._log(i, "drift", budget.drift)
            self._log(i, "over_budget", float(not budget.drift <= budget.limit))

    def state(self) -> Record:
        """Return what a run needs to go on."""
        digest = None if self.held_out is None else self.held_out.digest
        found = {str(i): budget.state() for i, budget in self._budgets.items()}
        return {"begun": self._begun, "held_out": digest, "found": found}

    def load(self, record: Record) -> None:
        """Go on from what `state` returned; the base was loaded anew.

        Raises:
            WrongSetup: if drift was measured on other sequences.
        """
        if self.held_out is not None:
            self.held_out.resume(record.get("held_out"))
        self._begun = record["begun"]
        for i, budget in self._budgets.items():
            budget.load(record["found"][str(i)])

    def describe(self) -> list[str]:
        """Return a line for each measure, as `explain()` shows it."""
        places: dict[str, list[str]] = {}
        for b in self._budgets.values():
            told = f"{b.asked.name} (at most {b.limit:g}, every {b.asked.budget_every} steps)"
            places.setdefault(b.measure, []).append(told)
        held_out = self.held_out.describe() if self.held_out is not None else ""
        return [
            f"{held_out if name == KL else f'drift measured: {name}'}; strength follows: {', '.join(told)}"
            for name, told in places.items()
        ]
