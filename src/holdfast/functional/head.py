"""The output head: the last linear map of a language model, with the scale and the soft cap some families add.

    logits(h) = c · tanh(s · (h Wᵀ + b) / c)

The scale s is Cohere's and Granite's; the soft cap c is Gemma 2's (Gemma Team, 2024, arXiv 2408.00118). A loss on
logits must see both, so the head carries them and `holdfast.functional.linear_divergence` differentiates through them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Head:
    """Map final hidden states to logits: `soft_cap * tanh(scale * (hidden @ weight.T + bias) / soft_cap)`.

    Args:
        weight: Head weight, shape `[vocab, hidden]`; often tied to the input embedding.
        bias: Head bias, shape `[vocab]`. Default `None`, as in every recent open-weight family.
        scale: Factor on the logits (`logit_scale` of Cohere, `1 / logits_scaling` of Granite). Default 1.
        soft_cap: Bound on the size of a logit (`final_logit_softcapping` of Gemma 2: 30). Default `None`, no bound.

    Raises:
        ValueError: For shapes, dtypes or numbers that make no head; all faults in one message.

    >>> head = Head(torch.eye(3, 2), scale=0.5)
    >>> head.logits(torch.tensor([[2.0, 4.0]]))
    tensor([[1., 2., 0.]])
    """

    weight: Float[Tensor, "vocab hidden"]
    bias: Float[Tensor, " vocab"] | None = None
    scale: float = 1.0
    soft_cap: float | None = None

    def __post_init__(self) -> None:
        faults = []
        if self.weight.dim() != 2 or not self.weight.is_floating_point():
            faults.append(
                f"weight must be a floating-point matrix [vocab, hidden], got {self.weight.dtype} of shape "
                f"{list(self.weight.shape)} (dequantise a quantised head first)"
            )
        elif self.bias is not None and tuple(self.bias.shape) != (self.weight.shape[0],):
            faults.append(f"bias must have shape [{self.weight.shape[0]}], got {list(self.bias.shape)}")
        if not math.isfinite(self.scale) or self.scale == 0:
            faults.append(f"scale must be finite and not 0, got {self.scale}")
        if self.soft_cap is not None and not (math.isfinite(self.soft_cap) and self.soft_cap > 0):
            faults.append(f"soft_cap must be positive and finite, or None, got {self.soft_cap}")
        if faults:
            raise ValueError("Head: " + "; ".join(faults) + ".")

    def logits(self, hidden: Float[Tensor, "... hidden"]) -> Float[Tensor, "... vocab"]:
        """Return the logits of `hidden` `[..., hidden]` as `[..., vocab]`, in the model's dtype, by plain autograd."""
        logits = F.linear(hidden, self.weight, self.bias) * self.scale
        return logits if self.soft_cap is None else self.soft_cap * torch.tanh(logits / self.soft_cap)

    def same_as(self, other: Head) -> bool:
        """Say whether `other` is this very head: the same tensors (not equal copies), scale and soft cap."""
        return (
            self.weight is other.weight
            and self.bias is other.bias
            and self.scale == other.scale
            and self.soft_cap == other.soft_cap
        )
