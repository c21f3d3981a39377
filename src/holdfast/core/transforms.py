"""Runs the gradient methods of a session: on the gradients before the clip, and on the update after the step.

gradients_ready   apply_to="gradient": gradients are rewritten where they lie
before the step   parameters are copied
after the step    apply_to="update": parameters before minus parameters after is rewritten, and put in its place
                  then `leakage`: which share of the update that stands lies in what is protected

Gradients stay where the host put them. An update is made as one vector, of which methods see the pieces by name, and
what a method returns is put in place by one call over all tensors, so nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from ..functional import named
from .distributed import is_sharded, local, reduce_over_shards
from .errors import NotYetSupported, WrongSetup
from .method import GradientMethod, Method
from .types import NamedTensors, State, Step
from .update import Watch, inner_optimizer, metric


class Transforms:
    """The gradient methods of one session.

    Args:
        methods: with their places in the session's list.
        params: selected parameters of each place.
        log: called with place, name and value.
    """

    def __init__(
        self,
        methods: Sequence[tuple[int, GradientMethod]],
        params: Sequence[NamedTensors],
        log: Callable[[int, str, Tensor | float], None],
    ) -> None:
        self._methods, self._params, self._log = methods, params, log
        _refuse_several_devices(methods, params)
        self._reduce = [reduce_over_shards(each.values()) for each in params]
        self._watch: Watch | None = None
        self._states: list[State] | None = None  # from gradients_ready until the optimizer has stepped
        self._number, self._overflow = 0, False
        self._before: NamedTensors = {}

    def watch(self, optimizer: object) -> None:
        """Watch the steps of this optimizer from now on, if there is any method to act on them."""
        optimizer = inner_optimizer(optimizer)
        if not self._methods or (self._watch is not None and self._watch.optimizer is optimizer):
            return
        self.close()
        self._watch = Watch(optimizer, self._before_step, self._after_step)

    def close(self) -> None:
        """Take the hooks off the optimizer."""
        if self._watch is not None:
            self._watch.remove()

    def gradients_ready(self, states: list[State], number: int, *, overflow: bool = False) -> None:
        """Transform gradients, and let the optimizer step.

        Args:
            states: of all methods of the session.
            number: of the optimizer step.
            overflow: gradients are not finite: nothing can be protected, and a gradient scaler will skip the step.

        Raises:
            WrongSetup: if a method corrects updates and no optimizer is watched.
        """
        if self._watch is None and (lost := [m.name for _, m in self._methods if m.apply_to == "update"]):
            raise WrongSetup(f"{lost[0]} corrects updates: call session.watch(optimizer) once, before training.")
        self._states, self._number, self._overflow = states, number, overflow
        for i, method in self._methods if not overflow else ():
            gradients = {name: local(p.grad) for name, p in self._params[i].items() if p.grad is not None}
            if method.apply_to != "gradient" or not gradients:
                continue  # an update is corrected later; or nothing of what it selects was reached by this backward
            with torch.no_grad(), full_precision(gradients):
                new = method.transform(states[i], self._step(i, gradients)).direction
                if changed := [name for name in new if new[name] is not gradients[name]]:
                    torch._foreach_copy_([gradients[name] for name in changed], [new[name] for name in changed])

    def _before_step(self) -> None:
        if self._states is None:
            raise WrongSetup(
                "The optimizer steps, but session.gradients_ready() was not called since its last step, so the methods "
                "would silently do nothing. Call it after the last backward of every step, before clipping."
            )
        chosen = {name: p for i, _ in self._methods for name, p in self._params[i].items()}
        whole = {name: local(p).detach() for name, p in chosen.items()}
        self._before = named.views(_copy(whole), whole)

    @torch.no_grad()
    def _after_step(self) -> None:
        """Correct the update that the optimizer has made, then log how much leaks of the one that stands."""
        assert self._states is not None  # _before_step has seen to it
        methods = self._methods if not self._overflow else ()
        with full_precision(self._before):
            for i, method in methods:
                if method.apply_to == "update":
                    self._correct(i, method, self._states[i])
            for i, method in methods:
                if (share := method.leakage(self._states[i], self._step(i, self._update(i)))) is not None:
                    self._log(i, "leakage", share)
        self._states, self._before = None, {}

    def _correct(self, i: int, method: GradientMethod, state: State) -> None:
        """Put parameters where the transformed update takes them: before minus update, rounded once."""
        update = self._update(i)
        new = method.transform(state, self._step(i, update)).direction
        if changed := [name for name in new if new[name] is not update[name]]:
            places = [local(self._params[i][name]) for name in changed]
            torch._foreach_copy_(places, [self._before[name] for name in changed])
            torch._foreach_sub_(places, [new[name] for name in changed])

    def _update(self, i: int) -> NamedTensors:
        """Return what was subtracted from a method's parameters since the optimizer's step began, in float32."""
        now = {name: local(p).detach() for name, p in self._params[i].items()}
        before, after = named.flatten({name: self._before[name] for name in now}), _copy(now)
        return named.views(torch.sub(before, after, out=after), now)

    def _step(self, i: int, direction: NamedTensors) -> Step:
        params, watch = self._params[i], self._watch
        return Step(
            direction,
            {name: local(p).detach() for name, p in params.items()},
            self._number,
            log=partial(self._log, i),
            metric=None if watch is None else lambda: metric(watch.optimizer, params),
            reduce=self._reduce[i],
        )


def _copy(tensors: NamedTensors) -> Tensor:
    """Return all numbers as one vector of its own memory, in float32 at least."""
    return torch.cat([named.wide(tensor).reshape(-1) for tensor in tensors.values()])


def _refuse_several_devices(methods: Sequence[tuple[int, GradientMethod]], params: Sequence[NamedTensors]) -> None:
    devices = {p.device: name for i, _ in methods for name, p in params[i].items()}
    if len(devices) > 1:
        places = ", ".join(f"{name} on {device}" for device, name in devices.items())
        raise NotYetSupported(
            f"{methods[0][1].name} makes one vector of all parameters that it acts on, and they lie on several devices "
            f"({places}). Put the model on one device (no device_map='auto'), or `select` parameters of one."
        )


def full_precision(tensors: NamedTensors) -> torch.autocast:
    """Context: products in the tensors' own precision, also where the host's loop runs under autocast."""
    return torch.autocast(next(iter(tensors.values())).device.type, enabled=False)


def rescale(params: NamedTensors, factor: float) -> None:
    """Multiply every gradient by a factor."""
    if factor != 1.0 and (gradients := [local(p.grad) for p in params.values() if p.grad is not None]):
        torch._foreach_mul_(gradients, factor)


def finite(params: NamedTensors) -> bool:
    """Say whether all gradients are finite, on all processes: one flag for the model, so one wait for the device."""
    gradients = [g for p in params.values() if p.grad is not None and (g := local(p.grad)).numel()]
    bad = torch.zeros((), device=next(iter(params.values())).device)
    if gradients:
        bad = (~nn.utils.get_total_norm(gradients, float("inf")).isfinite()).float()
    return not reduce_over_shards(params.values())(bad)


def refuse_shards(model: nn.Module, methods: Sequence[Method]) -> None:
    """Raise where FSDP2 holds in parts what an output or weight method needs whole."""
    lost = [m.name for m in methods if m.strength and not isinstance(m, GradientMethod)]
    if lost and any(is_sharded(p) for p in model.parameters()):
        raise NotYetSupported(
            f"{', '.join(lost)} under FSDP2: it reads the head's weight or whole parameters, and each process holds a "
            "part of them. Gradient methods work there; for these use DDP."
        )
