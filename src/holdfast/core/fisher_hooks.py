"""Hooks that read what enters and leaves layers, x and δ at real tokens, and make Fishers of it.

`Moments` makes Kronecker factors: x counts as it enters, so nothing waits for the backward pass, and layers that are
called one after another with the very same tensor share one factor. `Samples` keeps x until its δ is there, and adds
an example's tokens up to its gradient. `fisher.py` runs the passes that they read.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..functional import named
from ..functional.fisher import Factor, Kronecker
from ..functional.moments import Moment
from ..functional.packed_fishers import LayerFisher
from ..functional.sample_gram import SampleGram, compress
from .distributed import all_reduce_sum, gather, rank, world_size
from .errors import NotYetSupported
from .types import FisherSpec


@dataclass(frozen=True)
class Layer:
    """The linear map of a layer, as the base model runs it, and [out, in] of its weight."""

    module: nn.Module
    shape: tuple[int, int]
    like: Tensor  # on the layer's device; in float64 if the layer is


@dataclass(frozen=True)
class Tokens:
    """Which of a layer's inputs count, and whose they are.

    Attributes:
        shape: of the tokens that the layer runs on.
        owners: number in the set of each counted token's row, [N].
        places: of the counted tokens among all of them, [N]; None: all count.
    """

    shape: tuple[int, ...]
    owners: Tensor
    places: Tensor | None = None

    @classmethod
    def of(cls, real: Tensor, first: int) -> Tokens:
        """Return the tokens of a pass whose real ones are given, bool [B, T], and the number of its first row."""
        owners = real.nonzero()[:, 0] + first
        return cls(tuple(real.shape), owners, None if len(owners) == real.numel() else real.flatten().nonzero()[:, 0])

    def fit(self, x: Tensor) -> bool:
        """Return whether these are the tokens that x [..., d] is of."""
        return tuple(x.shape[:-1]) in (self.shape, (math.prod(self.shape),))

    def take(self, values: Tensor) -> Tensor:
        """Return the counted rows of [..., d], [N, d]."""
        rows = values.detach().flatten(0, -2)
        return rows if self.places is None else rows[self.places]


class Reader(ABC):
    """Reads what enters and leaves layers, and makes a Fisher of it.

    Args:
        layers: by name.
    """

    def __init__(self, layers: Mapping[str, Layer]) -> None:
        self.layers = layers

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Context: hooks are on the layers."""
        hooks = [
            layer.module.register_forward_hook(partial(self._ran, name), with_kwargs=True)
            for name, layer in self.layers.items()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def begin(self, tokens: Tokens) -> None:
        """Take note of the tokens that the layers will run on now."""
        self._tokens = tokens

    def _ran(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        x: Tensor = args[0] if args else next(iter(kwargs.values()))
        if not self._tokens.fit(x) or not output.requires_grad:
            raise NotYetSupported(
                f"{name} does not run on the tokens of the batch (inputs of shape {list(x.shape)} in a pass of shape "
                f"{list(self._tokens.shape)}), as an expert or another encoder does not. Leave it out of `select`."
            )
        self._entered(name, x)
        kept = x.detach() if self.pairs else None
        output.register_hook(partial(self._left, name, self._tokens, kept))  # type: ignore[no-untyped-call]

    pairs = False  # whether `_left` is given x too: it is kept until the backward pass then

    def _entered(self, name: str, x: Tensor) -> None:
        """Read what enters a layer."""

    @abstractmethod
    def _left(self, name: str, tokens: Tokens, x: Tensor | None, delta: Tensor) -> None:
        """Read the gradient at what leaves a layer."""

    @abstractmethod
    def fisher(self) -> dict[str, LayerFisher]:
        """Return the normalised Fisher of each layer, the same on every process: a collective call."""


class Moments(Reader):
    """Kronecker factors, whole or their diagonals."""

    def __init__(self, layers: Mapping[str, Layer], spec: FisherSpec) -> None:
        super().__init__(layers)
        diagonal = spec.kind == "diagonal"
        self.out, self.into = (
            {
                name: Moment(layer.shape[side], spec.keep, diagonal=diagonal, device=layer.like.device)
                for name, layer in layers.items()
            }
            for side in (0, 1)
        )
        self._whose: dict[str, str] = {}  # the layer whose inputs are this one's too
        self._last: tuple[str, Tensor] | None = None

    def begin(self, tokens: Tokens) -> None:
        super().begin(tokens)
        self._last = None

    def _entered(self, name: str, x: Tensor) -> None:
        if name not in self._whose:  # in the first pass
            before = self._last[0] if self._last is not None and self._last[1] is x else None
            self._whose[name] = self._whose[before] if before is not None else name
        self._last = name, x
        if self._whose[name] == name:
            self.into[name].add(self._tokens.take(x))

    def _left(self, name: str, tokens: Tokens, x: Tensor | None, delta: Tensor) -> None:
        self.out[name].add(tokens.take(delta))

    def fisher(self) -> dict[str, LayerFisher]:
        self._last = None
        whose = json.loads(gather(json.dumps(self._whose))[0])  # a process without rows has seen no layer
        _refuse_unseen(self.layers, whose)
        factors: dict[str, Factor] = {}
        for name in dict.fromkeys(whose.values()):
            self.into[name].reduce(all_reduce_sum, rank(), world_size())
            factors[name] = self.into[name].factor().normalised()
        fisher: dict[str, LayerFisher] = {}
        for name, moment in self.out.items():
            moment.reduce(all_reduce_sum, rank(), world_size())
            fisher[name] = Kronecker(moment.factor().normalised(), factors[whose[name]])
        return fisher


class Samples(Reader):
    """The gradients of single examples, in factors."""

    pairs = True

    def __init__(self, layers: Mapping[str, Layer], keep: int, rows: int) -> None:
        super().__init__(layers)
        self.keep, self._seen = keep, set[tuple[str, int]]()
        self._sides = {
            name: tuple(named.wide(layer.like.detach()).new_zeros(rows, keep, size) for size in layer.shape)
            for name, layer in layers.items()
        }

    def _left(self, name: str, tokens: Tokens, x: Tensor | None, delta: Tensor) -> None:
        assert x is not None  # self.pairs
        x, delta = tokens.take(x), tokens.take(delta)
        for row in tokens.owners.unique_consecutive().tolist():  # type: ignore[no-untyped-call]
            if (name, row) in self._seen:
                raise NotYetSupported(f"{name} runs several times in a forward: kind='samples' does not add those up.")
            self._seen.add((name, row))
            mine = tokens.owners == row
            parts = compress(delta[mine], x[mine], self.keep)
            for side, part in zip(self._sides[name], parts, strict=True):
                side[row] = part

    def fisher(self) -> dict[str, LayerFisher]:
        _refuse_unseen(self.layers, json.loads(gather(json.dumps(sorted({name for name, _ in self._seen})))[0]))
        return {
            name: SampleGram(*(all_reduce_sum(side) for side in sides)).normalised()
            for name, sides in self._sides.items()
        }


def _refuse_unseen(layers: Iterable[str], seen: Iterable[str]) -> None:
    if lost := [name for name in layers if name not in set(seen)]:
        raise NotYetSupported(
            f"{lost[0]} did not run on the retain data ({len(lost)} such layers), so nothing is known of its Fisher. "
            "Leave it out of the method's `select`."
        )
