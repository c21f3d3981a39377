"""Logits a chunk of rows at a time through cuBLAS, then one kernel for values and gradient: the host's side.

    per chunk:  (b, d) = (h0, h − h0) Wᵀ;  (values, g over b) = row_kernel(b, d);  dh = g W          three products

The default on a GPU. Products take the head's dtype in and accumulate in float32; in bfloat16 the logits are rounded
when they are stored, but b once for both sides, so that rounding costs 2 to 3 % of a small KL's gradient and not most
of it (see `linear_divergence`). `chunked` is the twin; unlike it, this path takes ignored rows along, weighted 0 on
the device, because dropping them asks the host how many are left. Callers with many ignored rows drop them first.
Workspace: 2 · chunk_rows · vocabulary numbers of the head's dtype.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from holdfast.functional.triton.row_kernel import row_kernel

if TYPE_CHECKING:
    from holdfast.functional.chunked import Objective
    from holdfast.functional.head import Head
    from jaxtyping import Float, Int
    from torch import Tensor


class Work(NamedTuple):
    """One call, flat: what a kernel path needs beside the tensors that autograd sees."""

    head: Head
    targets: Int[Tensor, " rows"]
    objective: Objective
    ignore_index: int
    chunk_rows: int
    statistics: bool  # whether entropy and top1 of each row are asked for
    grad: bool  # grad mode of the caller: inside a Function it is always off


class Values(NamedTuple):
    """What the kernels write per row, 0 where ignored."""

    divergence: Float[Tensor, " rows"]
    nll: Float[Tensor, " rows"]
    kept: Int[Tensor, " rows"]
    entropy: Float[Tensor, " rows"]
    top1: Int[Tensor, " rows"]

    @classmethod
    def empty(cls, count: int, device: torch.device) -> Values:
        """Make room for `count` rows."""
        divergence, nll, entropy = torch.empty((3, count), dtype=torch.float32, device=device)
        kept, top1 = torch.empty((2, count), dtype=torch.int32, device=device)
        return cls(divergence, nll, kept, entropy, top1)

    def sums(self, work: Work) -> tuple[Tensor, ...]:
        """Return total, divergence, nll and how many rows `exclusion` keeps, all on the device; then what is logged."""
        objective = work.objective
        divergence = self.divergence.sum()
        nll = self.nll.sum() if objective.cross_entropy else torch.zeros_like(divergence)
        total = objective.strength * divergence + objective.cross_entropy * nll
        logged = (self.nll, self.entropy, self.top1.bool()) if work.statistics else ()
        return total, divergence, nll, self.kept.sum(), *logged


class Operands(NamedTuple):
    """The left factors of the products, in the head's dtype, and a centre of each row's change of logits."""

    base: Float[Tensor, "rows hidden"]
    moved: Float[Tensor, "rows hidden"] | None
    centres: Float[Tensor, " rows"]


def operands(hidden: Tensor, reference: Tensor | None, head: Head) -> Operands:
    """Return (h0, h − h0), subtracted in float32 before it is rounded; (h, None) without a reference.

    The centre is the mean of d over some tokens: any number would be right, and one near the middle of d keeps
    `row_state` on its small terms also where all logits of a row moved together.
    """
    weight, scale = head.weight, head.scale
    x = scale * hidden.float()
    if reference is None:
        return Operands(x.to(weight.dtype), None, x.new_zeros(len(x)))
    x0 = scale * reference.float()
    moved = (x - x0).to(weight.dtype)
    some = weight[:: max(1, weight.shape[0] // 4096)].mean(0)
    return Operands(x0.to(weight.dtype), moved, (moved @ some).float())


def switches(work: Work, *, compare: bool) -> tuple[list[float], dict[str, bool]]:
    """Return what both kernels are told of the head and the objective: numbers, and what is compiled in."""
    head, objective = work.head, work.objective
    member = objective.divergence
    exclusion = None if member is None else member.exclusion
    numbers = [
        head.scale,
        head.soft_cap or 0.0,
        0.0 if member is None else member.gamma,
        -math.inf if exclusion is None else math.log(exclusion),
        objective.strength,
        objective.cross_entropy,
    ]
    masked = member is not None and member.mask == "target"
    flags = {
        "BIAS": head.bias is not None,
        "CAP": head.soft_cap is not None,
        "COMPARE": compare,
        "MASKED": masked,
        "STATISTICS": work.statistics,
    }
    return [float(number) for number in numbers], flags


def launch_rows(
    logits: Tensor,
    moved: Tensor | None,
    centres: Tensor,
    targets: Tensor,
    values: Values,
    work: Work,
    *,
    gradient: bool,
) -> None:
    """Run the row kernel: fill `values`, and turn `logits` `[rows, vocab]` into their gradient if asked."""
    count, vocab = logits.shape
    numbers, flags = switches(work, compare=moved is not None)
    bias = work.head.bias
    row_kernel[(count,)](
        logits, logits if moved is None else moved, logits if bias is None else bias, targets, centres, *values,
        vocab, logits.stride(0), work.ignore_index, *numbers,
        **flags, GRADIENT=gradient, COLUMNS=min(4096, 1 << (vocab - 1).bit_length()), num_warps=8,
    )  # fmt: skip


def padded(rows: int, weight: Tensor) -> Tensor:
    """Return room for logits `[rows, vocab]`, each row starting at a whole vector: GPT-2 has 50,257 tokens."""
    vocab = weight.shape[0]
    return weight.new_empty((rows, -(-vocab // 64) * 64))[:, :vocab]


class RowLoss(torch.autograd.Function):
    """The gradient on the hidden states is finished when the forward pass ends, as in `chunked`."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, reference: Tensor | None, work: Work) -> tuple[Tensor, ...]:
        weight, count = work.head.weight, len(hidden)
        needed = work.grad and ctx.needs_input_grad[0]
        d_hidden = hidden.new_empty(hidden.shape, dtype=weight.dtype) if needed else None
        values = Values.empty(count, hidden.device)
        sides = 1 if reference is None else 2
        buffer = padded(sides * min(work.chunk_rows, count), weight)
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, count, work.chunk_rows):
                part = slice(start, start + work.chunk_rows)
                given = operands(hidden[part], None if reference is None else reference[part], work.head)
                rows = given.base if given.moved is None else torch.cat([given.base, given.moved])
                logits = torch.mm(rows, weight.t(), out=buffer[: len(rows)])
                n = len(given.base)
                b, d = logits[:n], None if given.moved is None else logits[n:]
                here = Values(*(value[part] for value in values))
                launch_rows(b, d, given.centres, work.targets[part], here, work, gradient=needed)
                if d_hidden is not None:
                    torch.mm(b, weight, out=d_hidden[part])
        ctx.save_for_backward(d_hidden)
        ctx.like = hidden.dtype, work.head.scale
        sums = values.sums(work)
        ctx.mark_non_differentiable(*sums[1:])
        return sums

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, None, None]:
        refuse_second_derivative()
        (d_hidden,) = ctx.saved_tensors
        dtype, scale = ctx.like
        return None if d_hidden is None else (d_hidden * (grad * scale)).to(dtype), None, None


def refuse_second_derivative() -> None:
    """Raise under create_graph=True; torch's once_differentiable would let a wrong 0 through."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "The linear losses have no second derivative: their gradient is finished in the forward pass. "
            "Do without create_graph=True, or use logit_divergence on head.logits(hidden)."
        )
