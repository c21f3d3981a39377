"""Task stability of AlignGuard-LoRA (arXiv 2508.02079): a trust region on what alignment does not need.

    strength · ‖H^½ dW_T‖²,  dW_T = dW - dW_A          H = identity: ‖dW_T‖², or a Fisher of task data

dW_A is the part of the update in the m leading directions of the alignment Fisher. In 64 directions out of thousands
lies next to nothing of an update, so with H = identity this is very nearly `update_decay`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ...core.registry import register
from ...core.types import Auto, Setup, State, Weights
from ...functional.fisher import remainder
from .fisher_method import LeadingMethod


@register("task_stability")
@dataclass(frozen=True, kw_only=True)
class TaskStability(LeadingMethod):
    """Penalise the part of the update outside the alignment Fisher's leading directions.

    Attributes:
        strength: 1e-3, as `update_decay`, which it nearly is (the paper's value is not known; 0.5 in one
            re-implementation, whose Fisher has another scale).
        metric: H: `identity`: a trust region; `task`: the Kronecker Fisher of the `task` sets.
        task: names of the retain sets of H, with `metric="task"`.

    >>> TaskStability(metric="task").task
    ('task',)
    """

    strength: float | Auto = 1e-3
    metric: Literal["identity", "task"] = "identity"
    task: tuple[str, ...] = ("task",)

    def _more_sets(self) -> tuple[str, ...]:
        return ("task",)

    def faults(self) -> Iterator[str]:
        yield from super().faults()
        if self.metric not in ("identity", "task"):
            yield f"metric must be one of identity, task, got {self.metric!r}"

    def init(self, setup: Setup) -> State:
        state = super().init(setup)
        return state | self.fisher_state(setup, self.task, "task") if self.metric == "task" else state

    def penalty(self, state: State, weights: Weights) -> Tensor:
        metrics, terms = self.fishers(state, "task"), []
        for layer, update, part in self.parts(state, weights):
            rest, squared = remainder(update, part)
            terms.append(torch.stack([m[layer].quadratic(rest) for m in metrics]).mean() if metrics else squared)
        return self.strength / self.sets(state) * torch.stack(terms).sum()
