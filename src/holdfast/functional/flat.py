"""Passes over one long vector: the numbers of all parameters, one after the other, and rows of as many.

    c = Q d              `dots`: reads k + 1 numbers a column
    d <- d - D Q' c      `subtract_`: reads k + 1 (k + 2 with a metric), writes one; into d itself

Memory traffic is all that these cost, so nothing as long as d is made on the way, and nothing waits for the device.
Sums are short in float32 and added in float64. `named.flatten` makes such a vector, without a copy where the tensors
are the pieces of one already. Read next: `subspace.py`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

SHORT = 1 << 16  # columns of a float32 sum on a CPU: ten times closer than one long sum
LONG = 1 << 20  # on a GPU, where kernels sum in a tree and each costs a launch


def dots(rows: Tensor, vector: Tensor) -> Tensor:
    """Return rows @ vector, [k] in float64.

    Args:
        rows: [k, P] in any float dtype.
        vector: [P] in float32.

    >>> dots(torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.tensor([3.0, 4.0]))
    tensor([11.,  4.], dtype=torch.float64)
    """
    # element by element on a GPU: its matrix-vector product keeps k of its cores busy, and k is small
    sums = _by_elements if rows.is_cuda else torch.mv
    return torch.stack([sums(part.float(), piece) for part, piece in _pieces(rows, vector)]).double().sum(0)


def _by_elements(rows: Tensor, vector: Tensor) -> Tensor:
    return (rows * vector).sum(1)


def energy(vector: Tensor) -> Tensor:
    """Return |v|² of a vector [P] in float32, a scalar in float64.

    >>> energy(torch.tensor([3.0, 4.0]))
    tensor(25., dtype=torch.float64)
    """
    return dots(vector[None], vector)[0]


def subtract_(vector: Tensor, rows: Tensor, coefficients: Tensor, metric: Tensor | None = None) -> Tensor:
    """Take D Q' c off a vector, in place, and return it.

    Args:
        vector: d [P] in float32.
        rows: Q [k, P] in any float dtype.
        coefficients: c [k].
        metric: D [P]; None is the identity.

    >>> subtract_(torch.tensor([3.0, 4.0]), torch.tensor([[1.0, 0.0]]), torch.tensor([3.0]))
    tensor([0., 4.])
    """
    c = coefficients.to(vector.dtype)
    if metric is None and rows.dtype == vector.dtype:
        return vector.addmv_(rows.T, c, alpha=-1)
    for piece, part, *weights in _pieces(vector, rows, *([] if metric is None else [metric])):
        along = part.to(vector.dtype).T @ c
        piece.sub_(along if metric is None else along.mul_(weights[0]))
    return vector


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Return views of some columns at a time."""
    width = LONG if tensors[0].is_cuda else SHORT
    return zip(*(torch.split(tensor, width, dim=-1) for tensor in tensors), strict=True)
