"""Parts the loss of one pass for its two readers, and joins the gradients that they send back.

    L = Σ_t CE_t + ρ Σ_t D_t   →   the host's CE, the method's Σ_t D_t;    dL/d(CE_t) = c for all t,  dL/d(Σ D) = ρ c

The gradient of L was finished in the pass, so what comes back must be c times (1, ρ): the host must weigh every token
by the same c, and the method's sum by ρ c. That is what is checked in every backward pass. Read next: `one_pass`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..core.errors import WrongSetup
from ..core.types import IGNORED
from ..functional.linear_divergence import CrossEntropyWithDivergence
from .headless import Rows

APART = 1e-3  # how far weights may be from what was supposed, as a share


def summed(
    found: CrossEntropyWithDivergence, labels: Tensor, ratio: float, *, waits: bool = True
) -> tuple[Tensor, Tensor]:
    """Return −log p and the divergence, each summed, for a host that reads nothing else.

    Args:
        found: of one pass.
        labels: [B, T], `IGNORED` where a token is not asked for.
        ratio: ρ.
        waits: whether the check waits for the device, and can then say what is wrong; else it stops the device.
    """
    mask = labels[:, 1:] != IGNORED
    nll, total = _Parts.apply(found.loss, found.cross_entropy, found.divergence, mask, ratio, waits)
    return nll, total


def by_position(
    found: CrossEntropyWithDivergence, labels: Tensor, ratio: float, *, waits: bool = True
) -> tuple[Rows, Tensor]:
    """Return what TRL reads of every position, and the divergence summed; `found` has statistics, the rest as above."""
    assert found.statistics is not None  # asked for
    values, entropy, top1 = found.statistics
    mask = labels[:, 1:] != IGNORED
    losses, total = _Parts.apply(found.loss, values, found.divergence, mask, ratio, waits)
    return Rows(-losses, entropy, top1, mask), total


class _Parts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, loss: Tensor, values: Tensor, divergence: Tensor, mask: Tensor, ratio: float, waits: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.ratio, ctx.waits = ratio, waits
        ctx.save_for_backward(mask)
        return values.clone(), divergence.clone()

    @staticmethod
    def backward(ctx: Any, of_values: Tensor, of_divergence: Tensor) -> tuple[Tensor | None, ...]:
        (mask,) = ctx.saved_tensors
        asked = mask.any()  # else nothing comes of the pass, and no weight is wrong
        low, high = _range(of_values, mask)
        expected = ctx.ratio * high
        fits = (high - low <= APART * high.abs()) & ((expected - of_divergence).abs() <= APART * of_divergence.abs())
        if not ctx.waits:
            torch._assert_async(fits | ~asked, "The host weighs its tokens otherwise than one pass supposed.")
        elif not bool(fits | ~asked):
            raise WrongSetup(_otherwise(low.item(), high.item(), of_divergence.item(), expected.item()))
        return torch.where(asked, high, torch.zeros_like(high)), None, None, None, None, None


def _range(of_values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return the least and the greatest gradient of the tokens that are asked for, or twice that of their sum."""
    if not of_values.dim() or not of_values.numel():
        return of_values.sum(), of_values.sum()
    return of_values.masked_fill(~mask, math.inf).amin(), of_values.masked_fill(~mask, -math.inf).amax()


def _otherwise(low: float, high: float, of_divergence: float, expected: float) -> str:
    return (
        "The host weighs its tokens otherwise than the pass that computed its loss together with a method's supposed: "
        f"a token by {low:.3g} to {high:.3g}, the method's sum by {of_divergence:.3g} where {expected:.3g} was "
        "expected. Something between compute_loss and backward scales one of the two. Attach with one_pass=False."
    )
