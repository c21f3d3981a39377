"""What the methods that hold a distribution to the base's have in common: positions, direction, normaliser.

    L = strength · (1/N) Σ_t w_t · D(base_t, student_t)

The contexts are the task's own tokens, or with `on="retain"` those of retain sequences; the reference runs on the same
batch. N counts the supervised tokens of the whole optimizer step over all devices, as the host's own loss does, so the
split of a step changes nothing.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import get_args

from torch import Tensor

from ...core.method import OutputMethod
from ...core.types import Outputs, Positions, State
from ...functional.divergence import Direction, Divergence
from ...functional.linear_divergence import LinearReduction, linear_divergence


@dataclass(frozen=True, kw_only=True)
class DivergenceMethod(OutputMethod):
    """A divergence between the base's and the student's next-token distributions.

    Attributes:
        positions: `completion` (where the task loss looks), `prompt` (its free contexts) or `all`. A retain sequence
            has no prompt, so with `on="retain"` the first and the last say the same: every token after the first.
        direction: `forward` KL(base || student), `reverse`, or `js`; equal strength is not equal force among them.
        chunk_rows: rows of logits that exist at once: memory is 2 · chunk_rows · vocabulary numbers. None: 128 on a
            CPU, 1,024 elsewhere.
    """

    positions: Positions = "completion"
    direction: Direction = "forward"
    chunk_rows: int | None = None

    def faults(self) -> Iterator[str]:
        yield from super().faults()
        for name, kind in (("positions", Positions), ("direction", Direction)):
            if (value := getattr(self, name)) not in get_args(kind):
                yield f"{name} must be one of {', '.join(get_args(kind))}, got {value!r}"
        if self.on == "retain" and self.positions == "prompt":
            yield "positions='prompt' on the retain stream is nothing: its sequences have no prompt, every token counts"
        if self.chunk_rows is not None and (not isinstance(self.chunk_rows, int) or self.chunk_rows < 1):
            yield f"chunk_rows must be a whole number >= 1 or None, got {self.chunk_rows!r}"

    @abstractmethod
    def divergence(self) -> Divergence:
        """Return the member of the family that the settings name."""

    def statistic(self) -> Divergence | None:
        return self.divergence()

    def loss(self, state: State, outputs: Outputs) -> Tensor:
        mean = self.total(outputs) * outputs.per_token(self.positions)
        outputs.log("divergence", mean)
        return self.strength * mean

    def total(self, outputs: Outputs, reduction: LinearReduction = "sum") -> Tensor:
        """Return the divergence summed (or as `reduction` says) over this micro-batch's rows."""
        if outputs.kept_sum is not None and reduction == "sum":
            return outputs.kept_sum(self.divergence(), self.positions, self.chunk_rows)
        rows = outputs.rows(self.positions)
        return linear_divergence(
            rows.hidden,
            rows.reference_hidden,
            outputs.head,
            rows.targets,
            self.divergence(),
            reference_head=outputs.reference_head,
            chunk_rows=self.chunk_rows,
            reduction=reduction,
        )
