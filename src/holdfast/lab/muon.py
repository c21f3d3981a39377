"""Muon: momentum whose matrices are made orthogonal before each step, so that every direction learns at once.

    M <- mu M + (1 - mu) G,   W <- (1 - lr wd) W - lr sqrt(max(1, rows / columns)) orth((1 - mu) G + mu M)

(Jordan et al., 2024.) torch has its own from version 2.9, in bfloat16 and one matrix at a time; this one
stacks equal shapes, in float32, for older torch and the CPU. Read next: `build`.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby

import torch
from torch import Tensor


def orthogonal(matrices: Tensor, steps: int = 5) -> Tensor:
    """Nearly orthogonal matrices with the same singular vectors, by a Newton-Schulz iteration: [stack, rows, columns].

    >>> _, s, _ = torch.linalg.svd(orthogonal(torch.randn(1, 8, 4, generator=torch.Generator().manual_seed(0))))
    >>> bool(((s > 0.6) & (s < 1.3)).all())
    True
    """
    x = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x


class Muon:
    """The optimizer of the lab's weight matrices.

    Args:
        params: Matrices; those of one shape are stepped together.
        momentum: How much of the past is kept.
        weight_decay: Times the learning rate, the share of each weight that is taken away per step.
    """

    def __init__(self, params: Iterable[Tensor], momentum: float = 0.95, weight_decay: float = 0.1) -> None:
        ordered = sorted(params, key=lambda p: tuple(p.shape))
        self.groups = [list(group) for _, group in groupby(ordered, key=lambda p: tuple(p.shape))]
        self.moments = [torch.zeros(len(group), *group[0].shape) for group in self.groups]
        self.momentum, self.weight_decay = momentum, weight_decay

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Move every matrix along its orthogonalized momentum."""
        for group, moment in zip(self.groups, self.moments, strict=True):
            gradient = torch.stack([p.grad for p in group if p.grad is not None])
            moment.lerp_(gradient, 1 - self.momentum)
            rows, columns = group[0].shape
            update = orthogonal(gradient.lerp(moment, self.momentum)) * max(1.0, rows / columns) ** 0.5
            for weight, change in zip(group, update, strict=True):
                weight.mul_(1 - learning_rate * self.weight_decay).add_(change, alpha=-learning_rate)
