"""A protected subspace: the span of a few reference gradients, and directions with no component in it.

    d' = d - D G' (G D G')^-1 (G d - t)

with the reference gradients as rows of G [k, P], a direction d [P], the optimizer's metric D (a diagonal; the identity
is the Euclidean projection of OGPSA, arXiv 2602.07892) and demanded descent t (0: none). Then G d' = t exactly, and d'
is the nearest such direction in the norm |x|^2 = x' D^-1 x: for d = D g a step d' never raises the loss of gradient g.

G is held as G = R Q: rows of Q are orthonormal (float32 beside the parameters), R is k x k in float64. So a projection
costs two passes over k x P numbers (`flat.py`), and everything delicate happens in k dimensions. All of it also runs
block by block (per layer, per tensor), and over shards of P: `reduce` then sums small tensors over the processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .flat import dots, energy, subtract_

CHUNK = 1 << 18  # columns turned to float64 at a time: a few MiB whatever the model
ROOMY = 64  # columns for each row of the basis, from which on a projection takes a small part of a direction
CUT = 1e-12  # of the largest eigenvalue of the Gram matrix: below it, float64 sums of float32 numbers are noise
Reduce = Callable[[Tensor], Tensor]


def alone(tensor: Tensor) -> Tensor:
    """Return the tensor: the sum over processes when each holds all of P."""
    return tensor


@dataclass(frozen=True)
class Subspace:
    """The span of k reference gradients, in blocks.

    Attributes:
        basis: Q [k, P]; within a block its non-zero rows are orthonormal. Any float dtype, on any device.
        coordinates: R [blocks, k, k] in float64; reference i of block b, scaled to length 1, is R[b, i] @ Q_b.
        sizes: numbers of columns of the blocks; they sum to P.
    """

    basis: Tensor
    coordinates: Tensor
    sizes: list[int]

    def blocks(self, *tensors: Tensor) -> zip[tuple[Tensor, ...]]:
        """Return views of the basis and of each further tensor [..., P], block by block."""
        return zip(*(torch.split(tensor, self.sizes, dim=-1) for tensor in (self.basis, *tensors)), strict=True)


def gram(
    rows: Tensor,
    sizes: Sequence[int],
    metric: Tensor | None = None,
    *,
    other: Tensor | None = None,
    reduce: Reduce = alone,
) -> Tensor:
    """Return the products of rows [k, P] with each other, or with `other` [m, P]: [blocks, k, k or m] in float64.

    Args:
        rows: any float dtype.
        sizes: columns of each block.
        metric: weights of the products, [P].
        other: the rows to multiply with; None: `rows` again.
        reduce: sums over processes that hold other columns.
    """
    right = rows if other is None else other
    products = rows.new_zeros(len(sizes), len(rows), len(right), dtype=torch.float64)
    start = 0
    for total, size in zip(products, sizes, strict=True):
        for first in range(start, start + size, CHUNK):
            columns = slice(first, min(first + CHUNK, start + size))
            wide = rows[:, columns].double()
            weighted = wide if metric is None else wide * metric[columns].double()
            total.addmm_(weighted, (wide if other is None else right[:, columns].double()).T)
        start += size
    return reduce(products)


def span(rows: Tensor, sizes: Sequence[int], products: Tensor | None = None, reduce: Reduce = alone) -> Subspace:
    """Return the span of reference gradients.

    Rank-revealing: rows are brought to length 1, so neither their scale nor a copy of a row matters, and directions
    whose eigenvalue is below `CUT` of the largest are left out.

    Args:
        rows: reference gradients [k, P] in float32; a row of zeros spans nothing.
        sizes: columns of each block: (P,) is the theorem's one subspace, one entry per tensor is the public code's.
        products: `gram(rows, sizes)`, if it is there already.
        reduce: sums over processes that hold other columns.

    >>> space = span(torch.tensor([[3.0, 0.0, 0.0], [6.0, 0.0, 0.0], [1.0, 1.0, 0.0]]), (3,))
    >>> rank(space)
    tensor([2])
    """
    products = gram(rows, sizes, reduce=reduce) if products is None else products
    lengths = products.diagonal(dim1=1, dim2=2).sqrt()
    inverse = torch.where(lengths > 0, 1 / lengths, 0.0)
    unit = products * inverse[:, :, None] * inverse[:, None, :]
    values, vectors = torch.linalg.eigh(unit.cpu())  # k x k: not worth a kernel
    kept = values > CUT * values[:, -1:].clamp(min=torch.finfo(torch.float64).tiny)
    roots = torch.where(kept, values, 0.0).sqrt()
    mix = torch.where(kept, 1 / roots, 0.0)[:, :, None] * vectors.mT * inverse.cpu()[:, None, :]
    smallest = float(torch.where(kept, values / values[:, -1:], 1.0).min())
    # float32 combinations are exact enough unless much cancels in them (and TF32 may be on where there is a GPU)
    exact = smallest < 1e-3 or rows.is_cuda
    basis = _combine(mix.to(rows.device, torch.float64 if exact else torch.float32), rows, sizes)
    space = Subspace(basis, (vectors * roots[:, None, :]).to(rows.device), list(sizes))
    if smallest > 1e-6:
        return space
    again = span(basis, sizes, reduce=reduce)  # the weak directions are orthogonal to 1e-6 only: once more
    return Subspace(again.basis, space.coordinates @ again.coordinates, again.sizes)


def _combine(mix: Tensor, rows: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return mix_b @ rows_b for every block, [k, P] in float32."""
    out = torch.empty(rows.shape, dtype=torch.float32, device=rows.device)
    for each, part, result in zip(
        mix, torch.split(rows, list(sizes), 1), torch.split(out, list(sizes), 1), strict=True
    ):
        for chunk, target in zip(torch.split(part, CHUNK, 1), torch.split(result, CHUNK, 1), strict=True):
            target.copy_(each @ chunk.to(each.dtype))
    return out


def rank(space: Subspace) -> Tensor:
    """Return the dimension of each block's span, [blocks]."""
    return (space.coordinates != 0).any(dim=1).sum(dim=-1)


def components(space: Subspace, direction: Tensor, reduce: Reduce = alone) -> Tensor:
    """Return Q d, [blocks, k] in float64: the direction's coordinates inside the subspace."""
    return reduce(torch.stack([dots(basis, part) for basis, part in space.blocks(direction)]))


def leakage(space: Subspace, direction: Tensor, reduce: Reduce = alone) -> Tensor:
    """Return |Q d| / |d|, a scalar in [0, 1]: the share of the direction that lies in the subspace.

    It bounds |g . d| / (|g| |d|) for every g of the span.
    """
    inside = components(space, direction, reduce).square().sum()
    whole = reduce(energy(direction))
    return (inside / whole.clamp(min=torch.finfo(torch.float64).tiny)).sqrt()


def project(
    space: Subspace,
    direction: Tensor,
    *,
    metric: Tensor | None = None,
    sides: Literal["two", "one"] = "two",
    demanded: Tensor | None = None,
    reduce: Reduce = alone,
    out: Tensor | None = None,
) -> Tensor:
    """Return the nearest direction to `direction` that leaves every reference loss alone to first order.

    Args:
        space: what is protected.
        direction: what will be subtracted from the parameters (a gradient, or minus an update), [P] in float32.
        metric: D [P] >= 0; None is the identity. Where D is 0 nothing moves, unless the constraint needs it.
        sides: "two" removes every component; "one" only what would raise a reference loss, G d' >= t: a quadratic
            program in k variables.
        demanded: t [blocks, k], first-order descent of each reference (its gradient scaled to length 1).
        reduce: sums over processes that hold other columns.
        out: where the result goes, `direction` itself perhaps; None: into new memory.
    """
    inside = components(space, direction, reduce)
    out = direction.clone() if out is None else out.copy_(direction)
    gram_d = None if metric is None else gram(space.basis, space.sizes, metric, reduce=reduce)
    if sides == "one":
        multipliers = _push(space.coordinates, inside, gram_d, demanded)
        return _subtract_(space, out, -multipliers, metric)
    wanted = 0.0 if demanded is None else _solve(space.coordinates, demanded)  # Q d' for which R Q d' = t
    excess = inside - wanted
    taken = excess if gram_d is None else _solve(gram_d, excess)
    _subtract_(space, out, taken, metric)
    # (shards differ in size, and all processes must take part in as many sums)
    roomy = reduce is alone and min(space.sizes) > ROOMY * len(space.basis)
    if roomy and metric is None and space.basis.dtype == torch.float32:
        return out
    # once more: exact also where little is left of d, where a metric does not reach all of the span, and for a basis
    # stored in bfloat16, which is orthonormal to 1e-3 only
    return _subtract_(space, out, components(space, out, reduce) - wanted, None)


def _subtract_(space: Subspace, direction: Tensor, taken: Tensor, metric: Tensor | None) -> Tensor:
    """Take D Q' c off a direction, in place, for coordinates c [blocks, k]."""
    weights = [] if metric is None else [metric]
    for (basis, target, *weight), c in zip(space.blocks(direction, *weights), taken, strict=True):
        subtract_(target, basis, c, *weight)
    return direction


def _solve(matrices: Tensor, vectors: Tensor) -> Tensor:
    """Return the least-norm solutions of M_b x = v_b; what no column reaches is left out."""
    inverse = torch.linalg.pinv(matrices.cpu(), rtol=1e-12)
    solved: Tensor = inverse @ vectors.cpu()[..., None]
    return solved[..., 0].to(vectors.device)


def _push(coordinates: Tensor, inside: Tensor, gram_d: Tensor | None, demanded: Tensor | None) -> Tensor:
    """Return R' λ, the coordinates of what is added, with λ >= 0 the multipliers of G d' >= t (KKT by NNLS)."""
    from scipy.optimize import nnls

    found = []
    for b, r in enumerate(coordinates.cpu()):
        matrix = r @ r.T if gram_d is None else r @ gram_d[b].cpu() @ r.T
        lacking = r @ inside[b].cpu() - (0.0 if demanded is None else demanded[b].cpu())
        values, vectors = torch.linalg.eigh(matrix)
        kept = values > 1e-14 * values[-1].clamp(min=1e-300)
        roots = values[kept].sqrt()
        half, target = roots[:, None] * vectors[:, kept].T, -(vectors[:, kept].T @ lacking) / roots
        multipliers = nnls(half.numpy(), target.numpy())[0] if kept.any() else 0 * lacking
        found.append(r.T @ torch.as_tensor(multipliers, dtype=torch.float64))
    return torch.stack(found).to(inside.device)


# --- is a reference gradient signal or noise, and is an old basis still good? ---------------------------------------


def held(space: Subspace, rows: Tensor, reduce: Reduce = alone) -> Tensor:
    """Return which share of the energy of gradients [k, P], each scaled to length 1, a basis holds: a scalar.

    On the same retain rows, 1 minus this is what a basis has lost since it was made, and nothing else.
    """
    products = reduce(torch.stack([(basis.float() @ part.T).double() for basis, part in space.blocks(rows)]))
    whole = reduce(torch.stack([energy(row) for row in rows]))
    shares = products.square().sum((0, 1)) / whole.clamp(min=1e-300)
    return shares.sum() / (whole > 0).sum().clamp(min=1)


def halves(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weights [k] that make means of the even and of the odd groups, by their numbers of tokens.

    >>> halves(torch.tensor([1.0, 2.0, 3.0]))[0]
    tensor([0.2500, 0.0000, 0.7500])
    """
    even = counts * (torch.arange(len(counts), device=counts.device) % 2 == 0)
    odd = counts - even
    return even / even.sum().clamp(min=1e-300), odd / odd.sum().clamp(min=1e-300)


def split_half_cosine(products: Tensor, counts: Tensor) -> Tensor:
    """Return the cosine between the means of the two halves, a scalar; 0 where there is but one group.

    Args:
        products: Gram matrix of the groups' gradients, [k, k] in float64.
        counts: tokens of each group, [k].

    >>> split_half_cosine(torch.ones(4, 4, dtype=torch.float64), torch.ones(4))
    tensor(1., dtype=torch.float64)
    """
    even, odd = (half.to(products) for half in halves(counts))
    sizes = (even @ products @ even) * (odd @ products @ odd)
    cosine: Tensor = (even @ products @ odd) / sizes.sqrt().clamp(min=1e-300)
    return cosine
