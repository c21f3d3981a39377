"""How far the student's next-token distribution has moved from the base's, on logits: the readable form.

    target-masked:  w · D(q~, p~),   q~ = softmax(b without y),   p~ = softmax(z without y),   w = (1 − p_base(y))^γ

b and z are the base's and the student's logits, y is the token the cross-entropy teaches. Removing y from both sides
and renormalising leaves its logit free to learn and holds every other preference (arXiv 2605.29498; the same quantity
is the non-target part of decoupled knowledge distillation, arXiv 2203.08679, at temperature 1). The full KL is its
neighbour in one family, since

    KL(p_base ‖ p) = KL of (y or not y) + (1 − p_base(y)) · KL(q~ ‖ p~),

so γ = 1 is the last term of the full KL and γ = 0 drops its weight. Read `linear_divergence` next: the same values
from hidden states, without ever holding tokens x vocabulary. This module is what that one is tested against.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

Mask = Literal["target", "none"]
Direction = Literal["forward", "reverse", "js"]
Reduction = Literal["sum", "mean", "mean_kept", "none"]

# Finite on purpose: with -inf on both sides a difference of log-probabilities is NaN. exp() of it is exactly 0.
FLOOR = -1e30


@dataclass(frozen=True)
class Divergence:
    """One member of the family: which tokens are compared, in which direction, with which weight per position.

    Args:
        mask: `"target"` removes the target token from both distributions and renormalises them; `"none"` compares
            the full distributions. Default `"target"` (arXiv 2605.29498).
        gamma: Exponent of the position weight `(1 - p_base(y)) ** gamma`, at least 0. Default 0, no weight, as in the
            paper; 1 gives the third term of the full KL. The weight is a constant: no gradient flows through it.
        direction: `"forward"` is KL(base ‖ student), the paper's choice; `"reverse"` is KL(student ‖ base); `"js"` is
            the Jensen-Shannon divergence, whose curvature is a quarter of the others': compare at a larger strength.
        exclusion: The paper's τ: positions where the base gives the target more than `1 - exclusion` are dropped. The
            paper needs it (1e-4) against its own rounding; the form here is stable without. Default `None`, keep all.

    Raises:
        ValueError: If a field is out of its range; all faults in one message.

    >>> Divergence(mask="none")
    Divergence(mask='none', gamma=0.0, direction='forward', exclusion=None)
    """

    mask: Mask = "target"
    gamma: float = 0.0
    direction: Direction = "forward"
    exclusion: float | None = None

    def __post_init__(self) -> None:
        faults = []
        if self.mask not in get_args(Mask):
            faults.append(f"mask must be one of {list(get_args(Mask))}, got {self.mask!r}")
        if self.direction not in get_args(Direction):
            faults.append(f"direction must be one of {list(get_args(Direction))}, got {self.direction!r}")
        if not (math.isfinite(self.gamma) and self.gamma >= 0):
            faults.append(f"gamma must be finite and at least 0, got {self.gamma}")
        if self.exclusion is not None and not 0 < self.exclusion < 1:
            faults.append(
                f"exclusion must lie between 0 and 1, or be None to keep every position, got {self.exclusion}"
            )
        if faults:
            raise ValueError("Divergence: " + "; ".join(faults) + ".")


def logit_divergence(
    logits: Float[Tensor, "... vocab"],
    reference_logits: Float[Tensor, "... vocab"],
    targets: Int[Tensor, ...],
    divergence: Divergence,
    *,
    ignore_index: int = -100,
    reduction: Reduction = "sum",
) -> Tensor:
    """Compute any member of the family from logits, by plain autograd.

    Logits below float32 are widened first, which cannot undo the rounding they already carry: at a KL of 1e-3, logits
    stored in bfloat16 have lost most of the gradient. Use `linear_divergence` there.

    Args:
        logits: The student's logits, shape `[..., vocab]`, already aligned with `targets` (position t predicts
            `targets[t]`; nothing is shifted here).
        reference_logits: The base's logits, same shape; no gradient flows into them.
        targets: Target tokens, shape `[...]`; `ignore_index` marks positions to leave out.
        divergence: The member of the family.
        ignore_index: Label of unsupervised positions. Default -100, as in `torch.nn.functional.cross_entropy`.
        reduction: `"sum"` (default: hosts divide by their own count), `"mean"` over supervised positions,
            `"mean_kept"` over those that `exclusion` keeps (the paper's |M'|), or `"none"`, shape `[...]`, 0 where
            ignored. A mean over no position is 0.

    Returns:
        A scalar, or `[...]` for `"none"`, in float32 (float64 for float64 logits).

    Raises:
        ValueError: If shapes or targets do not fit.

    >>> b, z = torch.tensor([[0.0, 0.0, 5.0]]), torch.tensor([[2.0, 2.0, 9.0]])
    >>> logit_divergence(z, b, torch.tensor([2]), Divergence())  # both are even over the two tokens that are not y
    tensor(0.)
    """
    check_shapes(logits, reference_logits, targets)
    supervised = targets != ignore_index
    y = targets[supervised].unsqueeze(-1)
    check_targets(y, logits.shape[-1], ignore_index)
    dtype = torch.promote_types(torch.promote_types(logits.dtype, reference_logits.dtype), torch.float32)
    z, b = logits[supervised].to(dtype), reference_logits.detach()[supervised].to(dtype)

    log_miss = log_miss_probability(b, y)
    if divergence.mask == "target":
        z, b = z.scatter(-1, y, FLOOR), b.scatter(-1, y, FLOOR)
    log_p, log_q = z.log_softmax(-1), b.log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    if divergence.direction == "forward":
        values = (q * (log_q - log_p)).sum(-1)
    elif divergence.direction == "reverse":
        values = (p * (log_p - log_q)).sum(-1)
    else:
        # log m/p with m = (p + q)/2, from the ratio: exactly 0 where p = q
        u = log_q - log_p
        log_m_p = torch.logaddexp(u, torch.zeros_like(u)) - math.log(2)
        values = 0.5 * (q * (u - log_m_p) - p * log_m_p).sum(-1)

    weight, kept = position_weight(log_miss, divergence)
    values = weight * values
    if reduction == "none":
        every: Tensor = values.new_zeros(targets.shape)
        return every.masked_scatter(supervised, values)
    return reduce_sum(values.sum(), values.numel(), kept.sum(), reduction)


def target_masked_kl(
    logits: Float[Tensor, "... vocab"],
    reference_logits: Float[Tensor, "... vocab"],
    targets: Int[Tensor, ...],
    *,
    gamma: float = 0.0,
    direction: Direction = "forward",
    exclusion: float | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "sum",
) -> Tensor:
    """Compute the target-masked KL, `Σ_t (1 − p_base(y))^γ KL(q~_t ‖ p~_t)`, from logits (arXiv 2605.29498, section 3).

    Arguments, defaults and errors are those of `Divergence` and `logit_divergence`.

    >>> b, z = torch.tensor([[0.0, 0.0, 0.0]]), torch.tensor([[1.0, 0.0, 7.0]])
    >>> target_masked_kl(z, b, torch.tensor([2]))
    tensor(0.1201)
    """
    member = Divergence("target", gamma, direction, exclusion)
    return logit_divergence(logits, reference_logits, targets, member, ignore_index=ignore_index, reduction=reduction)


def full_kl(
    logits: Float[Tensor, "... vocab"],
    reference_logits: Float[Tensor, "... vocab"],
    targets: Int[Tensor, ...],
    *,
    gamma: float = 0.0,
    direction: Direction = "forward",
    exclusion: float | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "sum",
) -> Tensor:
    """Compute the KL between the full distributions, target included, from logits (Li and Hoiem, arXiv 1606.09282).

    Arguments, defaults and errors are those of `Divergence` and `logit_divergence`; the targets only say which
    positions count (and set the weight, where `gamma` or `exclusion` ask for one).

    >>> b, z = torch.zeros(1, 2), torch.tensor([[0.0, 1.0]])
    >>> full_kl(z, b, torch.tensor([0]))
    tensor(0.1201)
    """
    member = Divergence("none", gamma, direction, exclusion)
    return logit_divergence(logits, reference_logits, targets, member, ignore_index=ignore_index, reduction=reduction)


def log_miss_probability(logits: Float[Tensor, "rows vocab"], y: Int[Tensor, "rows 1"]) -> Tensor:
    """Return log(1 − softmax(logits)[y]) per row, `[rows]`, without forming 1 − p, which is 0 or noise for p near 1.

    The log-sum-exp goes over the other tokens first and the target joins afterwards: adding is stable.

    >>> log_miss_probability(torch.tensor([[40.0, 0.0]]), torch.tensor([[0]]))
    tensor([-40.])
    """
    others = logits.scatter(-1, y, FLOOR).logsumexp(-1)
    return F.logsigmoid(others - logits.gather(-1, y).squeeze(-1))


def position_weight(log_miss: Tensor, divergence: Divergence) -> tuple[Tensor, Tensor]:
    """Return the weight `(1 − p_base(y))^γ`, 0 where `exclusion` drops the position, and the mask of kept positions."""
    kept = torch.ones_like(log_miss, dtype=torch.bool)
    if divergence.exclusion is not None:
        kept = log_miss >= math.log(divergence.exclusion)
    weight = (divergence.gamma * log_miss).exp() if divergence.gamma else torch.ones_like(log_miss)
    return weight * kept, kept


def reduce_sum(total: Tensor, supervised: int | Tensor, kept: Tensor, reduction: Reduction) -> Tensor:
    """Divide a sum over positions by the count that `reduction` names, or by 1 where that count is 0."""
    if reduction == "sum":
        return total
    if reduction == "mean":
        return total / (max(supervised, 1) if isinstance(supervised, int) else supervised.clamp(min=1))
    if reduction == "mean_kept":
        return total / kept.clamp(min=1)
    raise ValueError(
        f"Unknown reduction {reduction!r}: use 'sum', 'mean' or 'mean_kept' ('none' works on logits only)."
    )


def check_shapes(logits: Tensor, reference_logits: Tensor, targets: Tensor) -> None:
    """Raise unless logits agree with each other and with the targets, saying which of the two went wrong."""
    if logits.shape != reference_logits.shape:
        raise ValueError(
            f"Student and reference must score the same tokens, but logits have shape {list(logits.shape)} and "
            f"reference_logits {list(reference_logits.shape)}. Run the reference on the student's own batch, with one "
            "vocabulary."
        )
    if logits.shape[:-1] != targets.shape:
        raise ValueError(
            f"Every position needs one target, but logits have shape {list(logits.shape)} and targets "
            f"{list(targets.shape)}. Pass targets of shape {list(logits.shape[:-1])}, already shifted by one."
        )


def check_targets(targets: Tensor, vocab: int, ignore_index: int) -> None:
    """Raise unless every (kept) target is a token of a vocabulary of at least two."""
    if vocab < 2:
        raise ValueError(f"A divergence needs at least two tokens to compare, but the vocabulary has {vocab}.")
    if targets.numel() and (targets.min() < 0 or targets.max() >= vocab):
        raise ValueError(
            f"Targets must be token numbers below {vocab}, but they run from {int(targets.min())} to "
            f"{int(targets.max())}. Mark positions to leave out with ignore_index ({ignore_index})."
        )
