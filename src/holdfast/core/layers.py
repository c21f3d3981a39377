"""The layers that are trained, and the updates dW of their weights: LoRA's factors, or the weight of a layer itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ..functional.lowrank import Dense, LowRank
from ..functional.named import wide


@dataclass(frozen=True)
class LowRankUpdate:
    """One adapted layer's update dW = scale · B A.

    Attributes:
        name: of the layer and its adapter.
        layer: name of the adapted module, without the adapter.
        a: [r, in].
        b: [out, r].
        scale: s, LoRA's or rsLoRA's.
        variant: empty where the change of the base weights is s · B A; `dora`, where that is the change of their
            direction alone; else what makes it another one: an initialisation that moves the base (`pissa`), another
            variant (`kasa`), or a layer that is no linear map (`conv2d`, `embedding`).
    """

    name: str
    layer: str
    a: Tensor
    b: Tensor
    scale: float
    variant: str = ""

    def change(self, start: Mapping[str, Tensor]) -> LowRank:
        """Return dW from the base; `start` is not needed, for the base's own weights are still there."""
        return LowRank.of(self.a, self.b, self.scale)

    def dense(self) -> Tensor:
        """Form dW, [out, in] in float32. For tests and small layers; methods work on the factors."""
        return self.scale * (self.b.float() @ self.a.float())


@dataclass(frozen=True)
class DenseUpdate:
    """The weight of a linear layer that is trained itself: all of it, or the copy that PEFT's `modules_to_save` makes.

    Attributes:
        name: of the parameter.
        layer: name of the module (of PEFT's wrapper, for a copy).
        weight: [out, in], or [in, out].
        transposed: whether it is [in, out], as GPT-2 keeps it.
    """

    name: str
    layer: str
    weight: Tensor
    transposed: bool = False

    def change(self, start: Mapping[str, Tensor]) -> Dense:
        """Return dW = weight - start[name], [out, in]."""
        delta = wide(self.weight) - wide(start[self.name])
        return Dense(delta.T if self.transposed else delta)
