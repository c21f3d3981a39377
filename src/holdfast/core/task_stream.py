"""The task stream: what output methods see of a micro-batch whose forward the host has just run.

    the host's forward → `Taken`: the student's hidden states, and the base's on the same batch where a method asks

The base runs on the very arguments of the student's forward, on some of the rows where that is asked for (`sampling`),
and not at all where what it says of them is kept (`kept_task`). Read next: `session`, which runs it; `stream`, for the
retain stream beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

from torch import Tensor

from .kept_task import KeepTask, KeptTask
from .method import OutputMethod
from .reference import Reference
from .sampling import Sampling
from .tap import Call, Tap
from .types import Batch, Outputs, Supervision, TokenCounts


@dataclass(frozen=True)
class Taken:
    """A forward of the student's that was taken off the tap: whoever holds it hands it on to `Session.loss`.

    Attributes:
        call: the forward.
        task: what output methods on the task see of it.
        sums: divergences that the host has computed itself, summed over this micro-batch's rows, by the method's place
            in the list.
    """

    call: Call
    task: Outputs
    sums: dict[int, Tensor] = field(default_factory=dict)


class TaskStream:
    """Takes the student's forward of each micro-batch, once for all methods that read the task.

    Args:
        methods: that read the task; there may be none, if others read the retain stream.
        tap: the student's.
        reference: the frozen base.
        seed: of the draws of a share of the sequences.
        keep: keeps what the base says of the sequences; None: nothing is kept.

    Attributes:
        sampling: draws the rows that the base runs on; None: all of them.
        kept: what is kept of the base; None: nothing.

    Raises:
        WrongSetup: if the methods ask for different shares of the sequences.
    """

    def __init__(
        self,
        methods: Sequence[OutputMethod],
        tap: Tap,
        reference: Reference,
        seed: int,
        keep: KeepTask | None = None,
    ) -> None:
        self._tap, self._reference = tap, reference
        self.sampling = Sampling.of(methods, seed)
        self.kept: KeptTask | None = keep(tap, reference, methods) if keep is not None and methods else None

    def take(self, batch: Batch, counts: TokenCounts, step: int, host_factor: float) -> Taken:
        """Take the forward of a micro-batch.

        Args:
            batch: what the model was called with.
            counts: of the whole optimizer step.
            step: the number of the optimizer step.
            host_factor: as in `Session.loss`.

        Raises:
            WrongSetup: if the model did not run once since the last one, or the batch has no targets.
        """
        tap, reference, call = self._tap, self._reference, self._tap.take()
        task = Outputs(
            hidden=call.hidden,
            head=tap.head(),
            supervision=Supervision.of(batch),
            counts=counts,
            host_factor=host_factor,
            run_reference=cache(lambda: (reference.hidden(tap, call), reference.head(tap))),
        )
        part: Call | None = call
        if self.sampling is not None:
            task, part = self.sampling.of_task(task, call, batch, step, tap, reference)
        return Taken(call, task if self.kept is None else self.kept.of_task(task, part))
