"""What methods log of a step: sums over its micro-batches, then means over steps and processes, for the host's log.

Values stay on the device until the host asks: to log a quantity waits for nothing. Read next: `session`, which owns it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .distributed import all_reduce_sum, world_size


class Metrics:
    """The quantities of a session.

    Args:
        model: on whose device sums are kept.
        names: of the methods, in their order; twins are numbered.
        step: returns the number of the optimizer step.

    >>> metrics = Metrics(nn.Linear(1, 1), ["full_kl", "full_kl"], lambda: 0)
    >>> metrics.log(1, "loss", 0.5)
    >>> metrics.log(1, "loss", 0.25)
    >>> metrics.pop(), metrics.pop()
    ({'holdfast/full_kl.2/loss': 0.75}, {})
    """

    def __init__(self, model: nn.Module, names: Sequence[str], step: Callable[[], int]) -> None:
        self._model, self._step = model, step
        twins = [names[:i].count(name) + 1 for i, name in enumerate(names)]
        self._labels = [name if twin == 1 else f"{name}.{twin}" for name, twin in zip(names, twins, strict=True)]
        self._sums: dict[str, tuple[Tensor, set[int]]] = {}

    def log(self, i: int, name: str, value: Tensor | float, *, scale: float = 1.0) -> None:
        """Add to a quantity of a method, which is named by its place in the list."""
        self.add(f"{self._labels[i]}/{name}", value, scale)

    def add(self, name: str, value: Tensor | float, scale: float = 1.0) -> None:
        """Add to a quantity of this step; micro-batches add up."""
        key, device = f"holdfast/{name}", next(self._model.parameters()).device
        total = torch.as_tensor(value, dtype=torch.float32, device=device).detach() * scale
        before, steps = self._sums.get(key, (torch.zeros_like(total), set()))
        self._sums[key] = (before + total, steps | {self._step()})

    def pop(self) -> dict[str, float]:
        """Return every quantity's mean per optimizer step since the last call, averaged over processes."""
        sums, self._sums = self._sums, {}
        return {
            key: (all_reduce_sum(total) / world_size()).item() / max(len(steps), 1)
            for key, (total, steps) in sums.items()
        }
