"""Update decay: keep the weight update small. The strongest simple rival of everything in this room.

    strength · Σ_layers ‖dW‖²          dW = s · B A, or weight minus start

Unlike weight decay on the factors it is a pull to the base model's weights: ‖B A‖², not ‖A‖² + ‖B‖², invariant under
(B R, R⁻¹ A), zero with zero gradient at B = 0. It needs no data.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.registry import register
from ...core.types import Auto, State, Weights
from ...functional.lowrank import squared_norm
from .fisher_method import UpdateMethod


@register("update_decay")
@dataclass(frozen=True, kw_only=True)
class UpdateDecay(UpdateMethod):
    """Penalise the squared size of the weight update.

    Attributes:
        strength: the ablation (docs/alignguard.md) tries 1e-3 to 1e-2.

    >>> UpdateDecay().strength
    0.001
    """

    strength: float | Auto = 1e-3

    def penalty(self, state: State, weights: Weights) -> Tensor:
        return (
            self.strength
            * torch.stack([squared_norm(update) for update in self.updates(state, weights).values()]).sum()
        )
