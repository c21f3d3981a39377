"""What acts on a trained adapter instead of on its training: the baselines that every method has to beat.

scaling      dW <- factor · dW
SafeLoRA     dW_l <- C_l dW_l for the layers where dW_l and C_l dW_l are least alike,
             C_l = V_l V_lᵀ / ‖V_l‖_F, V_l = W_aligned - W_unaligned        (Hsu et al., arXiv 2405.16833)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..core.errors import WrongSetup
from ..core.selection import low_rank_updates, trainable, unwrap
from ..functional.lowrank import LowRank, inner
from ..functional.named import wide


@contextmanager
def scale_adapter(model: nn.Module, factor: float) -> Iterator[None]:
    """Context: every active LoRA update is `factor` times what it was, s · B A -> factor · s · B A.

    Args:
        model: in PEFT or a wrapper around it.
        factor: 0 is the base model, 1 changes nothing; between the two lies what any method must beat.

    Raises:
        WrongSetup: if the model has no LoRA adapter.
    """
    layers = [module for module in unwrap(model).modules() if hasattr(module, "lora_B") and hasattr(module, "scaling")]
    if not layers:
        raise WrongSetup("scale_adapter: the model has no LoRA adapter.")
    before = [dict(cast(Mapping[str, float], layer.scaling)) for layer in layers]
    try:
        for layer, scaling in zip(layers, before, strict=True):
            cast(Any, layer).scaling.update({name: factor * value for name, value in scaling.items()})
        yield
    finally:
        for layer, scaling in zip(layers, before, strict=True):
            cast(Any, layer).scaling.update(scaling)


@torch.no_grad()
def safe_lora(
    model: nn.Module,
    aligned: Mapping[str, Tensor],
    unaligned: Mapping[str, Tensor],
    *,
    threshold: float = 0.35,
    layers: int | None = None,
) -> list[str]:
    """Project a trained adapter onto what alignment changed, where the two are least alike; B is changed in place.

    Args:
        model: with its trained adapter active.
        aligned: weights of the aligned model, [out, in] by layer name (`model.layers.0.self_attn.q_proj`).
        unaligned: those of the model before it was aligned.
        threshold: project layers whose update has a lower cosine with its projection than this (0.35 in the public
            code).
        layers: instead, project this many layers: those of lowest cosine.

    Returns:
        Names of the projected layers.

    Raises:
        WrongSetup: if a layer of the adapter is not in both sets of weights, or alignment did not change it.
    """
    updates = low_rank_updates(unwrap(model), trainable(model))
    measured: list[tuple[float, str, Tensor, Tensor]] = []
    for update in updates:
        name = next((key for key in aligned if update.layer.endswith(key)), None)
        if name is None or name not in unaligned:
            raise WrongSetup(f"safe_lora: no weight of {update.layer} among those of the two models.")
        difference = wide(aligned[name] - unaligned[name]).to(update.b.device)
        if not difference.any():
            raise WrongSetup(f"safe_lora: alignment did not change {name}, so there is nothing to project onto.")
        projected = difference @ (difference.T @ update.b.to(difference)) / difference.norm()
        whole = LowRank.of(update.a, update.b, update.scale)
        part = LowRank.of(update.a, projected, update.scale)
        cosine = inner(whole, part) / (inner(whole, whole) * inner(part, part)).sqrt().clamp(min=1e-30)
        measured.append((float(cosine), update.layer, update.b, projected))
    measured.sort(key=lambda each: each[0])
    chosen = [each for each in measured if each[0] < threshold] if layers is None else measured[:layers]
    for _, _, b, projected in chosen:
        b.copy_(projected)
    return [layer for _, layer, _, _ in chosen]
