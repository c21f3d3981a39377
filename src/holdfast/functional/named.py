"""Arithmetic on dict[str, Tensor]: sums run in float32 at least, whatever the tensors' own dtype.

>>> import torch
>>> dot({"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([3.0, 4.0])})
tensor(11.)
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

Named = Mapping[str, Tensor]


def wide(tensor: Tensor) -> Tensor:
    """Return the tensor in float32, or in float64 if it is that already."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def clone(tensors: Named) -> dict[str, Tensor]:
    """Return detached copies."""
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def dot(x: Named, y: Named) -> Tensor:
    """Return the sum over names of x . y, a scalar.

    Raises:
        ValueError: if the two have different names.
    """
    _same_names(x, y)
    return torch.stack([torch.sum(wide(x[name]) * wide(y[name])) for name in x]).sum()


def squared_norm(x: Named) -> Tensor:
    """Return |x|^2, a scalar.

    >>> squared_norm({"w": torch.tensor([3.0]), "b": torch.tensor([4.0])})
    tensor(25.)
    """
    return dot(x, x)


def squared_distance(x: Named, y: Named) -> Tensor:
    """Return |x - y|^2, a scalar, differentiable with respect to both.

    >>> squared_distance({"w": torch.tensor([3.0])}, {"w": torch.tensor([1.0])})
    tensor(4.)
    """
    _same_names(x, y)
    return torch.stack([torch.sum((wide(x[name]) - wide(y[name])) ** 2) for name in x]).sum()


def add_scaled(x: Named, scale: Tensor | float, y: Named) -> dict[str, Tensor]:
    """Return x + scale · y, each tensor in x's own dtype.

    >>> add_scaled({"w": torch.tensor([1.0])}, 2.0, {"w": torch.tensor([3.0])})
    {'w': tensor([7.])}
    """
    _same_names(x, y)
    return {name: (wide(x[name]) + scale * wide(y[name])).to(x[name].dtype) for name in x}


def _same_names(x: Named, y: Named) -> None:
    if x.keys() != y.keys():
        odd = sorted(x.keys() ^ y.keys())
        raise ValueError(f"The two sets of tensors have different names: {odd[:3]}{'...' if len(odd) > 3 else ''}.")


def flatten(x: Named, like: Named | None = None) -> Tensor:
    """Return all numbers of x as one vector, in the order of `like` (zeros where x has no such name).

    >>> flatten({"b": torch.tensor([[3.0], [4.0]])}, {"a": torch.zeros(1), "b": torch.zeros(2, 1)})
    tensor([0., 3., 4.])
    """
    if (whole := _shared(list(x.values()))) is not None and (like is None or like.keys() == x.keys()):
        return whole
    parts = [wide(x[name] if name in x else torch.zeros_like(p)).reshape(-1) for name, p in (like or x).items()]
    return torch.cat(parts)


def _shared(tensors: list[Tensor]) -> Tensor | None:
    """Return the flat buffer that these are the consecutive pieces of (`views` made them), if they are: no copy."""
    base, place = tensors[0]._base if tensors else None, 0
    if base is None or base.dim() != 1 or base.dtype not in (torch.float32, torch.float64):
        return None
    for tensor in tensors:
        if tensor._base is not base or tensor.storage_offset() != place or not tensor.is_contiguous():
            return None
        place += tensor.numel()
    return base if place == base.numel() else None


def views(vector: Tensor, like: Named) -> dict[str, Tensor]:
    """Return the pieces of a flat vector in the shapes of `like`; the inverse of `flatten`.

    >>> views(torch.tensor([1.0, 2.0, 3.0]), {"a": torch.zeros(1), "b": torch.zeros(2, 1)})["b"].shape
    torch.Size([2, 1])
    """
    pieces = torch.split(vector, [p.numel() for p in like.values()])
    return {name: piece.view(p.shape) for (name, p), piece in zip(like.items(), pieces, strict=True)}
