"""A method protects the model in one of three spaces; the space fixes the one hook it writes.

| space    | base class       | hook                         | called                                         |
|----------|------------------|------------------------------|------------------------------------------------|
| output   | `OutputMethod`   | `loss(state, outputs)`       | every micro-batch; joins the task loss         |
| weight   | `WeightMethod`   | `penalty(state, weights)`    | once per optimizer step; its gradient is added |
| gradient | `GradientMethod` | `transform(state, step)`     | once per optimizer step; the last word         |

plus one shared `init(setup) -> state`, called again every `refresh_every` steps. A whole method:

    @register("l2_sp")
    @dataclass(frozen=True, kw_only=True)
    class L2SP(WeightMethod):
        strength: float = 1e-2

        def init(self, setup):
            return named.clone(setup.params)

        def penalty(self, start, weights):
            return 0.5 * self.strength * named.squared_distance(weights.params, start)

The dataclass is the configuration: frozen, and validated when it is made. State is a dict of tensors, kept, saved and
restored by the session. A method of strength 0 is never called, so it cannot change a run. With `strength="auto"` and a
budget the session finds the strength, and calls a copy of the method that has it: a hook always sees a number.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import ClassVar, Literal, get_args

from torch import Tensor

from ..functional.divergence import Divergence
from .budget_settings import EVERY, KL, budget_faults, is_auto, parted
from .errors import ConfigError
from .types import Auto, Outputs, Setup, State, Step, Weights

Space = Literal["output", "weight", "gradient"]
ApplyTo = Literal["gradient", "update"]
Stream = Literal["task", "retain"]


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """What all methods share: a strength, the parameters acted on, and how often the state is made anew.

    Attributes:
        strength: weight of the loss, penalty or transform; 0 switches the method off entirely. `auto`: found while
            training, for output and weight methods (docs/budget.md).
        select: glob patterns over names of trainable parameters; the default is all of them.
        refresh_every: optimizer steps between two calls of `init`; None calls it once.
        budget: of `strength="auto"`: how far the student may drift, KL(base || student) in nats a token, measured on
            retain sequences that are held out; or {name: number} for a measure that the host is given.
        budget_every: optimizer steps between two measurements of it.
        uses_retain: whether this configuration reads retain data; on the class, whether the default one does.

    Raises:
        ConfigError: with every fault of the configuration at once.
    """

    name: ClassVar[str] = ""
    space: ClassVar[Space]
    uses_retain: ClassVar[bool] = False

    strength: float | Auto = 1.0
    select: tuple[str, ...] = ("*",)
    refresh_every: int | None = None
    budget: float | Mapping[str, float] | None = None
    budget_every: int = EVERY

    def __post_init__(self) -> None:
        patterns: object = self.select  # recipes speak YAML, which has no tuples
        object.__setattr__(self, "select", (patterns,) if isinstance(patterns, str) else tuple(self.select))
        if isinstance(self.budget, Mapping) and len(self.budget) == 1:
            object.__setattr__(self, "budget", parted(self.budget))  # as a pair, which can be hashed
        if faults := list(self.faults()):
            raise ConfigError(type(self).__name__, faults)

    def faults(self) -> Iterator[str]:
        """Yield a sentence for every setting that is wrong; subclasses add theirs to `super().faults()`."""
        yield from budget_faults(self.strength, self.budget, self.budget_every)
        if self.is_auto:
            pass
        elif not isinstance(self.strength, int | float) or isinstance(self.strength, bool):
            yield f"strength must be a number, or 'auto' with a budget, got {self.strength!r}"
        elif not (math.isfinite(self.strength) and self.strength >= 0):
            yield f"strength must be finite and >= 0, got {self.strength}"
        if not self.select or not all(isinstance(pattern, str) for pattern in self.select):
            yield f"select must hold at least one glob pattern, got {self.select!r}"
        if self.refresh_every is not None and (not isinstance(self.refresh_every, int) or self.refresh_every < 1):
            yield f"refresh_every must be a whole number >= 1 or None, got {self.refresh_every!r}"

    @property
    def is_auto(self) -> bool:
        """Whether the strength is found while training, so that drift stays within the budget."""
        return is_auto(self.strength)

    @property
    def needs_held_out(self) -> bool:
        """Whether the strength is found by the KL on retain sequences that are held out."""
        return self.is_auto and parted(self.budget)[0] == KL

    def init(self, setup: Setup) -> State:
        """Return the method's state: tensors by name, an empty dict by default."""
        return {}

    def state_bytes(self, parameters: int) -> int:
        """Return about how much memory the state will take for so many selected parameters."""
        return 0

    def due(self, state: State, step: int) -> bool:
        """Return whether `init` runs again before step `step` (it always runs before the first)."""
        return self.refresh_every is not None and step % self.refresh_every == 0

    @property
    def uses_reference(self) -> bool:
        """Whether the method needs the frozen base."""
        return False

    def describe(self) -> str:
        """Return the configuration in one line, as `explain()` and the ledger show it."""
        left_out = ("select",) if self.is_auto else ("select", "budget", "budget_every")
        settings = ", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if f.name not in left_out)
        return f"{self.name or type(self).__name__}({settings})"


@dataclass(frozen=True, kw_only=True)
class OutputMethod(Method):
    """Acts on what the model says: adds a loss on hidden states that enter the head.

    Attributes:
        on: the stream that is read. `task`: the host's own batches; `retain`: sequences of the retain data, which the
            session runs beside them in the same step. They have no prompt: every token that follows another counts.
        share: of a step's sequences, how many are retain sequences: 0.25 puts 4 beside every 12 of the task, and at
            least one into each step. For `on="retain"` alone; methods on the retain stream share its sequences.
        data: names of the retain sets whose sequences are read; empty: all of them. For `on="retain"` alone.
        cache: keep what the base says of these sequences on disk, made before the first step, instead of running the
            base on them in every step; the result is the same to rounding. For `on="retain"` alone.
        reference_share: of the task's sequences, on how many the base runs and the loss is computed, drawn anew in
            every step: the loss is divided by it, so it is right in expectation. For `on="task"` alone.
        samples_pool: whether a host that is given no retain data samples some from the base.
    """

    space: ClassVar[Space] = "output"
    samples_pool: ClassVar[bool] = False
    on: Stream = "task"
    share: float = 0.25
    data: tuple[str, ...] = ()
    cache: bool = True
    reference_share: float = 1.0

    def __post_init__(self) -> None:
        names: object = self.data  # recipes speak YAML, which has no tuples
        object.__setattr__(self, "data", (names,) if isinstance(names, str) else tuple(self.data))
        super().__post_init__()
        object.__setattr__(self, "uses_retain", self.on == "retain")  # of this configuration, not of the class

    def faults(self) -> Iterator[str]:
        yield from super().faults()
        if self.on not in get_args(Stream):
            yield f"on must be one of {', '.join(get_args(Stream))}, got {self.on!r}"
        if not isinstance(self.share, int | float) or isinstance(self.share, bool) or not 0 < self.share < 1:
            yield f"share must be a number between 0 and 1, got {self.share!r}"
        for name in ("share", "data", "cache") if self.on == "task" else ():
            if (value := getattr(self, name)) != getattr(OutputMethod, name):
                yield f"{name}={value!r} is of retain sequences, which on='task' does not read: set on='retain' with it"
        of_base: object = self.reference_share
        if not isinstance(of_base, int | float) or isinstance(of_base, bool) or not 0 < of_base <= 1:
            yield f"reference_share must be a number above 0, and at most 1, got {of_base!r}"
        elif self.on == "retain" and of_base != 1:
            yield (
                f"reference_share={of_base!r} is of the task's sequences: on='retain' reads others, and how many of "
                "them join a step is `share`"
            )
        if self.cache not in (True, False):
            yield f"cache must be true or false, got {self.cache!r}"
        if not all(isinstance(name, str) for name in self.data):
            yield f"data must name retain sets, got {self.data!r}"

    @property
    def uses_reference(self) -> bool:
        return True

    def statistic(self) -> Divergence | None:
        """Return the divergence whose token sum is all that the method asks of the base; None if there is more."""
        return None

    @abstractmethod
    def loss(self, state: State, outputs: Outputs) -> Tensor:
        """Return a scalar that joins the task loss: a token sum times `outputs.per_token(positions)`."""


def needs_reference(method: Method) -> bool:
    """Return whether this method will act and needs the frozen base, if only to measure drift from it."""
    return bool(method.strength) and (method.uses_reference or method.needs_held_out)


def needs_retain(method: Method) -> bool:
    """Return whether this method will act and needs retain data, if only to measure drift on it."""
    return bool(method.strength) and (method.uses_retain or method.needs_held_out)


def samples_pool(method: Method) -> bool:
    """Return whether a host that has no retain data for this method samples some from the base."""
    of_itself = isinstance(method, OutputMethod) and method.samples_pool
    return bool(method.strength) and (of_itself or (method.needs_held_out and not method.uses_retain))


@dataclass(frozen=True, kw_only=True)
class WeightMethod(Method):
    """Acts on where the weights go: adds the gradient of a penalty, once per optimizer step."""

    space: ClassVar[Space] = "weight"

    @abstractmethod
    def penalty(self, state: State, weights: Weights) -> Tensor:
        """Return a scalar in float32, differentiable with respect to `weights.params`."""


@dataclass(frozen=True, kw_only=True)
class GradientMethod(Method):
    """Acts on how the weights move: rewrites the gradients, or the update that the optimizer made of them.

    Attributes:
        apply_to: `gradient`: after all penalties, before the host clips; `update`: after the optimizer's step, so that
            momentum, preconditioner and weight decay are covered, and its moments stay those of the raw gradient.
    """

    space: ClassVar[Space] = "gradient"
    strength: float = 1.0  # a number: see `faults`
    apply_to: ApplyTo = "gradient"

    def faults(self) -> Iterator[str]:
        yield from super().faults()
        if self.apply_to not in ("gradient", "update"):
            yield f"apply_to must be 'gradient' or 'update', got {self.apply_to!r}"
        if self.is_auto:
            yield (
                "strength cannot be 'auto' in the gradient space: a transform bends the steps to come, at most wholly, "
                "and brings back nothing that has drifted, so no strength keeps to a budget. Give a number, and the "
                "budget to an output or weight method beside it"
            )

    @abstractmethod
    def transform(self, state: State, step: Step) -> Step:
        """Return the step with a new direction (`dataclasses.replace(step, direction=...)`)."""

    def leakage(self, state: State, step: Step) -> Tensor | None:
        """Return which share of the update that was really made lies in what is protected; None: nothing is.

        The session logs it as `leakage` after every optimizer step, whatever `apply_to` is.
        """
        return None
