"""How much two parts of a weight update collide: in the entries they use, and in direction.

    Riemannian   Σ_j η_j |dW_A,j · dW_T,j|,   η_j = 1 + weight · sigmoid((|dW_j| - threshold) / temperature)
    geodesic     <dW_A, dW_T>² / (|dW_A|² |dW_T|² + ε)

with dW = dW_A + dW_T and entries j; after AlignGuard-LoRA (arXiv 2508.02079), as re-implementations have it. η is a
metric's weight and no target: no gradient flows through it. With temperature 1 it is constant to 0.4 %, as entries of
dW are 1e-4 to 1e-2; threshold and temperature may be taken from dW itself instead. The geodesic overlap of a projection
and its complement is 0 whatever dW is: give it parts from two Fishers, or two adapters. Read next: `fisher.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from .lowrank import Dense, LowRank, Update, inner, plus, squared_norm
from .named import wide

EPSILON = 1e-12  # beside |dW_A|² |dW_T|²: at dW = 0 the overlap is 0, and so is its gradient
SAMPLED = 64  # rows of dW that a quantile and a spread are read from
Weigh = Callable[[Tensor], Tensor]


def geodesic_overlap(part: Update, other: Update, epsilon: float = EPSILON) -> Tensor:
    """Return <dW_A, dW_T>² / (|dW_A|² |dW_T|² + ε), a squared cosine: a scalar in [0, 1).

    No square root, whose slope at 0 is infinite: at dW = 0, where LoRA starts, value and gradient are 0.

    >>> x, y = (LowRank(torch.tensor([[1.0], [0.0]]), torch.tensor([row])) for row in ([1.0, 0.0], [1.0, 1.0]))
    >>> geodesic_overlap(x, y)
    tensor(0.5000)
    """
    return inner(part, other).square() / (squared_norm(part) * squared_norm(other) + epsilon)


def riemannian_overlap(
    part: LowRank,
    rest: Update,
    *,
    weight: float = 4.0,
    threshold: float | None = 0.01,
    quantile: float = 0.5,
    temperature: float | None = 1.0,
    reduction: Literal["mean", "sum"] = "mean",
    signed: bool = False,
    tile: int = 128,
) -> Tensor:
    """Return the mean or sum over entries of η |dW_A · dW_T|, a scalar.

    dW is formed a few rows at a time and never kept: the gradients of the factors are summed in the same pass.

    Args:
        part: dW_A [out, in].
        rest: dW_T [out, in].
        weight: η lies between 1 and 1 + weight.
        threshold: |dW| from which on an entry counts more; None: the quantile of |dW|.
        quantile: in (0, 1), used without a threshold; from up to 2 · `SAMPLED` rows at even distances, always the same.
        temperature: width of the transition; None: the standard deviation of dW in those rows.
        reduction: a mean is smaller than the sum by out · in.
        signed: without the absolute value: unbounded below, so no penalty to train with.
        tile: rows at a time.

    >>> x = LowRank(torch.tensor([[1.0], [0.0]]), torch.tensor([[1.0, 2.0]]))
    >>> riemannian_overlap(x, x, weight=0.0, reduction="sum")
    tensor(5.)
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}.")
    weigh = _metric(part, rest, weight, threshold, quantile, temperature)
    factors = (rest.left, rest.right) if isinstance(rest, LowRank) else (wide(rest.delta), None)
    total: Tensor = _Overlap.apply(weigh, signed, tile, part.left, part.right, *factors)  # type: ignore[no-untyped-call]
    return total / (part.shape[0] * part.shape[1]) if reduction == "mean" else total


@torch.no_grad()
def _metric(
    part: LowRank, rest: Update, weight: float, threshold: float | None, quantile: float, temperature: float | None
) -> Weigh:
    """Return the function from entries of dW to η."""
    middle = width = part.left.new_zeros(())
    if threshold is None or temperature is None:
        step = max(part.shape[0] // SAMPLED, 1)
        some = plus(_every(part, step), _every(rest, step))
        entries = some.rows(0, some.shape[0])
        place = min(int(quantile * entries.numel()) + 1, entries.numel())
        middle = entries.abs().flatten().kthvalue(place).values
        width = entries.std(correction=0).clamp(min=torch.finfo(entries.dtype).tiny)
    middle = middle if threshold is None else middle.new_tensor(threshold)
    width = width if temperature is None else width.new_tensor(temperature)
    return lambda entries: entries.abs().sub_(middle).div_(width).sigmoid_().mul_(weight).add_(1)


def _every(update: Update, step: int) -> Update:
    """Return every step-th row of an update."""
    if isinstance(update, LowRank):
        return LowRank(update.left[::step], update.right)
    return Dense(update.delta[::step])


class _Overlap(torch.autograd.Function):
    """Σ η |A T| over tiles of rows. The slopes of the factors are made in the same pass, so no tile is kept."""

    @staticmethod
    def forward(
        ctx: Any,
        weigh: Weigh,
        signed: bool,
        tile: int,
        part_left: Tensor,
        part_right: Tensor,
        rest_left: Tensor,
        rest_right: Tensor | None,
    ) -> Tensor:
        part = _Side(part_left, part_right, ctx.needs_input_grad[3:5])
        rest = _Side(rest_left, rest_right, ctx.needs_input_grad[5:7])
        total = part_left.new_zeros(())
        with torch.autocast(part_left.device.type, enabled=False):
            for start in range(0, len(part_left), tile):
                rows = slice(start, start + tile)
                a, t = part.rows(rows), rest.rows(rows)
                eta, product = weigh(a + t), a * t
                total += torch.dot(eta.flatten(), (product if signed else product.abs()).flatten())
                slope = eta if signed else eta.mul_(product.sign_())
                part.add(rows, t * slope)
                rest.add(rows, a.mul_(slope))
        ctx.save_for_backward(*part.slopes, *rest.slopes)
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "The Riemannian overlap has no second derivative: its gradient is finished in the forward pass. Do "
                "without create_graph=True."
            )
        return None, None, None, *(None if slope is None else upstream * slope for slope in ctx.saved_tensors)


class _Side:
    """An update in factors, or as a whole if there is no right one, and what is known of their slopes."""

    def __init__(self, left: Tensor, right: Tensor | None, needed: tuple[bool, bool]) -> None:
        self.left, self.right = left, right
        self.of_left = torch.zeros_like(left) if needed[0] else None
        self.of_right = torch.zeros_like(right) if right is not None and needed[1] else None

    @property
    def slopes(self) -> tuple[Tensor | None, Tensor | None]:
        return self.of_left, self.of_right

    def rows(self, rows: slice) -> Tensor:
        return self.left[rows] if self.right is None else self.left[rows] @ self.right

    def add(self, rows: slice, slope: Tensor) -> None:
        """Take in the slope of some rows of the update, [n, in]."""
        if self.of_left is not None:
            self.of_left[rows] = slope if self.right is None else slope @ self.right.T
        if self.of_right is not None:
            self.of_right.addmm_(self.left[rows].T, slope)
