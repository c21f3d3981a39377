"""A-GEM: never step against the retain data (Chaudhry et al., arXiv 1812.00420).

    g <- g - strength · min(0, g·r) / |r|^2 · r

with r the averaged gradient on retain batches. One-sided: a gradient that helps the retain data passes unchanged.
The paper acts on the gradient; under AdamW the update then still has a part along r (see docs/one-step.md), which
`apply_to="update"` removes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ...core.method import GradientMethod
from ...core.registry import register
from ...core.types import Setup, State, Step
from ...functional import named
from ...functional.flat import dots, energy, subtract_


@register("agem")
@dataclass(frozen=True, kw_only=True)
class AGEM(GradientMethod):
    """Remove from the gradient what would raise the retain loss.

    Attributes:
        strength: share of the harmful component removed, in [0, 1]; 1 is the paper's projection.
        refresh_every: 1, the paper's: a fresh reference gradient every step. Each costs `retain_batches` backwards.
        retain_batches: batches that one reference gradient is averaged over, shared out over the processes.

    >>> AGEM(refresh_every=10).retain_batches
    1
    """

    uses_retain: ClassVar[bool] = True
    refresh_every: int | None = 1
    retain_batches: int = 1

    def faults(self) -> Iterator[str]:
        yield from super().faults()
        if isinstance(self.strength, int | float) and self.strength > 1:
            yield f"strength is a share of the harmful component, in [0, 1], got {self.strength}"
        if not isinstance(self.retain_batches, int) or self.retain_batches < 1:
            yield f"retain_batches must be a whole number >= 1, got {self.retain_batches!r}"

    def init(self, setup: Setup) -> State:
        return setup.gradients(setup.retain(self.retain_batches))

    def state_bytes(self, parameters: int) -> int:
        return 4 * parameters

    def transform(self, reference: State, step: Step) -> Step:
        along, direction, (agreement, squared, size) = self._products(reference, step)
        # no branch on the sign: the device is never waited for, and r = 0 (a fresh LoRA's A) leaves g alone
        share = agreement.clamp(max=0) / squared.clamp(min=torch.finfo(squared.dtype).tiny)
        step.log("cosine", agreement / (squared * size).sqrt().clamp(min=1e-30))
        step.log("removed", (share * squared.sqrt()).abs() * self.strength)
        pieces = named.views(subtract_(direction, along[None], self.strength * share[None]), step.direction)
        return replace(step, direction={name: pieces[name].to(d.dtype) for name, d in step.direction.items()})

    def leakage(self, reference: State, step: Step) -> Tensor:
        _, _, (agreement, squared, size) = self._products(reference, step)
        harm: Tensor = -agreement / (squared * size).sqrt().clamp(min=1e-30)
        return harm.clamp(min=0)

    @staticmethod
    def _products(reference: State, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        """Return r and g as vectors, over the parameters that move, and [g·r, |r|², |g|²]."""
        along = named.flatten({name: reference[name] for name in step.direction}).float()
        direction = named.flatten(step.direction).float()
        inner = dots(along[None], direction)[0]
        return along, direction, step.reduce(torch.stack([inner, energy(along), energy(direction)]))
