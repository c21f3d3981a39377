"""L2-SP: pull every selected weight back to where it started (Li, Grandvalet & Davoine, arXiv 1802.01483).

    penalty = strength / 2 · |theta - theta_0|^2

On a fresh LoRA adapter theta_0 is the random A and the zero B, so this is a trust region around the start of the
factors, not around the base weights themselves.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ...core.method import WeightMethod
from ...core.registry import register
from ...core.types import Auto, Setup, State, Weights
from ...functional import named


@register("l2_sp")
@dataclass(frozen=True, kw_only=True)
class L2SP(WeightMethod):
    """Quadratic pull of the selected parameters to their values at the first step.

    Attributes:
        strength: 1e-2 by default, the order that the paper's grid {1e-4 .. 1} centres on.

    >>> L2SP().describe()
    'l2_sp(strength=0.01, refresh_every=None)'
    """

    strength: float | Auto = 1e-2

    def init(self, setup: Setup) -> State:
        return named.clone(setup.params)

    def state_bytes(self, parameters: int) -> int:
        return 4 * parameters

    def penalty(self, start: State, weights: Weights) -> Tensor:
        return 0.5 * self.strength * named.squared_distance(weights.params, start)
