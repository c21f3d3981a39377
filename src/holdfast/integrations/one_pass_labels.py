"""What one pass must know of a step's labels as plain numbers, read from the device once for all of its micro-batches.

A GPU runs ahead of the program only until somebody asks for a number. So all that is asked for is asked at the start of
a step, where its tokens are counted and the device is waited for anyway. Read next: `one_pass`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.types import IGNORED, Batch


class LabelFacts(NamedTuple):
    """Of the labels of a micro-batch: how many tokens are asked for, and whether some are not the next of its ids."""

    tokens: int
    others: bool


class StepLabels:
    """Reads the labels of a step, and knows them again by the very tensor.

    >>> ids = torch.tensor([[3, 4, 5, 6]])
    >>> facts = StepLabels()
    >>> facts.read([batch := {"input_ids": ids, "labels": torch.tensor([[-100, -100, 5, 6]])}], torch.tensor(2))
    >>> facts.of(batch), facts.of({"input_ids": ids, "labels": ids + 1})
    (LabelFacts(tokens=2, others=False), LabelFacts(tokens=3, others=True))
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[Tensor, LabelFacts]] = {}
        self._items: tuple[Any, float] = (None, 0.0)

    def read(self, batches: Iterable[Batch], items: Any = None) -> None:
        """Read what a step has, and forget the one before.

        Args:
            batches: its micro-batches; those without labels or ids are passed over.
            items: the host's own count of its tokens, if it has one.
        """
        seen = [(batch["input_ids"], batch["labels"]) for batch in batches if {"input_ids", "labels"} <= batch.keys()]
        found = torch.stack([_facts(*each) for each in seen]).tolist() if seen else []
        # the tensors are held, so that no other can have the same id
        self._known = {
            id(labels): (labels, LabelFacts(tokens, bool(others)))
            for (_, labels), (tokens, others) in zip(seen, found, strict=True)
        }
        self._items = items, 0.0 if items is None else float(items)

    def of(self, batch: Batch) -> LabelFacts:
        """Return the facts of a micro-batch, read now if they are not known."""
        known = self._known.get(id(batch["labels"]))
        if known is not None:
            return known[1]
        tokens, others = _facts(batch["input_ids"], batch["labels"]).tolist()
        return LabelFacts(tokens, bool(others))

    def number(self, items: Any) -> float:
        """Return the host's count of a step's tokens as a number, read now if it is another one than was read."""
        seen, number = self._items
        return number if items is seen else float(items)


def _facts(ids: Tensor, labels: Tensor) -> Tensor:
    asked = labels[:, 1:] != IGNORED
    return torch.stack([asked.sum(), ((labels != ids)[:, 1:] & asked).any().long()])
