"""PCGrad: every objective's gradient loses what conflicts with the others, then all are added (arXiv 2001.06782).

    for each i, for each j != i in random order:  if g_i · g_j < 0:  g_i <- g_i - (g_i · g_j) / |g_j|^2 · g_j
    g = g_task + strength · (sum of the retain sets' g)

Unlike a projection it also *trains* on the retain data: it is replay with surgery, and a baseline for both.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from ...core.method import GradientMethod
from ...core.registry import register
from ...core.types import Setup, State, Step
from ...functional import named
from ...functional.flat import dots


@register("pcgrad")
@dataclass(frozen=True, kw_only=True)
class PCGrad(GradientMethod):
    """Train on retain data too, each objective's gradient without what conflicts with the others.

    Attributes:
        strength: weight of the retain gradients in the sum; 1 is the paper's.
        refresh_every: 1, the paper's: fresh retain gradients every step.
        samples: retain rows behind one gradient, of each retain set.

    >>> PCGrad(samples=8).refresh_every
    1
    """

    uses_retain: ClassVar[bool] = True
    refresh_every: int | None = 1
    samples: int = 4

    def faults(self) -> Iterator[str]:
        yield from super().faults()
        if not isinstance(self.samples, int) or self.samples < 1:
            yield f"samples must be a whole number >= 1, got {self.samples!r}"
        if self.apply_to != "gradient":
            yield "apply_to must be 'gradient': PCGrad adds gradients of other objectives, which is no update's part"

    def init(self, setup: Setup) -> State:
        found = setup.references(list(setup.draw(self.samples, False).values()), "likelihood", 0.0)
        count = 1 + len(found.rows)
        orders = [torch.randperm(count, generator=setup.generator) for _ in range(count)]
        return {"rows": found.rows, "orders": torch.stack(orders)}

    def state_bytes(self, parameters: int) -> int:
        return 4 * parameters  # for each retain set

    def transform(self, state: State, step: Step) -> Step:
        task = named.flatten(step.direction, step.params).float()
        gradients = torch.cat([task[None], state["rows"]])
        products = step.reduce(torch.stack([dots(gradients, each) for each in gradients]))
        # everything below happens in the coordinates of the given gradients: a few numbers, left on their device
        mix = torch.eye(len(gradients), dtype=torch.float64, device=task.device)
        for i, order in enumerate(state["orders"].tolist()):
            for j in order:
                if j != i:
                    mix[i, j] -= (mix[i] @ products[:, j]).clamp(max=0) / products[j, j].clamp(min=1e-300)
        weights = mix[0] + self.strength * mix[1:].sum(0)
        conflicts = (products[0, 1:] < 0).double().mean()
        step.log("conflicts", conflicts)
        summed = named.views(weights.to(task) @ gradients, step.params)
        return replace(step, direction={name: summed[name].to(d.dtype) for name, d in step.direction.items()})
