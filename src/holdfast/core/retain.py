"""The retain data of a session: named sets of batches, drawn from in turn, with positions that a checkpoint keeps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, zip_longest
from typing import Any

from .types import Batch

Rows = Iterable[Mapping[str, Any]]
RetainRows = Rows | Mapping[str, Rows]  # what users hand to a host: one set, or several by name
ONLY = "retain"  # the name of the set where there is but one


class Retain:
    """Draws batches from sets, each from where it was left, and from the start again at its end.

    Args:
        sets: batches by name of their set, or a sequence of batches: one set.
    """

    def __init__(self, sets: Mapping[str, Sequence[Batch]] | Sequence[Batch]) -> None:
        named = sets if isinstance(sets, Mapping) else {ONLY: sets}
        self._sets = {name: list(batches) for name, batches in named.items() if len(batches)}
        interleaved = chain.from_iterable(zip_longest(*self._sets.values()))
        self._all = [batch for batch in interleaved if batch is not None]
        self.positions = dict.fromkeys([*self._sets, ""], 0)  # "": of `take`, over all sets

    def __bool__(self) -> bool:
        return bool(self._all)

    @property
    def sets(self) -> Mapping[str, Sequence[Batch]]:
        """The batches of each set, by its name; reading them moves no position."""
        return self._sets

    def take(self, n: int) -> list[Batch]:
        """Return the next `n` batches, the sets in turn."""
        return [self._next("", self._all) for _ in range(n)]

    def draw(self, rows: int, first: bool = False) -> dict[str, list[Batch]]:
        """Return from every set its next batches with at least `rows` rows, or the whole set where it is smaller.

        Args:
            rows: how many.
            first: take those at its beginning.
        """
        drawn: dict[str, list[Batch]] = {}
        for name, batches in self._sets.items():
            drawn[name], found = [], 0
            self.positions[name] *= not first
            while found < rows and len(drawn[name]) < len(batches):
                drawn[name].append(self._next(name, batches))
                found += len(drawn[name][-1]["input_ids"])
        return drawn

    def _next(self, name: str, batches: Sequence[Batch]) -> Batch:
        position = self.positions[name]
        self.positions[name] = (position + 1) % len(batches)
        return batches[position]
