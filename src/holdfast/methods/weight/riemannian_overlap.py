"""Riemannian overlap of AlignGuard-LoRA (arXiv 2508.02079): the two parts of an update should touch different weights.

    strength · Σ_j η_j |dW_A,j · dW_T,j|,   η_j = 1 + weight · sigmoid((|dW_j| - threshold) / temperature)

over all entries j of all layers, dW_A the part of the update in the alignment Fisher's leading directions. What is
known of the paper leaves open whether the product is signed; signed, it is unbounded below, so
the default takes its absolute value. η is a weight, not a target: no gradient flows through it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ...core.registry import register
from ...core.types import Auto, State, Weights
from ...functional.collision import riemannian_overlap
from ...functional.fisher import remainder
from ...functional.lowrank import LowRank, Update
from .fisher_method import LeadingMethod


@register("riemannian_overlap")
@dataclass(frozen=True, kw_only=True)
class RiemannianOverlap(LeadingMethod):
    """Penalise entries of the update that both its alignment and its task part use.

    Attributes:
        strength: 0.1, for `reduction="sum"` (a mean is smaller by the size of a layer: 1e4 in our lab's).
        weight: b: how much more an entry counts that is large; 4 and 5 in re-implementations.
        threshold: tau; 0.01 in all re-implementations; None: the `quantile` of |dW| in each layer, which makes η vary.
        quantile: of |dW|, with `threshold=None`.
        temperature: T of the sigmoid; at 1, as in re-implementations, η is constant to 0.4 %, since |dW| is 1e-4 to
            1e-2; None: the spread of |dW|.
        reduction: `sum` over entries, or `mean` over the entries of each layer.
        signed: without the absolute value, as one re-implementation has it: unbounded below, for comparisons only.

    >>> RiemannianOverlap(threshold=None).quantile
    0.5
    """

    strength: float | Auto = 0.1
    weight: float = 4.0
    threshold: float | None = 0.01
    quantile: float = 0.5
    temperature: float | None = 1.0
    reduction: Literal["sum", "mean"] = "sum"
    signed: bool = False

    def faults(self) -> Iterator[str]:
        yield from super().faults()
        if self.weight < 0:
            yield f"weight must be >= 0, got {self.weight}"
        if not 0 < self.quantile < 1:
            yield f"quantile must be in (0, 1), got {self.quantile}"
        if self.temperature is not None and not self.temperature > 0:
            yield f"temperature must be > 0 or None, got {self.temperature}"
        if self.reduction not in ("sum", "mean"):
            yield f"reduction must be one of sum, mean, got {self.reduction!r}"

    def penalty(self, state: State, weights: Weights) -> Tensor:
        parts = self.parts(state, weights)
        terms = [self._overlap(part.update, remainder(update, part)[0]) for _, update, part in parts]
        return self.strength / self.sets(state) * torch.stack(terms).sum()

    def _overlap(self, part: LowRank, rest: Update) -> Tensor:
        return riemannian_overlap(
            part,
            rest,
            weight=self.weight,
            threshold=self.threshold,
            quantile=self.quantile,
            temperature=self.temperature,
            reduction=self.reduction,
            signed=self.signed,
        )
