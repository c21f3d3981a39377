"""What is kept of the base on the task's own sequences: what a session asks of it; `retain.task_cache` keeps it.

The sequences of the task come again in every epoch, in another order and beside others. What the base says of them does
not change, so from the second epoch on it need not run. Read next: `reference`, for the retain stream's `KeptBase`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from .method import OutputMethod
    from .reference import Reference
    from .tap import Call, Tap
    from .types import Outputs


class CachedRows(NamedTuple):
    """What is kept of some positions: e0, c0 and weights, or the base's hidden states; and the tokens that follow."""

    values: Tensor  # [N, H]
    constants: Tensor | None  # [N], float64; None: hidden states
    targets: Tensor  # [N]
    weights: Tensor | None = None  # [N], float64; None: 1


class KeptTask(Protocol):
    """What is kept of the base on the task's sequences."""

    def of_task(self, task: Outputs, call: Call | None) -> Outputs:
        """Return what methods see of a micro-batch, with `kept_sum` and `kept_rows` where it is kept.

        Args:
            task: what they see without it; perhaps no row at all.
            call: the student's forward of the rows of `task`; None where it cannot be told apart by rows.
        """

    def ran_for(self) -> Tensor | int:
        """Return for how many supervised tokens the base had to run since the last call."""

    def write(self) -> None:
        """Write down what has come since the last time: at a checkpoint, at the end of an epoch and of the run."""

    def forget(self) -> None:
        """Tell anew which base it is: the reference was restored from a checkpoint."""

    def describe(self) -> str:
        """Say what is kept, where, and what it costs; or why nothing is."""


KeepTask = Callable[["Tap", "Reference", "Sequence[OutputMethod]"], KeptTask]
"""Makes it, for a session's output methods on the task stream."""
