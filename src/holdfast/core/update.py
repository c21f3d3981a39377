"""Watches an optimizer: what its step moved, and the metric in which it measured that move.

A step's update holds everything the optimizer does: momentum, preconditioner, weight decay. So a method that corrects
the update (`apply_to="update"`) keeps its promise under any optimizer, and the moments stay those of the raw gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .distributed import local
from .errors import NeverSupported, WrongSetup
from .types import NamedTensors

STEP_IN_BACKWARD = ("LayerWiseDummyOptimizer", "Lomo", "AdaLomo")


class Watch:
    """Hooks on an optimizer's step.

    Args:
        optimizer: a torch optimizer, not a wrapper.
        before: called ahead of every step that the optimizer really takes (a gradient scaler may skip some).
        after: called when the parameters have moved.

    Raises:
        WrongSetup: if the object has no step hooks.
        NeverSupported: if the optimizer steps inside the backward pass.
    """

    def __init__(self, optimizer: Any, before: Callable[[], None], after: Callable[[], None]) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise WrongSetup(
                f"{type(optimizer).__name__} is no torch.optim.Optimizer, so its step cannot be watched and a gradient "
                "method could not see the update. Pass the optimizer itself, not a wrapper."
            )
        if type(optimizer).__name__ in STEP_IN_BACKWARD:
            raise NeverSupported(
                f"{type(optimizer).__name__} takes its steps inside the backward pass, so a gradient method would "
                "silently do nothing. Use an optimizer that steps after it (GaLore without '_layerwise', AdamW)."
            )
        self.optimizer = optimizer
        self._hooks = [
            optimizer.register_step_pre_hook(lambda *_: before()),
            optimizer.register_step_post_hook(lambda *_: after()),
        ]

    def remove(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()


def inner_optimizer(optimizer: Any) -> Any:
    """Return the torch optimizer inside accelerate's wrapper, or the object itself."""
    while not isinstance(optimizer, torch.optim.Optimizer) and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    if type(optimizer).__name__ == "AcceleratedOptimizer":  # it is a torch Optimizer by name, its hooks never fire
        optimizer = optimizer.optimizer
    return optimizer


def metric(optimizer: torch.optim.Optimizer, params: NamedTensors) -> NamedTensors:
    """Return the diagonal D with which the optimizer turns a gradient into a step: learning rate / (√v + ε), or rate.

    D is 0 where a parameter has had no gradient yet (v = 0): there D = rate/ε would let a correction move, without
    bound, exactly the coordinates that the task never touched.

    Raises:
        WrongSetup: for an optimizer whose metric holdfast does not know.
    """
    kind = type(optimizer)
    if kind not in (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD):
        raise WrongSetup(
            f"metric='optimizer' knows Adam, AdamW and SGD, and this is {kind.__module__}.{kind.__name__}. "
            "Use metric='euclidean', which holds under any optimizer."
        )
    names, found = {id(p): name for name, p in params.items()}, NamedTensors()
    for group in optimizer.param_groups:
        for p in group["params"]:
            if id(p) not in names:
                continue
            state, values = optimizer.state.get(p, {}), local(p).detach()
            if kind is torch.optim.SGD:
                found[names[id(p)]] = torch.ones_like(values, dtype=torch.float32).mul_(group["lr"])
            elif "exp_avg_sq" not in state:
                found[names[id(p)]] = torch.zeros_like(values, dtype=torch.float32)
            else:
                found[names[id(p)]] = _adam(state, group)
    return {name: found[name] for name in params}


def _adam(state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    squares = local(state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]).float()
    # a fused optimizer keeps its step on the device, where it stays: a number of it would wait for every tensor
    corrected = squares / (1 - group["betas"][1] ** torch.as_tensor(state["step"]).double())
    return torch.where(squares > 0, group["lr"] / (corrected.sqrt() + group["eps"]), 0.0)
