"""The retain data of a session: named sets of batches, drawn from in turn, with positions that a checkpoint keeps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, zip_longest
from typing import Any

import torch
from torch import Tensor

from .errors import WrongSetup
from .gradients import chosen, is_preference
from .types import Batch

Rows = Iterable[Mapping[str, Any]]
RetainRows = Rows | Mapping[str, Rows]  # what users hand to a host: one set, or several by name
ONLY = "retain"  # the name of the set where there is but one
ALL, STREAM = "", "*"  # positions over all sets: of `take`, and of `sequences`, which counts on from pass to pass


class Retain:
    """Draws batches from sets, each from where it was left, and from the start again at its end.

    Args:
        sets: batches by name of their set, or a sequence of batches: one set.

    Raises:
        WrongSetup: for a set with a name under which a position over all sets is kept.
    """

    def __init__(self, sets: Mapping[str, Sequence[Batch]] | Sequence[Batch]) -> None:
        named = sets if isinstance(sets, Mapping) else {ONLY: sets}
        self._sets = {name: list(batches) for name, batches in named.items() if len(batches)}
        self._all = in_turn(self._sets.values())
        if taken := self._sets.keys() & {ALL, STREAM}:
            raise WrongSetup(f"A retain set cannot be called {taken.pop()!r}: give it another name.")
        self.positions = dict.fromkeys([*self._sets, ALL, STREAM], 0)

    def __bool__(self) -> bool:
        return bool(self._all)

    @property
    def sets(self) -> Mapping[str, Sequence[Batch]]:
        """The batches of each set, by its name; reading them moves no position."""
        return self._sets

    def take(self, n: int) -> list[Batch]:
        """Return the next `n` batches, the sets in turn."""
        return [self._next(ALL, self._all) for _ in range(n)]

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

    def sequences(self, names: Sequence[str] = ()) -> list[Tensor]:
        """Return the token ids of every sequence of these sets, or of all where none is named, in one order.

        Raises:
            WrongSetup: for a set that is not there, or if no sequence has two tokens, so that nothing follows anything.
        """
        if lost := [name for name in names if name not in self._sets]:
            raise WrongSetup(f"There is no retain set {lost[0]!r}: the sets are {', '.join(map(repr, self._sets))}.")
        batches = in_turn(self._sets[name] for name in names or self._sets)
        found = [ids for batch in batches for ids in sequences_of(batch)]
        if not found:
            raise WrongSetup("The retain data has no sequence of two tokens or more: give it longer rows.")
        return found

    def places(self, n: int, count: int, seed: int) -> list[int]:
        """Return the next `n` places among `count` sequences; every pass over them has an order of its own.

        Args:
            n: how many; more than there are begin the next pass.
            count: of the sequences, the same at every call.
            seed: of the orders.
        """
        first = self.positions[STREAM]
        self.positions[STREAM] = first + n
        passes = range(first // count, (first + n - 1) // count + 1)
        orders = {i: torch.randperm(count, generator=torch.Generator().manual_seed(seed + i)) for i in passes}
        return [int(orders[place // count][place % count]) for place in range(first, first + n)]

    def _next(self, name: str, batches: Sequence[Batch]) -> Batch:
        position = self.positions[name]
        self.positions[name] = (position + 1) % len(batches)
        return batches[position]


def in_turn(sets: Iterable[Sequence[Batch]]) -> list[Batch]:
    """Return the batches of all sets: the first of each, then the second of each, and so on."""
    return [batch for batch in chain.from_iterable(zip_longest(*sets)) if batch is not None]


def sequences_of(batch: Batch) -> list[Tensor]:
    """Return the token ids of each sequence of a batch, without padding; those of one token are left out.

    Packed rows are taken apart where positions begin anew. Of a preference pair only the chosen answer is returned.

    >>> packed = {"input_ids": torch.tensor([[5, 6, 7, 8, 9]]), "position_ids": torch.tensor([[0, 1, 2, 0, 1]])}
    >>> [ids.tolist() for ids in sequences_of(packed)]
    [[5, 6, 7], [8, 9]]
    """
    batch = chosen(batch) if is_preference(batch) else batch
    ids, positions = batch["input_ids"], batch.get("position_ids")
    real = batch["attention_mask"].bool() if "attention_mask" in batch else torch.ones_like(ids, dtype=torch.bool)
    found: list[Tensor] = []
    for row, kept in enumerate(real):
        starts: list[int] = []
        if positions is not None:
            starts = (positions.expand_as(ids)[row][kept] == 0).nonzero().flatten().tolist()
        found += ids[row][kept].tensor_split([start for start in starts if start])
    return [sequence for sequence in found if len(sequence) > 1]
