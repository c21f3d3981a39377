"""Arithmetic on dict[str, Tensor]: sums run in float32 at least, whatever the tensors' own dtype.

>>> import torch
>>> dot({"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([3.0, 4.0])})
tensor(11.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

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
    total: Tensor = _SquaredDistance.apply(len(x), *x.values(), *(y[name] for name in x))  # type: ignore[no-untyped-call]
    return total


class _SquaredDistance(torch.autograd.Function):
    """|x - y|² of n tensors each: keeps the differences and nothing else, and takes all tensors in one pass."""

    @staticmethod
    def forward(ctx: Any, n: int, *tensors: Tensor) -> Tensor:
        wider = [wide(tensor) for tensor in tensors]
        differences = torch._foreach_sub(wider[:n], wider[n:])
        ctx.save_for_backward(*differences)
        ctx.of_y = any(ctx.needs_input_grad[n + 1 :])
        return torch.stack([difference.square().sum() for difference in differences]).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        of_x = torch._foreach_mul(ctx.saved_tensors, 2 * upstream)
        return None, *of_x, *(torch._foreach_neg(of_x) if ctx.of_y else [None] * len(of_x))


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

    Where they lie one after the other in float32 already (`views` left them so, or a host keeps its gradients so) the
    vector is that memory itself, else a copy.

    >>> flatten({"b": torch.tensor([[3.0], [4.0]])}, {"a": torch.zeros(1), "b": torch.zeros(2, 1)})
    tensor([0., 3., 4.])
    """
    order = x if like is None else like
    if order.keys() == x.keys() and (whole := _shared([x[name] for name in order])) is not None:
        return whole
    return torch.cat([wide(x[name] if name in x else torch.zeros_like(p)).reshape(-1) for name, p in order.items()])


def _shared(tensors: list[Tensor]) -> Tensor | None:
    """Return the memory that these fill one after the other, as a vector, if they do."""
    if not tensors:
        return None
    first, end = tensors[0], tensors[0].storage_offset()
    memory = first.untyped_storage().data_ptr()
    for tensor in tensors:
        apart = tensor.untyped_storage().data_ptr() != memory or tensor.storage_offset() != end
        other = tensor.dtype != first.dtype or tensor.requires_grad or not tensor.is_contiguous()
        if apart or other or tensor.dtype not in (torch.float32, torch.float64):
            return None
        end += tensor.numel()
    return first.as_strided((end - first.storage_offset(),), (1,))


def views(vector: Tensor, like: Named) -> dict[str, Tensor]:
    """Return the pieces of a flat vector in the shapes of `like`; the inverse of `flatten`.

    >>> views(torch.tensor([1.0, 2.0, 3.0]), {"a": torch.zeros(1), "b": torch.zeros(2, 1)})["b"].shape
    torch.Size([2, 1])
    """
    pieces = torch.split(vector, [p.numel() for p in like.values()])
    return {name: piece.view(p.shape) for (name, p), piece in zip(like.items(), pieces, strict=True)}
