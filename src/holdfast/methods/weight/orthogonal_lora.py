"""O-LoRA: learn in directions that earlier learning does not use (Wang et al., arXiv 2310.14152).

    published   strength · Σ_layers Σ_jk |(A_earlier Aᵀ)_jk|      of the factors A, whatever B makes of them
    default     strength · Σ_layers ‖dW P‖²                       of the update, P an orthonormal basis of these rows

P spans the rows of an earlier adapter's A, or, where there is none, the leading input directions of retain data. The
default is zero at B = 0 and invariant under (B R, R⁻¹ A); the published form is neither, so it acts from the first step
and can be satisfied by turning A while B grows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...core.errors import WrongSetup
from ...core.layers import LowRankUpdate
from ...core.registry import register
from ...core.types import Auto, NamedTensors, Setup, State, Weights
from ...functional.fisher import Kronecker
from ...functional.lowrank import LowRank, Update
from ...functional.named import wide
from .fisher_method import FisherMethod, UpdateMethod


@register("orthogonal_lora")
@dataclass(frozen=True, kw_only=True)
class OrthogonalLoRA(FisherMethod):
    """Penalise an update for reading the same inputs as earlier learning.

    Attributes:
        strength: 1e-2 of the default form; the paper's code takes 0.5 of the published one.
        earlier: folder of a saved PEFT adapter, whose A is the earlier learning; None: the `directions` leading input
            directions of the `data` sets.
        directions: of retain data, with `earlier=None`.
        as_published: the paper's penalty on A; needs `earlier`.

    >>> OrthogonalLoRA().directions
    8
    """

    strength: float | Auto = 1e-2
    earlier: str | None = None
    directions: int = 8
    as_published: bool = False

    def faults(self) -> Iterator[str]:
        yield from super().faults()
        if not isinstance(self.directions, int) or not 1 <= self.directions <= self.keep:
            yield f"directions must be a whole number from 1 to keep={self.keep}, got {self.directions!r}"
        if self.kind != "kronecker":
            yield f"input directions are those of a Kronecker factor: use kind='kronecker', got {self.kind!r}"
        if self.as_published and self.earlier is None:
            yield "as_published compares A with an earlier adapter's: name its folder, earlier='...'"

        for setting in ("rotated", "compare"):
            if getattr(self, setting):
                yield f"{setting} is of no use here: only input directions are read, got {getattr(self, setting)!r}"

    def _reads_data(self) -> bool:
        return self.earlier is None

    def init(self, setup: Setup) -> State:
        state = UpdateMethod.init(self, setup)
        if self.earlier is not None:
            rows = _factors(Path(self.earlier), [update.layer for update in setup.updates])
            device = next(iter(setup.params.values())).device
            found = {layer: wide(a).to(device) for layer, a in rows.items()}
            if not self.as_published:
                found = {layer: torch.linalg.qr(a.T)[0] for layer, a in found.items()}
            return state | {f"earlier/{layer}": tensor.contiguous() for layer, tensor in found.items()}
        sets = list(setup.fishers(self.data, self.spec).values())
        for layer in {update.layer for update in setup.updates}:
            leading = []
            for fishers in sets:
                fisher = fishers[layer]
                assert isinstance(fisher, Kronecker)  # faults() sees to it
                assert fisher.into.vectors is not None
                leading.append(fisher.into.vectors[:, : self.directions])
            state[f"earlier/{layer}"] = torch.linalg.qr(torch.cat(leading, 1))[0].contiguous()
        return state

    def penalty(self, state: State, weights: Weights) -> Tensor:
        if self.as_published:
            terms = [
                (state[f"earlier/{u.layer}"] @ wide(u.a).T).abs().sum()
                for u in weights.updates
                if isinstance(u, LowRankUpdate)
            ]
        else:
            terms = [
                _inside(update, state[f"earlier/{layer}"]) for layer, update in self.updates(state, weights).items()
            ]
        return self.strength * torch.stack(terms).sum()


def _inside(update: Update, basis: Tensor) -> Tensor:
    """Return ‖dW P‖² for P [in, r]."""
    if isinstance(update, LowRank):
        right = update.right @ basis.to(update.right)
        return ((update.left.T @ update.left) * (right @ right.T)).sum()
    return (update.delta @ basis.to(update.delta)).square().sum()


def _factors(folder: Path, layers: list[str]) -> NamedTensors:
    """Return the factor A of each layer of a saved adapter."""
    from safetensors.torch import load_file

    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        raise WrongSetup(f"orthogonal_lora: {file} is not there; earlier=... is the folder of a saved PEFT adapter.")
    stored = load_file(file)
    found = {layer: stored[key] for layer in layers if (key := f"{layer}.lora_A.weight") in stored}
    if lost := [layer for layer in layers if layer not in found]:
        raise WrongSetup(
            f"orthogonal_lora: {file} has no factor A for {len(lost)} of the layers that are trained ({lost[0]}, ...). "
            "Train on the same layers, or narrow `select`."
        )
    return found
