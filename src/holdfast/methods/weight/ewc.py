"""EWC: a quadratic pull to the base weights, weight by weight (Kirkpatrick et al., arXiv 1612.00796).

    strength / 2 · Σ_j F_jj dW_j²

with the diagonal Fisher of retain data at the base weights. It is measured on the weight update and not on LoRA's
factors: at B = 0 the Fisher of A is zero, and EWC on the factors would leave A free. The diagonal is that of the
Kronecker factors, F_(ij)(ij) = mean(δ_i²) · mean(x_j²), so no tensor of the layer's size is kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.registry import register
from ...core.types import Auto, State, Weights
from ...functional.fisher import Kind
from .fisher_method import FisherMethod


@register("ewc")
@dataclass(frozen=True, kw_only=True)
class EWC(FisherMethod):
    """Penalise the weight update with the diagonal Fisher of the base model on retain data.

    Attributes:
        strength: 1e-2; the Fisher has a mean of 1 in every layer, so this is about that of `update_decay`, times two.
        kind: `diagonal`.

    >>> EWC(data="text").kind
    'diagonal'
    """

    strength: float | Auto = 1e-2
    kind: Kind = "diagonal"

    def penalty(self, state: State, weights: Weights) -> Tensor:
        updates = self.updates(state, weights)
        sets = self.fishers(state)
        terms = [fishers[layer].quadratic(update) for fishers in sets for layer, update in updates.items()]
        return 0.5 * self.strength / len(sets) * torch.stack(terms).sum()
