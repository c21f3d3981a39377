"""The base on a random share of a step's sequences: the output loss is computed on those alone, and divided by it.

    L' = (1/share) · Σ_{r chosen} l_r,   r is chosen iff  floor((r + 1)·share + u) > floor(r·share + u),  u ~ U[0, 1)

Every row is chosen with probability `share` exactly, so E[L'] = Σ_r l_r; what it costs is noise in the gradient. Rows
are numbered through a step, so splitting it into micro-batches changes nothing, and of n rows of a process n·share are
chosen to within one: where n·share >= 1 on every process, no step of any is without a base by bad luck, and no process
works for the others. u follows from seed, step and rank alone, so a resumed run draws as an uninterrupted one. Rows are
chosen, not documents: a packed row counts as one.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from random import Random
from typing import Any

import torch
from torch import Tensor

from .distributed import rank
from .errors import WrongSetup
from .method import OutputMethod
from .reference import Reference
from .tap import Call, Tap
from .types import Batch, Outputs, Supervision

OF_ROWS = ("input_ids", "attention_mask", "position_ids", "inputs_embeds", "token_type_ids")


def chosen(start: float, share: float, first: int, rows: int) -> list[int]:
    """Return which of `rows` rows are chosen, as places from 0; `first` is the number of the first one in its step.

    >>> chosen(0.5, 0.25, first=0, rows=8)
    [1, 5]
    >>> chosen(0.5, 0.25, first=0, rows=3), chosen(0.5, 0.25, first=3, rows=5)  # the same step in two micro-batches
    ([1], [2])
    """
    passed = [math.floor((first + i) * share + start) for i in range(rows + 1)]
    return [i for i in range(rows) if passed[i + 1] > passed[i]]


class Sampling:
    """Draws the rows of each step that the base runs on.

    Args:
        share: of the rows.
        seed: of the draws.
    """

    def __init__(self, share: float, seed: int) -> None:
        self.share, self.seed = share, seed
        self._step, self._rows, self._chosen = -1, 0, 0
        self._told: set[str] = set()

    @classmethod
    def of(cls, methods: Sequence[OutputMethod], seed: int) -> Sampling | None:
        """Return the sampling that methods on the task stream ask for; None where they want every row.

        Raises:
            WrongSetup: if they ask for different shares.
        """
        if len({method.reference_share for method in methods}) > 1:
            raise WrongSetup(
                f"{' and '.join(m.describe() for m in methods)} differ in reference_share, and the base runs once for "
                "all of them. Give them the same; strengths may differ."
            )
        share = methods[0].reference_share if methods else 1.0
        return cls(share, seed) if share < 1 else None

    def describe(self) -> str:
        """Return what is drawn, as `explain()` shows it."""
        return f"on {self.share:.3g} of the task's sequences, drawn anew in every step; the loss is divided by it"

    def start(self, step: int) -> float:
        """Return u of a step, in [0, 1), another one on every process."""
        return Random(f"{self.seed} {step} {rank()}").random()

    def draw(self, rows: int, step: int) -> list[int]:
        """Return the chosen places among the rows of the next micro-batch of a step."""
        if step != self._step:
            if self._rows and not self._chosen:
                self._tell(
                    "no row",
                    f"None of the {self._rows} sequences that a step had on this process was drawn, so it was without "
                    f"an output loss: reference_share={self.share:.3g} of them is less than one. The loss is right on "
                    "average, and noisy. Take more sequences a step (gradient_accumulation_steps), or a larger share.",
                )
            self._step, self._rows, self._chosen = step, 0, 0
        first, self._rows = self._rows, self._rows + rows
        places = chosen(self.start(step), self.share, first, rows)
        self._chosen += len(places)
        return places

    def of_task(
        self, task: Outputs, call: Call, batch: Batch, step: int, tap: Tap, reference: Reference
    ) -> tuple[Outputs, Call | None]:
        """Return what output methods see of a micro-batch: its chosen rows, whose tokens weigh 1/share of one.

        Args:
            task: what they would see of all rows.
            call: the student's forward.
            batch: the micro-batch.
            step: the number of the optimizer step.
            tap: the student's.
            reference: the base, which runs on the chosen rows alone, where any method asks for it.

        Returns:
            That, and the student's forward of the chosen rows; None where it cannot be cut to them.
        """
        rows = len(call.hidden)
        places = self.draw(rows, step)
        own = {key: value[places] if value.dim() and len(value) == rows else value for key, value in tensors(batch)}
        part = call if len(places) == rows else cut(call, places) if not_of_rows(call) is None else None

        def base() -> Tensor:
            if not places:
                return call.hidden.new_zeros(0, call.hidden.shape[1], reference.head(tap).weight.shape[1])
            if part is not None:
                return reference.hidden(tap, part)
            self._tell(
                "not of rows",
                f"The model is called with {not_of_rows(call)!r}, of which holdfast cannot tell what belongs to which "
                f"sequence. So the base runs on all sequences, at its full cost, and a share of {self.share:.3g} is "
                "read. The result is right. Set reference_share=1, which is less noisy at this cost.",
            )
            return reference.hidden(tap, call)[places]

        seen = replace(
            task,
            hidden=call.hidden[places] if part is None else part.hidden,
            supervision=Supervision.of(own),
            host_factor=task.host_factor / self.share,
            run_reference=cache(lambda: (base(), reference.head(tap))),
        )
        return seen, part

    def _tell(self, what: str, text: str) -> None:
        if what not in self._told:
            self._told.add(what)
            warnings.warn(text, stacklevel=3)


def tensors(batch: Batch) -> list[tuple[str, Tensor]]:
    """Return the tensors of a batch, by name: with packed documents TRL puts lengths beside them, as whole numbers."""
    return [(key, value) for key, value in batch.items() if isinstance(value, Tensor)]


def not_of_rows(call: Call) -> str | None:
    """Return the name of an argument that cannot be cut to some of the rows, if there is one."""
    named = [*(("input_ids", value) for value in call.args), *call.kwargs.items()]
    return next((name for name, value in named if not _of_rows(name, value, len(call.hidden))), None)


def _of_rows(name: str, value: object, rows: int) -> bool:
    if isinstance(value, Mapping):  # masks of layers that attend in different ways
        return all(_of_rows(name, part, rows) for part in value.values())
    if not isinstance(value, Tensor):
        return value is None or isinstance(value, bool | int | float | str)
    flat = value.dim() == 2 or (value.dim() > 2 and name != "position_ids")  # with three axes it has one for each
    return value.dim() == 0 or (name in OF_ROWS and flat and len(value) in (1, rows))


def cut(call: Call, places: Sequence[int]) -> Call:
    """Return a call of the backbone on some of its rows; what is the same for all rows stays as it is."""
    rows, index = len(call.hidden), torch.tensor(places, dtype=torch.long, device=call.hidden.device)

    def some(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: some(part) for key, part in value.items()}
        return value[index] if isinstance(value, Tensor) and value.dim() and len(value) == rows else value

    return replace(
        call,
        hidden=call.hidden[index],
        args=tuple(map(some, call.args)),
        kwargs={key: some(value) for key, value in call.kwargs.items()},
        entered=None if call.entered is None else call.entered[index],
    )
