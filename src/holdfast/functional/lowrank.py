"""Weight updates dW [out, in], most of them low-rank, and products with them that never form dW.

    dW = left @ right        LoRA: left = s · B [out, r], right = A [r, in]

A difference of two such updates is one of rank r + r', so everything here also holds for parts of an update. All of it
is invariant under (B R, R⁻¹ A), since only products of the two factors enter, and runs in float32 at least.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .named import wide


@dataclass(frozen=True)
class LowRank:
    """dW = left @ right.

    Attributes:
        left: [out, r], with LoRA's scale in it.
        right: [r, in].
    """

    left: Tensor
    right: Tensor

    @classmethod
    def of(cls, a: Tensor, b: Tensor, scale: float) -> LowRank:
        """Return s · B A from LoRA's factors A [r, in] and B [out, r]."""
        return cls(scale * wide(b), wide(a))

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.left.shape[0], self.right.shape[1]

    def between(self, p: Tensor, q: Tensor) -> Tensor:
        """Return Pᵀ dW Q [p, q] for P [out, p] and Q [in, q]."""
        return (p.T @ self.left) @ (self.right @ q)

    def rows(self, start: int, stop: int) -> Tensor:
        """Form some rows of dW, [stop - start, in]."""
        return self.left[start:stop] @ self.right

    def minus(self, other: LowRank) -> LowRank:
        """Return the difference, of rank r + r'."""
        return LowRank(torch.cat([self.left, -other.left], 1), torch.cat([self.right, other.right]))


@dataclass(frozen=True)
class Dense:
    """An update that is there as a whole: of a layer that is trained itself.

    Attributes:
        delta: weights now minus weights at the start, [out, in].
    """

    delta: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.delta.shape[0], self.delta.shape[1]

    def between(self, p: Tensor, q: Tensor) -> Tensor:
        """Return Pᵀ dW Q [p, q] for P [out, p] and Q [in, q]."""
        return p.T @ wide(self.delta) @ q

    def rows(self, start: int, stop: int) -> Tensor:
        """Return some rows of dW, [stop - start, in]."""
        return wide(self.delta[start:stop])

    def minus(self, other: LowRank) -> Dense:
        """Return the difference."""
        return Dense(wide(self.delta) - other.left @ other.right)


Update = LowRank | Dense


def plus(x: Update, y: Update) -> Update:
    """Return the sum; of two low-rank updates, one of rank r + r'."""
    if isinstance(x, LowRank) and isinstance(y, LowRank):
        return LowRank(torch.cat([x.left, y.left], 1), torch.cat([x.right, y.right]))
    return Dense(x.rows(0, x.shape[0]) + y.rows(0, y.shape[0]))


def squared_norm(update: Update) -> Tensor:
    """Return |dW|² (Frobenius), a scalar.

    >>> squared_norm(LowRank(torch.tensor([[2.0], [0.0]]), torch.tensor([[1.0, 2.0]])))
    tensor(20.)
    """
    if isinstance(update, Dense):
        return wide(update.delta).square().sum()
    return ((update.left.T @ update.left) * (update.right @ update.right.T)).sum()


def inner(x: Update, y: Update) -> Tensor:
    """Return <dW_x, dW_y> (Frobenius), a scalar.

    >>> one = LowRank(torch.tensor([[2.0], [0.0]]), torch.tensor([[1.0, 2.0]]))
    >>> inner(one, one)
    tensor(20.)
    """
    if isinstance(x, Dense):
        return (wide(x.delta) * y.rows(0, y.shape[0])).sum()
    if isinstance(y, Dense):
        return inner(y, x)
    return ((x.left.T @ y.left) * (x.right @ y.right.T)).sum()
