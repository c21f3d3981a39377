"""Fisher alignment penalty of AlignGuard-LoRA (arXiv 2508.02079): tread lightly where the base model is sensitive.

    full      strength · vec(dW)ᵀ F vec(dW) = strength · tr(S_out dW S_in dWᵀ)
    leading   strength · Σ_{i<=m} L_i <u_i, dW>²          the paper's ‖F^½ dW_A‖², dW_A = U_m U_mᵀ dW

summed over layers, F the Fisher of alignment data at the base weights with a mean eigenvalue of 1. The paper's form
looks at m directions and no others; training leaves them at once and does its damage beside them, so the default is the
full quadratic (docs/methods/fisher_alignment.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.registry import register
from ...core.types import Auto, State, Weights
from ...functional.lowrank import Update, squared_norm
from ...functional.packed_fishers import LayerFisher
from .fisher_method import FisherMethod, leading_faults


@register("fisher_alignment")
@dataclass(frozen=True, kw_only=True)
class FisherAlignment(FisherMethod):
    """Penalise the weight update in the metric of a Fisher of the base model.

    Attributes:
        strength: the ablation (docs/alignguard.md) tries 1e-3 to 1e-2 with data mixed over alignment, skills and text,
            1e-2 and 1e-1 with alignment data alone.
        top: None: the full quadratic; a share in (0, 1]: the paper's form, on the leading directions that hold this
            share of the Fisher's trace (0.9 in re-implementations).
        most: with `top`, at most so many directions in each layer.

    >>> FisherAlignment(data="alignment", top=0.9).data
    ('alignment',)
    """

    strength: float | Auto = 1e-2
    top: float | None = None
    most: int = 64

    def faults(self) -> Iterator[str]:
        yield from super().faults()
        if self.top is not None:
            yield from leading_faults(self.top, self.most, self.keep, self.kind)

    def penalty(self, state: State, weights: Weights) -> Tensor:
        updates = self.updates(state, weights)
        sets = self.fishers(state)
        terms = [self._term(fishers[layer], update) for fishers in sets for layer, update in updates.items()]
        if self.shows(weights):
            with torch.no_grad():
                size = torch.stack([squared_norm(update) for update in updates.values()]).sum()
            self.show(state, weights, squared_norm=size)
        return self.strength / len(sets) * torch.stack(terms).sum()

    def _term(self, fisher: LayerFisher, update: Update) -> Tensor:
        if self.top is None:
            return fisher.quadratic(update)
        return fisher.part(update, self.top, self.most).energy
