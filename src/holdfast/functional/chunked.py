"""The engine behind `linear_divergence`: logits a chunk of rows at a time, gradients finished on the way.

    for each chunk:  logits = head(rows);  (value, g) = closed_form(logits);  dh = s·g W;  dW += s·gᵀ h

Ignored rows are dropped first. The gradient on the hidden states is complete when the forward pass ends, so nothing of
size tokens x vocabulary is ever kept, and the backward pass only scales it. A frozen head costs no weight gradient.
The idea is Liger's (arXiv 2410.10989); `closed_form` holds the mathematics, `products` the matrix products.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from holdfast.functional.closed_form import Rows, divergence_rows_, likelihood_rows_, rows_at_once
from holdfast.functional.divergence import check_targets
from holdfast.functional.products import backward_rows, multiplies_bfloat16, rows_of_chunk, to_hidden, to_logits

if TYPE_CHECKING:
    from holdfast.functional.divergence import Divergence
    from holdfast.functional.head import Head
    from jaxtyping import Bool, Float, Int
    from torch import Tensor


@dataclass(frozen=True)
class Objective:
    """What is summed over rows: `strength * divergence + cross_entropy * (−log p(y))`; `None` is no divergence."""

    divergence: Divergence | None
    strength: float = 1.0
    cross_entropy: float = 0.0


class Statistics(NamedTuple):
    """What hosts log of the student at each position, 0 where it is ignored; without gradient."""

    cross_entropy: Float[Tensor, ...]
    entropy: Float[Tensor, ...]
    top1: Bool[Tensor, ...]


class Sums(NamedTuple):
    """Sums over the supervised rows. Only `total` has a gradient; the counts are for reductions."""

    total: Float[Tensor, ""]
    divergence: Float[Tensor, ""]
    cross_entropy: Float[Tensor, ""]
    kept: Int[Tensor, ""]
    supervised: int | Int[Tensor, ""]  # a tensor where nothing is to return to the host
    statistics: Statistics | None = None


def chunked_sums(
    hidden: Float[Tensor, "... hidden"],
    reference_hidden: Float[Tensor, "... reference_hidden"] | None,
    head: Head,
    targets: Int[Tensor, ...],
    objective: Objective,
    *,
    reference_head: Head | None,
    ignore_index: int,
    chunk_rows: int | None,
    statistics: bool = False,
) -> Sums:
    """Check what was given, flatten it, drop unsupervised rows and run the chunks.

    `statistics` asks for those of each position too, from the same chunks; they need a cross-entropy in the objective.

    Raises:
        ValueError: If shapes, targets or `chunk_rows` do not fit.
    """
    reference_head = head if reference_head is None else reference_head
    check_hidden("hidden", hidden, head, targets)
    if reference_hidden is not None:
        check_hidden("reference_hidden", reference_hidden, reference_head, targets)
        reference_hidden = reference_hidden.detach().flatten(0, -2)
        if reference_head.weight.shape[0] != head.weight.shape[0]:
            raise ValueError(
                f"Both heads must score the same vocabulary, but head has {head.weight.shape[0]} tokens and "
                f"reference_head {reference_head.weight.shape[0]}. Resize the reference's head like the student's."
            )
    if chunk_rows is None:
        chunk_rows = rows_of_chunk(head.weight.shape[0], on_cpu=hidden.device.type == "cpu")
    if chunk_rows < 1:
        raise ValueError(f"chunk_rows must be at least 1, got {chunk_rows}.")
    flat = targets.flatten()
    rows = (flat != ignore_index).nonzero().squeeze(1)
    y = flat[rows].unsqueeze(1)
    check_targets(y, head.weight.shape[0], ignore_index)
    work = _Work(head, reference_head, objective, rows, y, chunk_rows, torch.is_grad_enabled(), statistics)
    total, divergence, nll, kept, *of_rows = _ChunkedLoss.apply(  # type: ignore[no-untyped-call]
        hidden.flatten(0, -2), head.weight, head.bias, reference_hidden, work
    )
    found = [each.new_zeros(flat.shape).index_copy_(0, rows, each).view(targets.shape) for each in of_rows]
    return Sums(total, divergence, nll, kept, len(rows), Statistics(*found) if found else None)


class _Work(NamedTuple):
    head: Head
    reference_head: Head
    objective: Objective
    rows: Int[Tensor, " supervised"]
    y: Int[Tensor, "supervised 1"]
    chunk_rows: int
    grad: bool  # grad mode of the caller: inside a Function it is always off
    statistics: bool


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        reference: Tensor | None,
        work: _Work,
    ) -> tuple[Tensor, ...]:
        dtype = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
        needs = [work.grad and needed for needed in ctx.needs_input_grad[:3]]
        count, scale = len(work.rows), work.head.scale
        d_hidden = hidden.new_zeros((count, hidden.shape[1]), dtype=dtype) if needs[0] else None
        d_weight = torch.zeros_like(weight, dtype=dtype) if needs[1] else None
        d_bias = torch.zeros_like(weight[:, 0], dtype=dtype) if needs[2] else None
        sums, kept, found = hidden.new_zeros(2, dtype=dtype), work.rows.new_zeros(()), list[Rows]()
        sides = 1 if reference is None else 2
        buffer = hidden.new_empty((sides * min(work.chunk_rows, count), weight.shape[0]), dtype=dtype)
        rounded = weight.dtype is torch.bfloat16 and multiplies_bfloat16(weight.device)

        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, count, work.chunk_rows):
                chunk = slice(start, start + work.chunk_rows)
                rows, y = work.rows[chunk], work.y[chunk]
                x = scale * hidden[rows].to(dtype)
                if reference is None:
                    g, slope = _logits(x, work.head, buffer[: len(rows)], rounded)
                    values = _cross_entropy_(g, y, work)
                else:
                    x0 = work.reference_head.scale * reference[rows].to(dtype)
                    b, g, slope = _base_and_change(x, x0, work, buffer[: 2 * len(rows)], rounded)
                    values = _divergence_(b, g, y, work)
                sums += torch.stack([values.divergence.sum(), values.cross_entropy.sum()])
                kept += values.kept.sum()
                if work.statistics:
                    found.append(values)
                # g is now the gradient on the (capped) logits
                if slope is not None:
                    g *= slope
                if d_hidden is not None:
                    d_hidden[chunk] = to_hidden(g, weight, rounded=rounded).mul_(scale)
                if d_weight is not None:
                    d_weight.addmm_(g.t(), x)
                if d_bias is not None:
                    d_bias.add_(g.sum(0), alpha=scale)

        ctx.save_for_backward(work.rows, d_hidden, d_weight, d_bias)
        ctx.like = hidden.shape, hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        divergence, nll = sums[0].clone(), sums[1].clone()
        of_rows = _of_rows(found, hidden, dtype) if work.statistics else ()
        ctx.mark_non_differentiable(divergence, nll, kept, *of_rows)
        objective = work.objective
        return objective.strength * divergence + objective.cross_entropy * nll, divergence, nll, kept, *of_rows

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True; torch's once_differentiable would let a wrong 0 through
            raise RuntimeError(
                "The linear losses have no second derivative: their gradient is finished in the forward pass. "
                "Do without create_graph=True, or use logit_divergence on head.logits(hidden)."
            )
        rows, d_hidden, d_weight, d_bias = ctx.saved_tensors
        shape, hidden_dtype, weight_dtype, bias_dtype = ctx.like
        if d_hidden is not None:
            d_hidden = backward_rows(d_hidden, grad, rows, shape, hidden_dtype)
        d_weight = None if d_weight is None else (d_weight * grad).to(weight_dtype)
        d_bias = None if d_bias is None else (d_bias * grad).to(bias_dtype)
        return d_hidden, d_weight, d_bias, None, None


def _logits(x: Tensor, head: Head, out: Tensor, rounded: bool) -> tuple[Tensor, Tensor | None]:
    """Write the logits of the scaled rows `x` to `out`; return them and the soft cap's derivative, if any."""
    to_logits(x, head.weight, out, rounded=rounded)
    if head.bias is not None:
        out.add_(head.bias, alpha=head.scale)
    return out, _cap_(out, head.soft_cap)


def _base_and_change(
    x: Tensor, x0: Tensor, work: _Work, out: Tensor, rounded: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return base logits b, change d = z − b, both in `out`, and the derivative of the student's soft cap, if any.

    With one head the change is computed from the change of the hidden states, W (h − h0): exact where it is small,
    and safe even where the product is rounded to bfloat16. With two heads it is a difference, so nothing is rounded.
    """
    head, reference_head = work.head, work.reference_head
    b, d = out.chunk(2)
    if not head.same_as(reference_head):
        _logits(x0, reference_head, b, rounded=False)
        _, slope = _logits(x, head, d, rounded=False)
        return b, d.sub_(b), slope
    to_logits(torch.cat([x0, x - x0]), head.weight, out, rounded=rounded)
    if head.bias is not None:
        b.add_(head.bias, alpha=head.scale)
    if head.soft_cap is None:
        return b, d, None
    slope = _cap_(d.add_(b), head.soft_cap)
    _cap_(b, head.soft_cap)
    return b, d.sub_(b), slope


def _cap_(logits: Tensor, soft_cap: float | None) -> Tensor | None:
    """Apply c·tanh(z/c) in place; return its derivative 1 − tanh², or `None` where there is no cap."""
    if soft_cap is None:
        return None
    logits.div_(soft_cap).tanh_()
    slope = 1 - logits.square()
    logits.mul_(soft_cap)
    return slope


def _cross_entropy_(z: Tensor, y: Tensor, work: _Work) -> Rows:
    """Turn `z` into the gradient of the cross-entropy, a few rows at a time."""
    step = rows_at_once(z.shape[1], z.device)
    parts = zip(torch.split(z, step), torch.split(y, step), strict=True)
    return _joined([likelihood_rows_(*part, statistics=work.statistics) for part in parts])


def _divergence_(b: Tensor, d: Tensor, y: Tensor, work: _Work) -> Rows:
    """Turn `d` into the gradient of the objective, a few rows at a time."""
    goal = work.objective
    assert goal.divergence is not None  # a reference is only ever passed with a divergence
    step = rows_at_once(b.shape[1], b.device)
    parts = zip(torch.split(b, step), torch.split(d, step), torch.split(y, step), strict=True)
    return _joined(
        [
            divergence_rows_(*part, goal.divergence, goal.strength, goal.cross_entropy, statistics=work.statistics)
            for part in parts
        ]
    )


def _joined(parts: list[Rows]) -> Rows:
    whole: list[Any] = [None if values[0] is None else torch.cat(values) for values in zip(*parts, strict=True)]
    return Rows(*whole)


def _of_rows(found: list[Rows], hidden: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return cross-entropy, entropy and top1 of all rows, of which there may be none."""
    if not found:
        none = hidden.new_zeros(0, dtype=dtype)
        return none, none.clone(), none.bool()
    whole = _joined(found)
    assert whole.entropy is not None  # asked for, like top1
    assert whole.top1 is not None
    return whole.cross_entropy, whole.entropy, whole.top1


def check_hidden(name: str, hidden: Tensor, head: Head, targets: Tensor) -> None:
    """Raise unless hidden states fit a head and have a target each."""
    if hidden.dim() < 2 or hidden.shape[-1] != head.weight.shape[1]:
        raise ValueError(
            f"{name} must have shape [..., {head.weight.shape[1]}] to enter a head of shape {list(head.weight.shape)}, "
            f"but has {list(hidden.shape)}. Pass the final hidden states, after the last norm and before the head."
        )
    if hidden.shape[:-1] != targets.shape:
        raise ValueError(
            f"Every position needs one target, but {name} has shape {list(hidden.shape)} and targets "
            f"{list(targets.shape)}. Pass targets of shape {list(hidden.shape[:-1])}, already shifted by one."
        )
