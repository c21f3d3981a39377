"""Target-Masked KL (Xu, Garg, Saratchandran & Lucey, "Mask the Target", arXiv 2605.29498).

    q~(c) = p_base(c) / (1 - p_base(y)),   p~(c) = p_student(c) / (1 - p_student(y)),   c != y
    L = CE + strength · (1/N) Σ_t (1 - p_base,t(y_t))^gamma · KL(q~_t || p~_t)

The true token is taken out of both distributions, so the pull to the base never fights the task: the gradient on the
target's logit is exactly 0. gamma = 0 is the paper's loss; gamma = 1 is the weighted term of the decomposition of the
full KL. Where we differ: N counts all supervised tokens of the optimizer step, where the paper divides each
micro-batch by the tokens that its threshold tau keeps (`exclusion=1e-4, normalise="kept"` is the paper's form), and
the masked log-sum-exp is summed directly, so tau and the paper's clamp are not needed. Next: `full_kl`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ...core.errors import NeverSupported
from ...core.registry import register
from ...core.types import Outputs, State
from ...functional.divergence import Divergence
from .divergence_method import DivergenceMethod


@register("target_masked_kl")
@dataclass(frozen=True, kw_only=True)
class TargetMaskedKL(DivergenceMethod):
    """Hold what the student would say instead of the target to what the base would have said.

    Attributes:
        strength: 1.0, the paper's value for every adapter and scale; it asks for 1 to 5 on longer runs.
        gamma: exponent of the position weight (1 - p_base(y)); 0 is the paper's choice.
        exclusion: tau: drop tokens with p_base(y) > 1 - tau. None by default; the paper's value is 1e-4.
        normalise: `supervised` divides by all supervised tokens of the step; `kept`, the paper's, by those left
            after exclusion, which is only known per micro-batch and so is refused when a step has several.

    Raises:
        ConfigError: with all faults at once.

    >>> TargetMaskedKL(positions="all").gamma
    0.0
    """

    gamma: float = 0.0
    exclusion: float | None = None
    normalise: Literal["supervised", "kept"] = "supervised"

    def faults(self) -> Iterator[str]:
        yield from super().faults()
        if not isinstance(self.gamma, int | float) or not 0 <= self.gamma <= 10:
            yield f"gamma must lie in [0, 10], got {self.gamma!r}"
        if self.exclusion is not None and not (isinstance(self.exclusion, float) and 0 < self.exclusion < 1):
            yield f"exclusion must lie in (0, 1) or be None, got {self.exclusion!r}"
        if self.normalise not in ("supervised", "kept"):
            yield f"normalise must be supervised or kept, got {self.normalise!r}"
        if self.normalise == "kept" and self.reference_share != 1:
            yield "normalise='kept' divides by tokens that only the base knows: it needs reference_share=1"

    def divergence(self) -> Divergence:
        return Divergence(mask="target", gamma=self.gamma, direction=self.direction, exclusion=self.exclusion)

    def statistic(self) -> Divergence | None:
        return self.divergence() if self.normalise == "supervised" else None

    def loss(self, state: State, outputs: Outputs) -> Tensor:
        if self.normalise == "supervised":
            return super().loss(state, outputs)
        here = int(outputs.supervision.mask(self.positions).sum())
        if here != outputs.counts.over(self.positions):
            raise NeverSupported(
                "TargetMaskedKL(normalise='kept') divides by the tokens that `exclusion` keeps, which only the "
                "reference knows: with several micro-batches or processes in a step it would depend on the split. Use "
                "normalise='supervised', or one batch per optimizer step."
            )
        mean = self.total(outputs, "mean_kept") * outputs.host_factor
        outputs.log("divergence", mean)
        return self.strength * mean
