"""The projection of one direction alone: ours on one flat buffer, against loops over tensors and an AdamW step.

    d' = d - Qᵀ (Q d),    Q of k rows: two products with k x P numbers, (2k + 3) numbers read or written a parameter

`projection` runs and records it, and times whole steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from holdfast.core.types import Step
from holdfast.functional.subspace import Subspace, project, span
from holdfast.methods import RandomSubspace
from record import Row, need_memory
from torch import Tensor
from turns import in_turns, rows

TENSORS = 448  # of 32 layers with LoRA on seven linear maps
OURS, IN_STEP = "holdfast, flat", "holdfast, in a step"
LOOP, SUMS, FOREACH = "loop over tensors, dot and axpy", "loop over tensors, (a*b).sum()", "torch._foreach"
ADAMW, FUSED = "an AdamW step", "a fused AdamW step"
BOUND = "the basis read twice"  # which nothing that is exact can do without: once for Q d, once for Qᵀ c
FLAT_PAIRS = [(mine, peer) for mine in (OURS, IN_STEP) for peer in (LOOP, SUMS, FOREACH, ADAMW, FUSED)]
FLAT_PAIRS += [(BOUND, peer) for peer in (LOOP, ADAMW, FUSED)]
PARTS = ("per tensor, Gram-Schmidt each time", "per tensor, basis ready")
Pieces = Sequence[Tensor]


def dot_and_axpy(basis: Sequence[Pieces], direction: Pieces) -> list[Tensor]:
    """Take the basis off, vector by vector: a dot product and an axpy in every tensor, each a number on the host."""
    out = [piece.clone() for piece in direction]
    for vector in basis:
        inside = sum(float(torch.dot(q, piece)) for q, piece in zip(vector, out, strict=True))
        for q, piece in zip(vector, out, strict=True):
            piece.add_(q, alpha=-inside)
    return out


def products_and_sums(basis: Sequence[Pieces], direction: Pieces) -> list[Tensor]:
    """The same as it is often written: whole products for their sum, and a new tensor for every result."""
    out = list(direction)
    for vector in basis:
        inside = sum((q * piece).sum().item() for q, piece in zip(vector, out, strict=True))
        out = [piece - inside * q for q, piece in zip(vector, out, strict=True)]
    return out


def foreach(basis: Sequence[Pieces], direction: Pieces) -> list[Tensor]:
    """The same by torch's calls on lists of tensors."""
    out = [piece.clone() for piece in direction]
    for vector in basis:
        inside = sum(product.sum() for product in torch._foreach_mul(vector, out))
        torch._foreach_add_(out, vector, alpha=-float(inside))
    return out


def in_step(space: Subspace, pieces: Mapping[str, Tensor]) -> Callable[[], list[Tensor]]:
    """What all subspace methods do in a training step: from named tensors to named tensors, what they log included."""
    method = RandomSubspace(apply_to="gradient")
    state, log = method.state_of(space, 0), dict[str, object]()
    step = Step(pieces, pieces, 1, log=log.__setitem__)
    return lambda: list(method.transform(state, step).direction.values())


def adamw(pieces: Pieces, *, fused: bool) -> Callable[[], None]:
    """A step of torch's optimizer on as many numbers, ready to run."""
    params = [torch.nn.Parameter(torch.zeros_like(piece)) for piece in pieces]
    for p, piece in zip(params, pieces, strict=True):
        p.grad = piece
    optimizer = torch.optim.AdamW(params, lr=1e-3, fused=fused)
    return lambda: optimizer.step()


def flat(numbers: int, k: int, rounds: int) -> list[Row]:
    """Time the projection of `numbers` numbers in 448 tensors off k vectors; all ways must give one result."""
    need_memory(4 * numbers * (2.4 * k + 8) / 2**30)
    sizes = [numbers // TENSORS] * TENSORS
    generator = torch.Generator().manual_seed(1)
    space = span(torch.randn(k, sum(sizes), generator=generator), [sum(sizes)])
    direction = torch.randn(sum(sizes), generator=generator)
    pieces, basis = direction.split(sizes), [vector.split(sizes) for vector in space.basis]
    own = direction.clone()  # projected in place, as in a step: what is projected already takes as long
    runs: dict[str, Callable[[], object]] = {
        OURS: lambda: project(space, own, out=own),
        IN_STEP: in_step(space, {str(i): piece for i, piece in enumerate(pieces)}),
        LOOP: lambda: dot_and_axpy(basis, pieces),
        SUMS: lambda: products_and_sums(basis, pieces),
        FOREACH: lambda: foreach(basis, pieces),
    }
    wanted = project(space, direction)
    for name, run in runs.items():
        found = run()
        whole = found if isinstance(found, Tensor) else torch.cat(found)
        if (error := ((whole - wanted).norm() / wanted.norm()).item()) > 1e-4:
            raise SystemExit(f"{name} disagrees with {OURS}: off by {error:.1e}")
    del found, whole, wanted
    runs |= {ADAMW: adamw(pieces, fused=False), FUSED: adamw(pieces, fused=True)}
    runs[BOUND] = lambda: [space.basis.sum() for _ in range(2)]
    for name in (ADAMW, FUSED):
        runs[name]()  # its state
    common: Row = {"dtype": "float32", "tokens": numbers}
    return rows(in_turns(runs, rounds, f"{numbers:,} numbers"), FLAT_PAIRS, common, f"flat projection k = {k}: ")


def parts(sizes: Sequence[int], k: int, rounds: int) -> list[Row]:
    """Time the projection in the tensors of a model: ours against the loops of the public code."""
    generator = torch.Generator().manual_seed(1)
    references = torch.randn(k, sum(sizes), generator=generator)
    direction = torch.randn(sum(sizes), generator=generator)
    whole, blocks = span(references, [sum(sizes)]), span(references, sizes)
    by_tensor, basis = (
        [g.clone() for g in references.split(sizes, 1)],
        [q.clone() for q in blocks.basis.split(sizes, 1)],
    )
    pieces = [d.clone() for d in direction.split(sizes)]

    def gram_schmidt() -> list[Tensor]:  # as the public code, for k vectors: on every call, in every tensor
        out = []
        for gradients, piece in zip(by_tensor, pieces, strict=True):
            units: list[Tensor] = []
            for g in gradients:
                for u in units:
                    g = g - (g @ u) * u
                units.append(g / (g.norm() + 1e-8))
            for u in units:
                piece = piece - (piece @ u) * u
            out.append(piece)
        return out

    def ready() -> list[Tensor]:
        out = []
        for q, piece in zip(basis, pieces, strict=True):
            for u in q:
                piece = piece - (piece @ u) * u
            out.append(piece)
        return out

    runs: dict[str, Callable[[], object]] = {
        PARTS[0]: gram_schmidt,
        PARTS[1]: ready,
        "ours, per tensor": lambda: project(blocks, direction),
        "ours, global": lambda: project(whole, direction),
    }
    agree = torch.cat(gram_schmidt())
    for other in (project(blocks, direction), torch.cat(ready())):
        if (other - agree).norm() > 1e-4 * agree.norm():
            raise SystemExit("The projections in every tensor disagree with Gram-Schmidt.")
    pairs = [(mine, peer) for mine in ("ours, per tensor", "ours, global") for peer in PARTS]
    found = in_turns(runs, rounds, f"parts, k = {k}")
    return rows(found, pairs, {"dtype": "float32", "tokens": sum(sizes)}, f"projection k = {k}: ")
