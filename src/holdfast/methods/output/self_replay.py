"""Self-replay: the base's own distribution, kept on sequences that need not be about the task.

    L = CE(task) + strength · (1/N) Σ_t KL(p_base,t || p_student,t),   t over the step's N retain tokens

The pool is sampled once from the base itself, or is the user's own text; a few of its sequences run beside every batch
of the task. Targets are the base's whole distributions, not its samples: pseudo-rehearsal (Robins, 1995) with soft
targets. Nothing about the task's tokens is held, so learning it is not opposed. It is `full_kl` on the retain stream
with defaults of its own; with the target left out, `target_masked_kl` runs there too. Read next: `divergence_method`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from ...core.method import Stream
from ...core.registry import register
from ...functional.divergence import Divergence
from .divergence_method import DivergenceMethod


@register("self_replay")
@dataclass(frozen=True, kw_only=True)
class SelfReplay(DivergenceMethod):
    """Hold the student to the base on a few retain sequences in every step.

    Attributes:
        on: `retain`, and nothing else.
        share: 0.25: 4 retain sequences beside every 12 of the task.

    >>> SelfReplay(share=0.2).uses_retain, SelfReplay().strength
    (True, 1.0)
    """

    uses_retain: ClassVar[bool] = True
    samples_pool: ClassVar[bool] = True
    on: Stream = "retain"

    def faults(self) -> Iterator[str]:
        yield from super().faults()
        if self.on != "retain":
            yield f"on must be retain: self-replay on the task's own tokens is full_kl, got {self.on!r}"

    def divergence(self) -> Divergence:
        return Divergence(mask="none", direction=self.direction)
