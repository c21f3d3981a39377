"""No logits in memory: both sides' tiles live in registers; the host's side of `tile_kernels`.

    forward:   state of each row and part of the vocabulary -> values, and four numbers per row     (2 products)
    backward:  per chunk, g from tiles computed once more;  dh = g W by cuBLAS                      (3 products)

`HOLDFAST_KERNEL=tiles` asks for it; `rows` is the default. Five products where `rows` takes three, but logits are
never rounded (a bfloat16 gradient of a small KL is right to 0.3 % and not to 2.5 %), and the workspace is one
chunk_rows x vocabulary buffer of g in the backward pass, half of that of `rows`, and none without a gradient.

Why a chunk of g is stored: adding g W to dh tile by tile needs the whole width of dh per program, which registers do
not hold, or float32 atomics, rows · vocabulary · hidden · 8 / 128 bytes of them (134 GB at 4,096 x 128,256 x 4,096,
more time than all products together). A chunk of g costs 4 bytes of traffic per logit and leaves the product to
cuBLAS. `chunked` is the twin of the whole, `plain_statistics` that of the forward pass.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from holdfast.functional.triton.rows import Operands, Values, Work, operands, padded, refuse_second_derivative, switches
from holdfast.functional.triton.tile_kernels import tile_combine, tile_gradient, tile_statistics
from triton import cdiv

if TYPE_CHECKING:
    from holdfast.functional.head import Head
    from jaxtyping import Float, Int
    from torch import Tensor


class TileShape(NamedTuple):
    """How a product is cut: rows, tokens and hidden units of a tile, and what the compiler makes of it."""

    rows: int = 128
    columns: int = 128
    depth: int = 64
    warps: int = 8
    stages: int = 3


class Statistics(NamedTuple):
    """What the base and the student say of each row; the logits behind it are gone."""

    values: Values
    numbers: Float[Tensor, "4 rows"]  # logsumexp of b without y, its change to z, and (a, k) of the gradient


def shape_for(device: torch.device, dtype: torch.dtype) -> TileShape:
    """Return the cut for a device: what its registers and shared memory hold (test_triton_compiles.py looks)."""
    if device.type != "cuda":
        return TileShape(16, 32, 16)  # the interpreter: small tensors in numpy
    if dtype is torch.float32:
        return TileShape(64, 64, 32, 4, 2)
    if torch.cuda.get_device_capability(device) >= (9, 0):
        room = getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 0)
        return TileShape() if room >= 150_000 else TileShape(columns=64, depth=32)
    return TileShape(columns=64, depth=32)


def statistics(given: Operands, work: Work, shape: TileShape) -> Statistics:
    """Run the forward kernels: each program takes `shape.rows` rows and a part of the vocabulary."""
    weight, count = work.head.weight, len(given.base)
    device, tall = weight.device, cdiv(count, shape.rows)
    parts = max(1, min(cdiv(2 * processors(device), tall), cdiv(weight.shape[0], shape.columns)))
    states = torch.empty((10, parts, count), dtype=torch.float32, device=device)
    values, numbers = Values.empty(count, device), states.new_empty((4, count))
    settings, flags = switches(work, compare=given.moved is not None)
    masked = flags.pop("MASKED")
    tile_statistics[(tall, parts)](
        *factors(given, work.head), work.targets, given.centres, states,
        count, *weight.shape, parts, work.ignore_index, *settings[:2], **flags, **cut(weight, shape),
    )  # fmt: skip
    tile_combine[(cdiv(count, 128),)](
        states, work.targets, given.centres, numbers, *values, count, parts, work.ignore_index, *settings[2:],
        COMPARE=flags["COMPARE"], MASKED=masked, STATISTICS=work.statistics, ROWS=128,
    )  # fmt: skip
    return Statistics(values, numbers)


def gradient_of_chunk(
    given: Operands, targets: Tensor, numbers: Tensor, out: Tensor, work: Work, shape: TileShape
) -> None:
    """Write the logit gradient of a few rows to `out` `[rows, vocab]`; `numbers` are those rows' columns."""
    settings, flags = switches(work, compare=given.moved is not None)
    del flags["MASKED"], flags["STATISTICS"]  # the first is in the numbers already
    vocab = out.shape[1]
    tile_gradient[(cdiv(len(out), shape.rows), cdiv(vocab, shape.columns))](
        *factors(given, work.head), targets, numbers, out,
        len(out), *work.head.weight.shape, out.stride(0), numbers.stride(0), work.ignore_index, *settings[:2],
        **flags, **cut(work.head.weight, shape),
    )  # fmt: skip


def factors(given: Operands, head: Head) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what a tile's product reads; what is absent stands for itself and is not read."""
    moved = given.base if given.moved is None else given.moved
    return given.base, moved, head.weight, head.weight if head.bias is None else head.bias


def cut(weight: Tensor, shape: TileShape) -> dict[str, object]:
    """Return the compile-time part of a product."""
    return {
        "EVEN": weight.shape[1] % shape.depth == 0,
        "PRECISION": "tf32x3",  # float32 alone asks
        "WIDEN": weight.device.type != "cuda",
        "ROWS": shape.rows,
        "COLUMNS": shape.columns,
        "DEPTH": shape.depth,
        "num_warps": shape.warps,
        "num_stages": shape.stages,
    }


def processors(device: torch.device) -> int:
    """Return how many programs run at once; 2 in the interpreter, so that parts are joined there too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


class TileLoss(torch.autograd.Function):
    """Values in the forward pass; the gradient on the hidden states a chunk at a time in the backward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, reference: Tensor | None, work: Work) -> tuple[Tensor, ...]:
        shape = shape_for(hidden.device, work.head.weight.dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            given = operands(hidden, reference, work.head)
            found = statistics(given, work, shape)
        ctx.save_for_backward(*given, found.numbers, work.head.weight, work.head.bias)
        ctx.work, ctx.shape, ctx.dtype = work, shape, hidden.dtype
        sums = found.values.sums(work)
        ctx.mark_non_differentiable(*sums[1:])
        return sums

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, None, None]:
        refuse_second_derivative()
        if not ctx.needs_input_grad[0]:
            return None, None, None
        base, moved, centres, numbers, weight, _ = ctx.saved_tensors
        work, shape = ctx.work, ctx.shape
        d_hidden = base.new_empty(base.shape)
        buffer = padded(min(work.chunk_rows, len(base)), weight)
        with torch.autocast(base.device.type, enabled=False):
            for start in range(0, len(base), work.chunk_rows):
                part = slice(start, start + work.chunk_rows)
                given = Operands(base[part], None if moved is None else moved[part], centres[part])
                g = buffer[: len(given.base)]
                gradient_of_chunk(given, work.targets[part], numbers[:, part], g, work, shape)
                torch.mm(g, weight, out=d_hidden[part])
        return (d_hidden * (grad * work.head.scale)).to(ctx.dtype), None, None


def plain_statistics(
    b: Float[Tensor, "rows vocab"], z: Float[Tensor, "rows vocab"], y: Int[Tensor, "rows 1"]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return, per row and over all tokens but y: logsumexp b, logsumexp z, t = E_q~[b − z]; and z_y: the slow twin.

    >>> import torch
    >>> plain_statistics(torch.zeros(1, 3), torch.tensor([[1.0, 1.0, 5.0]]), torch.tensor([[2]]))
    (tensor([0.6931]), tensor([1.6931]), tensor([-1.]), tensor([5.]))
    """
    others_b, others_z = b.scatter(1, y, -torch.inf), z.scatter(1, y, -torch.inf)
    t = (others_b.softmax(1) * (b - z)).sum(1)
    return others_b.logsumexp(1), others_z.logsumexp(1), t, z.gather(1, y).squeeze(1)
