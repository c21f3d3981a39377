"""Full KL to the base on the task's own tokens: KL(p_base || p_student) over the whole vocabulary.

Learning without Forgetting (Li & Hoiem, arXiv 1606.09282) for language models. With cross-entropy it is label
smoothing towards the base: the optimum of a token is (1 + strength · p_base(y)) / (1 + strength), so near strength 1
the task cannot win where the base is confident. Compare `target_masked_kl`, which leaves the target alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...core.registry import register
from ...core.types import Auto
from ...functional.divergence import Divergence
from .divergence_method import DivergenceMethod


@register("full_kl")
@dataclass(frozen=True, kw_only=True)
class FullKL(DivergenceMethod):
    """Hold the student's whole next-token distribution to the base's on the task batch.

    Attributes:
        strength: 0.3 by default: at 1 and above learning stalls (our lab; see docs/methods/full_kl.md).

    >>> FullKL(strength=0.5, positions="prompt").describe().startswith("full_kl(strength=0.5")
    True
    """

    strength: float | Auto = 0.3

    def divergence(self) -> Divergence:
        return Divergence(mask="none", direction=self.direction)
