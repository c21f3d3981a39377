"""The KL from a base that is not run: two numbers of the base per token, exact, at the price of a cross-entropy.

With one frozen head z = s (h Wᵀ + b) on both sides and no soft cap, the base q enters its KL only through

    e0 = E_q[W]  [hidden],    c0 = s h0·e0 − logsumexp(z0),
    KL(q ‖ p) = c0 − s h·e0 + logsumexp(z),    dKL/dh = s (E_p[W] − e0),

so whoever keeps (e0, c0) needs neither base forward nor base logits: two products per token, as many as the
cross-entropy takes, where `linear_divergence` takes three. The bias is in both log-sum-exps and nowhere else. Without
the target on both sides the same lines give the target-masked KL; its statistics then belong to that target. The other
directions need E_p of the base's log-probabilities, token by token: no statistic of q gives it, keep hidden states.

What it costs is small differences. `linear_divergence` sees h − h0 and has none to lose; here E_p[W] − e0 is a
subtraction, so in float32 the gradient is right to about 2e-6 / √KL (relative), as autograd's on float32 logits is,
and the value to about 1e-6; the rounding of the logits' product sets both. So logits are never
rounded to bfloat16 or TF32 here, and e0 is kept in float32 (the default) or float16 (2e-4 / √KL), never in bfloat16
(2e-3 / √KL); tests/functional/test_cached_divergence.py holds all of that. c0 closes over e0 *as it is stored*: a
rounding δ of e0 then costs the value only s (h − h0)·δ, and nothing at the base.

Without the target, position weights of the base's own (gamma, exclusion) are exact too: w (c0 − s h·e0 + L). Read
`linear_divergence` first; `holdfast.retain` keeps the statistics, and `cached_cross_entropy` has the two products give
the cross-entropy as well.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from holdfast.functional.divergence import Mask, reduce_sum
from holdfast.functional.products import backward_rows
from holdfast.functional.softmax_blocks import blocks, dot, exact_products, positions, wide_dtype, working_dtype

if TYPE_CHECKING:
    from holdfast.functional.head import Head
    from jaxtyping import Float, Int
    from torch import Tensor

STORABLE = (torch.float16, torch.float32, torch.float64)


class ReferenceStatistics(NamedTuple):
    """What the KL needs of the base at each position: e0 = E_q[W], and c0, in float64."""

    mean_weight: Float[Tensor, "... hidden"]
    constant: Float[Tensor, ...]


@torch.no_grad()
def reference_statistics(
    reference_hidden: Float[Tensor, "... hidden"],
    head: Head,
    targets: Int[Tensor, ...] | None = None,
    *,
    mask: Mask = "none",
    storage: torch.dtype | None = None,
    ignore_index: int = -100,
    chunk_rows: int | None = None,
) -> ReferenceStatistics:
    """Compute what `cached_kl` needs of the base: two products per token, no tokens x vocabulary tensor.

    Args:
        reference_hidden: The base's final hidden states, `[..., hidden]`.
        head: The head, the base's and the student's: it must not change as long as the statistics are used.
        targets: Target tokens `[...]`; positions with `ignore_index` get zeros. Default `None`: every position counts.
        mask: `"none"` (default) for the full KL, `"target"` for the target-masked one.
        storage: What `mean_weight` will be kept in, float16, float32 or float64. Default: float32 (float64 for
            float64 inputs).
        ignore_index: Label of positions to leave out. Default -100.
        chunk_rows: Rows whose logits exist at a time. Default as in `linear_divergence`.

    Raises:
        ValueError: For a soft cap, bfloat16 storage, numbers that float16 cannot hold, or shapes that do not fit.

    >>> from holdfast.functional.head import Head
    >>> reference_statistics(torch.tensor([[2.0, 0.0]]), Head(torch.tensor([[1.0, 3.0], [1.0, 5.0]])))
    ReferenceStatistics(mean_weight=tensor([[1., 4.]]), constant=tensor([-0.6931], dtype=torch.float64))
    """
    rows, y = positions("reference_hidden", reference_hidden, head, targets, mask, ignore_index, chunk_rows)
    flat = reference_hidden.flatten(0, -2)
    dtype = working_dtype(flat, head)
    storage = (torch.float64 if dtype is torch.float64 else torch.float32) if storage is None else storage
    if storage not in STORABLE:
        raise ValueError(
            f"Statistics cannot be kept in {storage}: at a KL of 1e-3 rounding to bfloat16 alone costs a twentieth of "
            "the gradient. Use torch.float32, or torch.float16 where half the memory is worth its error."
        )
    mean_weight = flat.new_zeros(flat.shape, dtype=storage)
    constant = flat.new_zeros(len(flat), dtype=wide_dtype(flat))
    with exact_products(flat.device):
        for block in blocks(flat, head, rows, y, dtype, chunk_rows):
            exact = block.mean_weight(head)
            stored = exact.to(storage)
            _check_range(exact, stored)
            mean_weight[rows[block.chunk]] = stored
            constant[rows[block.chunk]] = dot(block.x, stored) - block.log_total
    shape = reference_hidden.shape
    return ReferenceStatistics(mean_weight.view(shape), constant.view(shape[:-1]))


def cached_kl(
    hidden: Float[Tensor, "... hidden"],
    head: Head,
    mean_weight: Float[Tensor, "... hidden"],
    constant: Float[Tensor, ...],
    targets: Int[Tensor, ...] | None = None,
    *,
    weight: Float[Tensor, ...] | None = None,
    mask: Mask = "none",
    ignore_index: int = -100,
    chunk_rows: int | None = None,
    reduction: Literal["sum", "mean"] = "sum",
) -> Float[Tensor, ""]:
    """Compute KL(base ‖ student) from the student's hidden states and the base's statistics: no base is run.

    Args:
        hidden: The student's final hidden states, `[..., hidden]`.
        head: The frozen head that the statistics were made with.
        mean_weight: e0 of `reference_statistics`, `[..., hidden]`.
        constant: c0, `[...]`.
        targets: As in `reference_statistics`; `ignore_index` leaves a position out. Default `None`: all count.
        weight: Of each position, `[...]`, a constant: no gradient flows into it (`position_weight` of the masked base,
            for `gamma` and `exclusion`). Default `None`: 1.
        mask: As the statistics were made with.
        ignore_index: Label of positions to leave out. Default -100.
        chunk_rows: Rows whose logits exist at a time; one float32 buffer of `[chunk_rows, vocab]` is the workspace.
            Default as in `linear_divergence`.
        reduction: `"sum"` (default), or `"mean"` over the positions that count.

    Returns:
        A scalar in float32 (float64 for float64 inputs), also under autocast. It is not clamped: at the base it is 0
        up to rounding, of either sign. An empty batch gives 0, still connected to the graph. Gradients of gradients
        are refused with an error.

    Raises:
        ValueError: For a head that is trained or has a soft cap, or shapes and targets that do not fit.

    >>> from holdfast.functional.head import Head
    >>> head = Head(torch.eye(3, 2)); h = torch.tensor([[1.0, 2.5]], requires_grad=True)
    >>> statistics = reference_statistics(torch.tensor([[1.0, 2.0]]), head)
    >>> loss = cached_kl(h, head, *statistics); loss.backward(); loss, h.grad
    (tensor(0.0261, grad_fn=<ToCopyBackward0>), tensor([[-0.0738,  0.1009]]))
    """
    rows, y = positions("hidden", hidden, head, targets, mask, ignore_index, chunk_rows)
    if any(part is not None and part.requires_grad for part in (head.weight, head.bias)):
        raise ValueError(
            "The head is trained, so the base's statistics, taken with the head as it was, no longer give the KL. "
            "Freeze it, or keep the base's hidden states: linear_divergence(..., reference_head=the original)."
        )
    if mean_weight.shape != hidden.shape or constant.shape != hidden.shape[:-1]:
        raise ValueError(
            f"Every position needs its statistics, but hidden has shape {list(hidden.shape)}, mean_weight "
            f"{list(mean_weight.shape)} and constant {list(constant.shape)}. Make them from the same positions."
        )
    if weight is not None and weight.shape != hidden.shape[:-1]:
        raise ValueError(
            f"Every position needs its weight, but weight has shape {list(weight.shape)}, not one of each."
        )
    flat = None if weight is None else weight.flatten()
    statistics = mean_weight.flatten(0, -2), constant.flatten(), flat
    work = _Work(head, *statistics, rows, y, chunk_rows, torch.is_grad_enabled())
    total: Tensor = _CachedKL.apply(hidden.flatten(0, -2), work)  # type: ignore[no-untyped-call]
    return reduce_sum(total, len(rows), rows.new_tensor(len(rows)), reduction).to(working_dtype(hidden, head))


class _Work(NamedTuple):
    head: Head
    mean_weight: Float[Tensor, "positions hidden"]
    constant: Float[Tensor, " positions"]
    weight: Float[Tensor, " positions"] | None
    rows: Int[Tensor, " supervised"]
    y: Int[Tensor, "supervised 1"] | None
    chunk_rows: int | None
    grad: bool  # grad mode of the caller: inside a Function it is always off


class _CachedKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, work: _Work) -> Tensor:
        head, rows, dtype = work.head, work.rows, working_dtype(hidden, work.head)
        needed = work.grad and ctx.needs_input_grad[0]
        d_hidden = hidden.new_empty((len(rows), hidden.shape[1]), dtype=dtype) if needed else None
        total = hidden.new_zeros((), dtype=wide_dtype(hidden))
        with exact_products(hidden.device):
            for block in blocks(hidden, head, rows, work.y, dtype, work.chunk_rows):
                here = rows[block.chunk]
                e0, c0 = work.mean_weight[here], work.constant[here]
                values = c0 - dot(block.x, e0) + block.log_total
                w = None if work.weight is None else work.weight[here].to(values.dtype)
                total += values.sum() if w is None else (w * values).sum()
                if d_hidden is not None:
                    change = block.mean_weight(head).sub_(e0.to(dtype)).mul_(head.scale)
                    d_hidden[block.chunk] = change if w is None else change.mul_(w.to(dtype)[:, None])
        ctx.save_for_backward(rows, d_hidden)
        ctx.like = hidden.shape, hidden.dtype
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
        if torch.is_grad_enabled():  # create_graph=True; torch's once_differentiable would let a wrong 0 through
            raise RuntimeError(
                "cached_kl has no second derivative: its gradient is finished in the forward pass. "
                "Do without create_graph=True, or use logit_divergence on head.logits(hidden)."
            )
        rows, d_hidden = ctx.saved_tensors
        shape, dtype = ctx.like
        if d_hidden is None:
            return None, None
        return backward_rows(d_hidden, grad, rows, shape, dtype), None


def _check_range(exact: Tensor, stored: Tensor) -> None:
    """Raise if storing lost more than float16's rounding: entries beyond 65504, or all of them below 6e-5."""
    if stored.dtype is torch.float16 and len(exact):
        lost = (exact - stored.to(exact.dtype)).norm(dim=1) / exact.norm(dim=1).clamp(min=torch.finfo(exact.dtype).tiny)
        if not bool((lost < 1e-3).all()):
            raise ValueError(
                "The head's mean weights do not fit float16 (entries from "
                f"{exact.abs().min().item():.1g} to {exact.abs().max().item():.1g}). Use storage=torch.float32."
            )
