"""Adds the gradients of the weight methods' penalties to the gradients of the loss, once per optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from ..functional.named import wide
from .method import WeightMethod
from .selection import layer_updates
from .types import NamedTensors, State, Weights

RATIO_EVERY = 10  # optimizer steps between two `gradient_ratio`, which reads every gradient once more


class Penalties:
    """The weight methods of one session.

    Args:
        model: the bare model.
        methods: with their places in the session's list.
        params: selected parameters of each place.
        log: called with place, name and value.
    """

    def __init__(
        self,
        model: nn.Module,
        methods: Sequence[tuple[int, WeightMethod]],
        params: Sequence[NamedTensors],
        log: Callable[[int, str, Tensor | float], None],
    ) -> None:
        self._methods, self._params, self._log = methods, params, log
        # they hold the parameters themselves, so they are found once
        self._updates = {i: layer_updates(model, params[i]) for i, _ in methods}

    def add(self, states: Sequence[State], number: int) -> None:
        """Add the gradients, and log each penalty; every tenth step also |its gradient| / |the loss's gradient|."""
        shown = self._methods if number % RATIO_EVERY == 0 else []
        before = {i: _norm(p.grad for p in self._params[i].values()) for i, _ in shown}
        for i, method in self._methods:
            params = self._params[i]
            device = next(iter(params.values())).device.type
            with torch.enable_grad(), torch.autocast(device, enabled=False):
                penalty = method.penalty(
                    states[i], Weights(dict(params), self._updates[i], number, partial(self._log, i))
                )
                gradients = torch.autograd.grad(penalty, list(params.values()), allow_unused=True)
            found = [(p, new) for p, new in zip(params.values(), gradients, strict=True) if new is not None]
            if pairs := [(p.grad, new) for p, new in found if p.grad is not None]:
                torch._foreach_add_([gradient for gradient, _ in pairs], [new for _, new in pairs])
            for param, new in found:
                if param.grad is None:
                    param.grad = new.clone()
            self._log(i, "penalty", penalty)
            if i in before:  # 0 where the loss has no gradient
                self._log(i, "gradient_ratio", _norm(gradients) / before[i].where(before[i] > 0, torch.inf))


def _norm(tensors: Iterable[Tensor | None]) -> Tensor:
    """Return the norm of all these together, in float32 at least."""
    squares = [wide(tensor).square().sum().float() for tensor in tensors if tensor is not None]
    return torch.stack(squares).sum().sqrt() if squares else torch.zeros(())
