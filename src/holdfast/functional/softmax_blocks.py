"""The softmax of one side, a chunk of rows at a time, for losses that need E_p[W] and logsumexp(z) and nothing else.

    for each chunk:  z = s (rows Wᵀ + b);  exponentials = exp(z − top);  E_p[W] = exponentials W / Σ exponentials

Logits are accumulated in float32 whatever the head's dtype, never rounded to bfloat16 or TF32: there is no second side
here to share a rounding with (see `products`). `cached_divergence` is the one caller.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple, get_args

import torch
from holdfast.functional.chunked import check_hidden
from holdfast.functional.closed_form import rows_at_once
from holdfast.functional.divergence import FLOOR, Mask, check_targets
from holdfast.functional.products import rows_of_chunk, to_hidden, to_logits

if TYPE_CHECKING:
    from collections.abc import Iterator

    from holdfast.functional.head import Head
    from jaxtyping import Float
    from torch import Tensor


class Block(NamedTuple):
    """The student (or base) on a few rows: exponentials of the logits, their sum, and its logarithm in full."""

    chunk: slice  # of the rows that count
    x: Float[Tensor, "rows hidden"]  # scaled hidden states
    exponentials: Float[Tensor, "rows vocab"]
    total: Float[Tensor, "rows 1"]
    log_total: Float[Tensor, " rows"]

    def mean_weight(self, head: Head) -> Float[Tensor, "rows hidden"]:
        """Return E_p[W]: divided after the product, which saves a pass over the vocabulary."""
        return to_hidden(self.exponentials, head.weight, rounded=False).div_(self.total)


def blocks(
    hidden: Tensor, head: Head, rows: Tensor, y: Tensor | None, dtype: torch.dtype, chunk_rows: int | None
) -> Iterator[Block]:
    """Take the softmax a chunk of rows at a time, in one buffer; without the target where `y` is given."""
    if chunk_rows is None:
        chunk_rows = rows_of_chunk(head.weight.shape[0], on_cpu=hidden.device.type == "cpu")
    buffer = hidden.new_empty((min(chunk_rows, len(rows)), head.weight.shape[0]), dtype=dtype)
    for start in range(0, len(rows), chunk_rows):
        chunk = slice(start, start + chunk_rows)
        x = head.scale * hidden[rows[chunk]].to(dtype)
        z = buffer[: len(x)]
        to_logits(x, head.weight, z, rounded=False)
        if head.bias is not None:
            z.add_(head.bias, alpha=head.scale)
        if y is not None:
            z.scatter_(1, y[chunk], FLOOR)
        tops, totals = zip(*map(_exponentials_, torch.split(z, rows_at_once(z.shape[1], z.device))), strict=True)
        top, total = torch.cat(tops), torch.cat(totals)
        wide = wide_dtype(hidden)
        yield Block(chunk, x, z, total, (top.to(wide) + total.to(wide).log()).squeeze(1))


@contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Switch autocast and TF32 off: transformers' Trainer turns TF32 on, which would cost 3 % of the gradient at 1e-3.

    Args:
        device: where the products run.
    """
    cuda = torch.backends.cuda.matmul
    name, exact = ("fp32_precision", "ieee") if hasattr(cuda, "fp32_precision") else ("allow_tf32", False)
    before = getattr(cuda, name) if device.type == "cuda" else None
    with torch.autocast(device.type, enabled=False):
        try:
            if before is not None:
                setattr(cuda, name, exact)
            yield
        finally:
            if before is not None:
                setattr(cuda, name, before)


def _exponentials_(z: Tensor) -> tuple[Tensor, Tensor]:
    """Turn logits into exp(z − top) in place; return each row's top and the sum of its exponentials."""
    top = z.amax(1, keepdim=True)
    return top, z.sub_(top).exp_().sum(1, keepdim=True)


def dot(x: Float[Tensor, "rows hidden"], e0: Float[Tensor, "rows hidden"]) -> Float[Tensor, " rows"]:
    """Return each row's product in the wide dtype: it is about to be subtracted from a log-sum-exp."""
    wide = wide_dtype(x)
    return (x.to(wide) * e0.to(wide)).sum(1)


def wide_dtype(tensor: Tensor) -> torch.dtype:
    """Return what a small KL is told from large terms in: float64, where the device has it."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def working_dtype(hidden: Tensor, head: Head) -> torch.dtype:
    """Return what products accumulate in: float32, or float64 where an input has it."""
    return torch.promote_types(torch.promote_types(hidden.dtype, head.weight.dtype), torch.float32)


def positions(
    name: str,
    hidden: Tensor,
    head: Head,
    targets: Tensor | None,
    mask: Mask,
    ignore_index: int,
    chunk_rows: int | None,
) -> tuple[Tensor, Tensor | None]:
    """Check what was given; return the flat numbers of the positions that count, and their targets if one is masked."""
    if head.soft_cap is not None:
        raise ValueError(
            f"A head with a soft cap ({head.soft_cap}) is not linear, so E_q[W] does not give the KL. Keep the base's "
            "hidden states instead and use linear_divergence: no base forward either, one product more."
        )
    if mask not in get_args(Mask):
        raise ValueError(f"mask must be one of {list(get_args(Mask))}, got {mask!r}.")
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows must be at least 1, got {chunk_rows}.")
    if targets is None:
        if mask == "target":
            raise ValueError("The target-masked KL needs targets: pass them, or mask='none' for the full KL.")
        targets = torch.zeros(hidden.shape[:-1], dtype=torch.long, device=hidden.device)
    check_hidden(name, hidden, head, targets)
    flat = targets.flatten()
    rows = (flat != ignore_index).nonzero().squeeze(1)
    y = flat[rows].unsqueeze(1)
    check_targets(y, head.weight.shape[0], ignore_index)
    return rows, y if mask == "target" else None
