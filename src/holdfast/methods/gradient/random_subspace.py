"""A random subspace: the control that a projection must beat.

    d' = d - Q' Q d,   Q [k, P] an orthonormal basis of k random directions

It removes as many directions as `orthogonal_projection` does, and knows nothing of what must be kept. With k of P
directions it takes about k/P of a step: equal rank, not equal energy.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ...core.registry import register
from ...core.types import Setup, State
from ...functional.subspace import span
from .subspace_method import SubspaceMethod, block_sizes


@register("random_subspace")
@dataclass(frozen=True, kw_only=True)
class RandomSubspace(SubspaceMethod):
    """Keep updates out of a subspace of random directions: a control, not a protection.

    Attributes:
        rank: number of directions, as many as the projection has that it is compared with.
        refresh_every: optimizer steps between two draws; 5, as the projection's.

    >>> RandomSubspace(rank=4).apply_to
    'update'
    """

    rank: int = 16
    refresh_every: int | None = 5

    def faults(self) -> Iterator[str]:
        yield from super().faults()
        if not isinstance(self.rank, int) or not 1 <= self.rank <= 32:
            yield f"rank must be a whole number from 1 to 32, got {self.rank!r}"

    def state_bytes(self, parameters: int) -> int:
        return self.rank * parameters * self.bytes_each

    def init(self, setup: Setup) -> State:
        size = sum(p.numel() for p in setup.params.values())
        rows = torch.randn(self.rank, size, generator=setup.generator).to(next(iter(setup.params.values())).device)
        space = span(rows, block_sizes(setup.params, self.scope), reduce=setup.reduce)
        return self.state_of(space, setup.step)
