"""What a gate holds drift against: budgets, each for one direction of one score, and how sure a violation must be.

    budget of a fall: drift >= -limit · of a rise: drift <= limit        (relative: of drift / base's value)

Read next: `holdfast.analysis.gate`, which judges; `holdfast.analysis.gate_file`, which reads budgets from YAML.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal, TypeAlias

from holdfast.analysis.paired import CORRECTIONS, Correction

Side: TypeAlias = Literal["fall", "rise"]
SIDES: tuple[Side, ...] = ("fall", "rise")
EACH = "*"
"""As a category: every one that has enough items, each by itself."""


class GateError(ValueError):
    """What is wrong with a gate, or with what it is to judge, all faults at once."""

    def __init__(self, subject: str, faults: Iterable[str]) -> None:
        self.faults = tuple(faults)
        count = "a fault" if len(self.faults) == 1 else f"{len(self.faults)} faults"
        super().__init__(f"{subject} has {count}:" + "".join(f"\n  - {fault}" for fault in self.faults))


@dataclass(frozen=True)
class Budget:
    """How far one score may drift in one direction.

    Args:
        score: its name.
        side: the direction that is limited.
        limit: how far it may go: in the score's own unit (0.02 is two points of a rate) or, if relative, as a share
            of the base's value.
        relative: see `limit`.
        category: judged on the items of this category alone; `EACH`: on every category by itself.

    Raises:
        GateError: if there is no such side, or the limit is no number of at least 0.

    >>> str(Budget("perplexity", "rise", 0.03, relative=True))
    'perplexity may rise by at most 3 %'
    """

    score: str
    side: Side
    limit: float
    relative: bool = False
    category: str | None = None

    def __post_init__(self) -> None:
        faults = [] if self.side in SIDES else [f"side must be 'fall' or 'rise', got {self.side!r}"]
        if not 0 <= self.limit < math.inf:
            faults.append(f"{self.side} must be a number >= 0, got {self.limit!r}")
        if faults:
            raise GateError(f"The budget of {self.score}", faults)

    def __str__(self) -> str:
        return f"{self.name} may {self.side} by at most {shown(self.limit, self.relative)}"

    @property
    def name(self) -> str:
        """The score and, in brackets, its category."""
        return self.score if self.category is None else f"{self.score} [{self.category}]"

    def bound(self) -> float:
        """The drift at which the budget is spent: below 0 for a fall."""
        return -self.limit if self.side == "fall" else self.limit


@dataclass(frozen=True)
class Gate:
    """Budgets, and how sure a violation must be.

    Args:
        budgets: what is judged.
        level: the chance that the gate fails although no budget is exceeded is at most this.
        correction: for many budgets: `"holm"`; `"bh"` (level is then the share of false alarms among failures) or
            `"none"` (level is then that of each budget).
        strict: whether undecided fails.

    Raises:
        GateError: if the level does not lie between 0 and 1, or there is no such correction.
    """

    budgets: tuple[Budget, ...]
    level: float = 0.05
    correction: Correction = "holm"
    strict: bool = False

    def __post_init__(self) -> None:
        faults = [] if 0 < self.level < 1 else [f"level must lie between 0 and 1, such as 0.05, got {self.level!r}"]
        if self.correction not in CORRECTIONS:
            faults.append(f"correction must be one of {', '.join(CORRECTIONS)}, got {self.correction!r}")
        if faults:
            raise GateError("The gate", faults)


def shown(value: float, relative: bool = False) -> str:
    """The value as in sentences.

    >>> shown(-0.02), shown(0.0312, relative=True)
    ('-0.02', '3.12 %')
    """
    return f"{100 * value:.3g} %" if relative else f"{value:.3g}"


def guess(name: str, known: Iterable[str]) -> str:
    """What was meant, or what there is.

    >>> guess("refusals", ["refusal", "over_refusal"])
    " Did you mean 'refusal'?"
    >>> guess("x", ["refusal"])
    ' There is: refusal.'
    """
    names = list(known)
    close = get_close_matches(name, names, n=1)
    return f" Did you mean {close[0]!r}?" if close else f" There is: {', '.join(names) or 'nothing'}."
