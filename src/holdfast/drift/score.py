"""A score: one measured value, with its items, what measured it, and how sure it is. Standard library only.

Read next: `holdfast.drift.entry`, the line of the ledger that holds scores.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from numbers import Real
from statistics import stdev
from typing import cast

__all__ = ["LedgerError", "Score", "is_real"]


class LedgerError(ValueError):
    """What is wrong with an entry or a ledger file, all faults at once."""

    def __init__(self, what: str, faults: Iterable[str] = ()) -> None:
        self.faults = tuple(faults)
        super().__init__(what + "".join(f"\n  - {fault}" for fault in self.faults))


@dataclass(frozen=True, repr=False)
class Score:
    """One measured value, with what is known about its uncertainty.

    Args:
        value: the score.
        n: how many items it was measured on.
        standard_error: its standard error over items, if computed.
        items: the per-item results behind it; their mean (or, for a perplexity, its exponential) is the value. With
            them, arms measured on the same items are compared item by item.
        categories: what each item is about, one for each.
        instrument: what measured it, with its version and the digest of its items; scores of two instruments are not
            compared.
        interval: of the value at 95 %, over items.

    >>> Score(0.75, n=4, items=(1, 1, 0, 1)).items
    (1.0, 1.0, 0.0, 1.0)
    """

    value: float
    n: int | None = None
    standard_error: float | None = None
    items: tuple[float, ...] | None = None
    categories: tuple[str, ...] | None = None
    instrument: str = ""
    interval: tuple[float, float] | None = None

    def __repr__(self) -> str:
        known = (
            f"{part.name}={value!r}" for part in fields(self) if (value := getattr(self, part.name)) != part.default
        )
        return f"Score({', '.join(known)})"

    def __post_init__(self) -> None:
        faults = [f"{name} is {number!r}, not a number" for name, number in self._numbers() if not is_real(number)]
        if faults:
            raise LedgerError("this score cannot be recorded:", faults)
        object.__setattr__(self, "value", float(self.value))
        if self.standard_error is not None:
            object.__setattr__(self, "standard_error", float(self.standard_error))
        if self.items is not None:
            object.__setattr__(self, "items", tuple(float(item) for item in self.items))
            object.__setattr__(self, "n", len(self.items) if self.n is None else self.n)
        for name in ("categories", "interval"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, tuple(value))

    def without_items(self) -> Score:
        """Return the score with the standard error of its items in their place: a shorter ledger.

        For what is shown and not compared item by item.

        >>> Score(0.5, items=(0, 1)).without_items()
        Score(value=0.5, n=2, standard_error=0.5)
        """
        if self.items is None or len(self.items) < 2:
            return self
        return Score(self.value, n=self.n, standard_error=stdev(self.items) / math.sqrt(len(self.items)))

    def _numbers(self) -> Iterator[tuple[str, object]]:
        yield "value", self.value
        yield from ((name, x) for name, x in (("n", self.n), ("standard_error", self.standard_error)) if x is not None)
        yield from (("one of the items", item) for item in (() if self.items is None else self.items))
        yield from (("an end of the interval", end) for end in (() if self.interval is None else self.interval))

    def faults(self) -> list[str]:
        """What forbids this score in a finished entry; empty if nothing does."""
        found = [f"{name} is {x}" for name, x in self._numbers() if not math.isfinite(cast(float, x))]
        if self.n is not None and (self.n < 1 or self.n != int(self.n)):
            found.append(f"n is {self.n}, not a positive whole number")
        if self.items is not None and self.n != len(self.items):
            found.append(f"n is {self.n} but there are {len(self.items)} items")
        if self.categories is not None and (self.items is None or len(self.categories) != len(self.items)):
            found.append(f"there are {len(self.categories)} categories for {len(self.items or ())} items")
        if self.standard_error is not None and self.standard_error < 0:
            found.append(f"standard_error is negative ({self.standard_error})")
        return found

    def to_record(self) -> dict[str, object]:
        """What is known of it, in JSON's own types; NaN and infinity become strings."""
        known = {part.name: getattr(self, part.name) for part in fields(self)}
        return {name: _plain(value) for name, value in known.items() if value not in (None, "")}

    @classmethod
    def from_record(cls, record: Mapping[str, object]) -> Score:
        """The inverse of `to_record`.

        >>> score = Score(0.5, items=(0, 1), categories=("fraud", "hate"), instrument="scorer 1")
        >>> Score.from_record(score.to_record()) == score
        True
        """
        as_it_is = ("n", "items", "categories", "instrument", "interval")
        read = {name: value if name in as_it_is else _number(value) for name, value in record.items()}
        for name in ("items", "interval"):
            if isinstance(numbers := read.get(name), list):
                read[name] = tuple(_number(one) for one in numbers)
        return cls(**read)  # type: ignore[arg-type]


def is_real(number: object) -> bool:
    """Whether it is a number."""
    return isinstance(number, Real)


def _plain(value: object) -> object:
    """A score's field in JSON's own types: NaN and infinity, which only failed runs have, as strings."""
    if isinstance(value, tuple):
        return [_plain(part) for part in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: object) -> float:
    return float(value) if isinstance(value, str) else cast(float, value)
