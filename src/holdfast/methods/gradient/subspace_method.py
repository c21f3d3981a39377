"""What all methods with a protected subspace share: where they project, in which metric, and what they log.

`functional/subspace.py` holds the mathematics. A method says in `init` which gradients (or other directions) span the
subspace; the rest of its life is here. See `orthogonal_projection` (gradients) and `random_subspace` (the control).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import groupby
from typing import Literal

import torch
from torch import Tensor

from ...core.method import ApplyTo, GradientMethod
from ...core.types import NamedTensors, State, Step
from ...functional import named
from ...functional.flat import energy
from ...functional.subspace import Subspace, leakage, project

Scope = Literal["global", "layer", "tensor"]


@dataclass(frozen=True, kw_only=True)
class SubspaceMethod(GradientMethod):
    """Removes from gradients or updates what lies in a subspace.

    Attributes:
        strength: share of it that is removed, in [0, 1].
        apply_to: `update` (the default): nothing of the step that the optimizer really takes lies in the subspace,
            whatever its momentum, preconditioner and weight decay are; `gradient`: the papers' form, exact under plain
            SGD alone.
        metric: `euclidean`: the nearest step, the least that must change; `optimizer` (updates only): nearest in the
            optimizer's own norm, D = rate / (√v + ε) for Adam, so that a step down the task's gradient stays one.
        scope: `global`: one subspace over all parameters, as the theorem has it; `layer` or `tensor`: one in each,
            which removes more (k constraints in every block).
        sides: `two` removes every component; `one` only those that would raise a reference loss.
        storage: of the basis: `float32`, `bfloat16` (half the memory; what is left of a component is at the
            precision of 8 bits, see `leakage`), or `host` (in pinned host memory, sent over every step).
    """

    apply_to: ApplyTo = "update"
    metric: Literal["euclidean", "optimizer"] = "euclidean"
    scope: Scope = "global"
    sides: Literal["two", "one"] = "two"
    storage: Literal["float32", "bfloat16", "host"] = "float32"

    def faults(self) -> Iterator[str]:
        yield from super().faults()
        if isinstance(self.strength, int | float) and self.strength > 1:
            yield f"strength is a share of the component, in [0, 1], got {self.strength}"
        known = {
            "metric": ("euclidean", "optimizer"),
            "scope": ("global", "layer", "tensor"),
            "sides": ("two", "one"),
            "storage": ("float32", "bfloat16", "host"),
        }
        for setting, values in known.items():
            if getattr(self, setting) not in values:
                yield f"{setting} must be one of {', '.join(values)}, got {getattr(self, setting)!r}"
        if self.sides == "one" and find_spec("scipy") is None:
            yield "sides='one' solves a small quadratic program with scipy, which is not installed: pip install scipy"
        if self.metric == "optimizer" and self.apply_to != "update":
            yield "metric='optimizer' measures updates: it needs apply_to='update'"

    @property
    def bytes_each(self) -> int:
        """Bytes that a number of the basis takes."""
        return 2 if self.storage == "bfloat16" else 4

    def state_of(self, space: Subspace, step: int) -> State:
        """Return the state that holds a subspace made before step `step`."""
        basis = space.basis.to(torch.bfloat16) if self.storage == "bfloat16" else space.basis
        if self.storage == "host" and basis.is_cuda:
            basis = basis.cpu().pin_memory()
        return {"basis": basis, "coordinates": space.coordinates, "born": torch.tensor(step)}

    def space_of(self, state: State, params: NamedTensors) -> Subspace:
        """Return the subspace that a state holds."""
        device = next(iter(params.values())).device
        basis = state["basis"].to(device, non_blocking=True)
        return Subspace(basis, state["coordinates"], block_sizes(params, self.scope))

    def demanded(self, state: State, length: Tensor) -> Tensor | None:
        """Return the first-order descent that is demanded of each reference, [blocks, k], by a direction's length.

        None demands none.
        """
        return None

    def transform(self, state: State, step: Step) -> Step:
        direction = named.flatten(step.direction, step.params).float()
        before = step.reduce(energy(direction))
        metric = None
        if self.metric == "optimizer":
            assert step.metric is not None  # faults() sees to it: only updates are measured so
            metric = named.flatten(step.metric(), step.params)
        projected = project(
            self.space_of(state, step.params),
            direction,
            metric=metric,
            sides=self.sides,
            demanded=self.demanded(state, before.sqrt()),
            reduce=step.reduce,
            out=direction if self.strength == 1 else None,  # nobody reads the old one again
        )
        if self.strength != 1:
            projected = torch.lerp(direction, projected, self.strength)
        after = step.reduce(energy(projected))
        step.log("removed", torch.where(before > 0, 1 - after / before, 0.0))
        step.log("age", step.number - int(state["born"]))
        pieces = named.views(projected, step.params)
        return replace(step, direction={name: pieces[name].to(d.dtype) for name, d in step.direction.items()})

    def leakage(self, state: State, step: Step) -> Tensor:
        direction = named.flatten(step.direction, step.params).float()
        return leakage(self.space_of(state, step.params), direction, step.reduce)


def block_sizes(params: NamedTensors, scope: Scope) -> list[int]:
    """Return how many numbers each block of the flattened parameters has.

    A layer is what shares a name up to its first number; what has none (embeddings, say) is a layer of its own.

    >>> block_sizes({"h.0.a": torch.zeros(2), "h.0.b": torch.zeros(1), "h.1.a": torch.zeros(2)}, "layer")
    [3, 2]
    """
    if scope == "global":
        return [sum(p.numel() for p in params.values())]
    if scope == "tensor":
        return [p.numel() for p in params.values()]
    layers = groupby(params.items(), key=lambda item: (re.match(r".*?\.\d+(?=\.)", item[0]) or [item[0]])[0])
    return [sum(p.numel() for _, p in group) for _, group in layers]
