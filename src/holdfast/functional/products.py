"""Products of a few rows with a large head, accumulated in float32 whatever the dtype the head is stored in.

    hidden [rows, H] · Wᵀ -> logits [rows, V]          gradient [rows, V] · W -> [rows, H]

A bfloat16 head is widened by tiles of the vocabulary, so no second copy of it exists, or multiplied as it is where
the processor is fast at that and the caller can bear a result rounded to bfloat16 (see `linear_divergence`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from jaxtyping import Float
    from torch import Tensor

WORKSPACE = 2**24  # logits of a chunk on a CPU: two buffers of them, the base's and the student's, are 128 MiB
SCALED_AT_ONCE = 1024  # rows of a gradient
TILE = 8192  # rows of the head widened at a time: 29 MB in float32 for hidden size 896


def multiplies_bfloat16(device: torch.device) -> bool:
    """Say whether bfloat16 products are fast on `device`; without hardware for them a CPU is 3x slower than float32."""
    if device.type != "cpu":
        return True
    probes = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(bool(probe()) for probe in probes if probe is not None)


def rows_of_chunk(vocab: int, *, on_cpu: bool) -> int:
    """Return of how many rows logits should exist at a time, where nobody says.

    On a CPU as many as `WORKSPACE` holds, but 128 at least, for products of fewer are slow (benchmarks/README.md);
    elsewhere 1,024, as Liger has it; not measured.

    >>> [rows_of_chunk(vocab, on_cpu=True) for vocab in (8192, 32_000, 151_936)]
    [2048, 524, 128]
    """
    return max(128, WORKSPACE // vocab) if on_cpu else 1024


def to_logits(
    rows: Float[Tensor, "rows hidden"], weight: Float[Tensor, "vocab hidden"], out: Tensor, *, rounded: bool
) -> None:
    """Write `rows @ weight.T` to `out` `[rows, vocab]`; with `rounded`, multiply in the weight's own dtype."""
    if weight.dtype == rows.dtype:
        torch.mm(rows, weight.t(), out=out)
        return
    for part in _tiles(weight):
        tile = weight[part].t()
        out[:, part] = rows.to(weight.dtype) @ tile if rounded else rows @ tile.to(rows.dtype)


def to_hidden(
    gradient: Float[Tensor, "rows vocab"], weight: Float[Tensor, "vocab hidden"], *, rounded: bool
) -> Float[Tensor, "rows hidden"]:
    """Return `gradient @ weight` `[rows, hidden]` in the gradient's dtype; `rounded` as in `to_logits`."""
    if weight.dtype == gradient.dtype:
        return gradient @ weight
    total = gradient.new_zeros(gradient.shape[0], weight.shape[1])
    for part in _tiles(weight):
        g, tile = gradient[:, part], weight[part]
        if rounded:
            total += g.to(weight.dtype) @ tile
        else:
            total.addmm_(g, tile.to(g.dtype))
    return total


def backward_rows(
    d_rows: Float[Tensor, "rows hidden"], scale: Tensor, rows: Tensor, shape: torch.Size, dtype: torch.dtype
) -> Float[Tensor, "all hidden"]:
    """Return the gradient on all hidden states, 0 where there is none, from that of some rows times `scale`.

    `d_rows` stays as it is, for there may be a second backward pass, and no scaled copy of it is held.
    """
    whole = d_rows.new_zeros(shape, dtype=dtype)
    for index, some in zip(*(torch.split(each, SCALED_AT_ONCE) for each in (rows, d_rows)), strict=True):
        whole.index_copy_(0, index, (some * scale.to(some.dtype)).to(dtype))
    return whole


def _tiles(weight: Tensor) -> Iterator[slice]:
    for start in range(0, weight.shape[0], TILE):
        yield slice(start, start + TILE)
