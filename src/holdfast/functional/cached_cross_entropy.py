"""The cross-entropy and the KL to a base that is not run, from the same two products with the head.

    target masked   dh = s [(m + ρ w) E_p~[W] − ρ w e0 − m W_y],    m = 1 − p_y = sigmoid(L − z_y)
    full            dh = s [(1 + ρ w) E_p[W]  − ρ w e0 −   W_y]

p~ is the student without its target y, L the log-sum-exp that goes with it; e0 and c0 are what `cached_divergence`
keeps of the base. The target's logit is one row of the head, so nothing but E[W] takes a product, and the pair costs
what the cross-entropy alone does. What hosts log comes along: entropy is L − E[z], with and without the target.
Read `cached_divergence` first; `holdfast.integrations.one_pass` hands it to a trainer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from holdfast.functional.chunked import Statistics
from holdfast.functional.divergence import Mask
from holdfast.functional.linear_divergence import CrossEntropyWithDivergence
from holdfast.functional.softmax_blocks import Block, blocks, dot, exact_products, positions, wide_dtype, working_dtype

if TYPE_CHECKING:
    from holdfast.functional.head import Head
    from jaxtyping import Float, Int
    from torch import Tensor


def cross_entropy_with_cached_kl(
    hidden: Float[Tensor, "rows hidden"],
    head: Head,
    mean_weight: Float[Tensor, "rows hidden"],
    constant: Float[Tensor, " rows"],
    targets: Int[Tensor, " rows"],
    strength: float = 1.0,
    *,
    weight: Float[Tensor, " rows"] | None = None,
    mask: Mask = "target",
    chunk_rows: int | None = None,
) -> CrossEntropyWithDivergence:
    """Compute Σ cross-entropy + strength · Σ KL(base ‖ student) of supervised rows, in two products.

    Args:
        hidden: The student's final hidden states, `[rows, hidden]`.
        head: The frozen head that the statistics were made with.
        mean_weight: e0 of `reference_statistics`, `[rows, hidden]`.
        constant: c0, `[rows]`.
        targets: The target token of each row.
        strength: Of the KL. Default 1.
        weight: As in `cached_kl`.
        mask: As the statistics were made with. Default `"target"`.
        chunk_rows: As in `cached_kl`.

    Returns:
        Sums over the rows in float32 (float64 for float64 inputs), of which `loss` has the gradient, and the
        statistics of each row.

    Raises:
        ValueError: As `cached_kl`.

    >>> from holdfast.functional.head import Head
    >>> from holdfast.functional.cached_divergence import reference_statistics
    >>> h, y, head = torch.zeros(1, 2), torch.tensor([3]), Head(torch.eye(4, 2))
    >>> kept = reference_statistics(h, head, y, mask="target")
    >>> cross_entropy_with_cached_kl(h, head, *kept, y).loss
    tensor(1.3863)
    """
    rows, _ = positions("hidden", hidden, head, targets, mask, -100, chunk_rows)
    if any(part is not None and part.requires_grad for part in (head.weight, head.bias)):
        raise ValueError("The head is trained, so the base's statistics no longer give the KL: see `cached_kl`.")
    sizes = {len(each) for each in (mean_weight, constant, targets, rows) if each is not None}
    if len(sizes) != 1 or (weight is not None and len(weight) != len(rows)):
        raise ValueError(f"Every row needs its statistics, target and weight, but there are {sorted(sizes)} of them.")
    work = _Work(head, mean_weight, constant, weight, targets[:, None], strength, mask, chunk_rows)
    outputs = _Together.apply(hidden, work, torch.is_grad_enabled())  # type: ignore[no-untyped-call]
    loss, nll, kl, *of_rows = outputs
    return CrossEntropyWithDivergence(loss, nll, kl, Statistics(*of_rows))


class _Work(NamedTuple):
    head: Head
    mean_weight: Float[Tensor, "rows hidden"]
    constant: Float[Tensor, " rows"]
    weight: Float[Tensor, " rows"] | None
    y: Int[Tensor, "rows 1"]
    strength: float
    mask: Mask
    chunk_rows: int | None


class _OfRows(NamedTuple):
    nll: Tensor
    kl: Tensor
    entropy: Tensor
    top1: Tensor


class _Together(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, work: _Work, grad: bool) -> tuple[Tensor, ...]:
        head, dtype = work.head, working_dtype(hidden, work.head)
        d_hidden = torch.empty_like(hidden, dtype=dtype) if grad and ctx.needs_input_grad[0] else None
        every = torch.arange(len(hidden), device=hidden.device)
        found = list[_OfRows]()
        with exact_products(hidden.device):
            masked = work.y if work.mask == "target" else None
            for block in blocks(hidden, head, every, masked, dtype, work.chunk_rows):
                mean = block.mean_weight(head)
                values, miss, strength = _values(block, mean, work)
                found.append(values)
                if d_hidden is not None:
                    e0, target = work.mean_weight[block.chunk], head.weight[work.y[block.chunk, 0]]
                    change = (miss + strength)[:, None] * mean - strength[:, None] * e0 - miss[:, None] * target
                    d_hidden[block.chunk] = change.to(dtype) * head.scale
        ctx.save_for_backward(d_hidden)
        ctx.dtype = hidden.dtype
        nll, kl, entropy, top1 = (torch.cat(part) for part in zip(*found, strict=True)) if found else _none(hidden)
        outputs = (nll.sum() + work.strength * kl.sum(), nll.sum(), kl.sum(), nll, entropy)
        loss, *rest = (each.to(dtype) for each in outputs)
        ctx.mark_non_differentiable(*rest, top1)
        return loss, *rest, top1

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, None, None]:
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError("cross_entropy_with_cached_kl has no second derivative: do without create_graph=True.")
        (d_hidden,) = ctx.saved_tensors
        return None if d_hidden is None else (d_hidden * grad.to(d_hidden.dtype)).to(ctx.dtype), None, None


def _values(block: Block, mean: Tensor, work: _Work) -> tuple[_OfRows, Tensor, Tensor]:
    """Return what is to be known of a block's rows, m, and ρ w: what the gradient's three terms weigh."""
    head, y = work.head, work.y[block.chunk]
    z_y, expected = dot(block.x, head.weight[y[:, 0]]), dot(block.x, mean)
    if head.bias is not None:
        z_y = z_y + head.scale * head.bias[y[:, 0]].to(z_y.dtype)
        of_bias = block.exponentials @ head.bias.to(block.exponentials.dtype)[:, None] / block.total
        expected = expected + head.scale * of_bias[:, 0].to(z_y.dtype)
    log_total = block.log_total
    kl = work.constant[block.chunk] - dot(block.x, work.mean_weight[block.chunk]) + log_total
    weight = torch.ones_like(kl) if work.weight is None else work.weight[block.chunk].to(kl.dtype)
    if work.mask == "target":
        log_hit, log_miss = F.logsigmoid(z_y - log_total), F.logsigmoid(log_total - z_y)
        miss = log_miss.exp()
        entropy = miss * (log_total - expected - log_miss) - log_hit.exp() * log_hit
        top1 = z_y >= log_total - block.total[:, 0].to(z_y.dtype).log()
        values = _OfRows(-log_hit, weight * kl, entropy, top1)
    else:
        miss = torch.ones_like(kl)
        top1 = block.exponentials.gather(1, y)[:, 0] >= 1  # the largest of them is exp(0)
        values = _OfRows((log_total - z_y).clamp(min=0), weight * kl, log_total - expected, top1)
    dtype = block.x.dtype
    return values, miss.to(dtype), (work.strength * weight).to(dtype)


def _none(hidden: Tensor) -> _OfRows:
    nothing = hidden.new_zeros(0, dtype=wide_dtype(hidden))
    return _OfRows(nothing, nothing, nothing, nothing.bool())
