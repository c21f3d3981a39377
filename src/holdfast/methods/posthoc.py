"""What acts on a trained adapter instead of on its training: the baselines that every method has to beat.

scaling      dW <- factor · dW, of any adapter whose scale 0 is the base
SafeLoRA     dW_l <- C_l dW_l for the layers where dW_l and C_l dW_l are least alike,
             C_l = V_l V_lᵀ / ‖V_l‖_F, V_l = W_aligned - W_unaligned        (Hsu et al., arXiv 2405.16833)

Read next: `intruder_dimensions`, the third of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import NeverSupported, WrongSetup
from ..core.selection import adapter_configs, low_rank_updates, trainable, unwrap, why_no_scale
from ..functional.lowrank import LowRank, inner
from ..functional.named import wide


@contextmanager
def scale_adapter(model: nn.Module, factor: float) -> Iterator[None]:
    """Context: every adapted layer keeps `factor` of its change, W + factor · (W' - W).

    A layer of LoRA's or AdaLoRA's does so by its own number s. Any other (DoRA with its magnitudes, VeRA, RandLoRA,
    IA3) runs with its adapter and without, and gives what lies between: the same for a linear map, at twice the price.
    Such a layer cannot be merged inside the context, where it would go into the weights whole; and whatever the layer,
    the factor is not saved: do not save the adapter inside.

    Args:
        model: in PEFT or a wrapper around it.
        factor: 0 is the base model, 1 changes nothing; between the two lies what any method must beat.

    Raises:
        WrongSetup: if the model has no LoRA adapter or other one on its layers, or 0 would not be the base: PiSSA and
            its like, trained biases, whole layers trained beside the adapter, an adapter that is merged. Inside the
            context: if a layer is merged whose change is not a number times something.
    """
    inner = unwrap(model)
    layers: list[Any] = [module for module in inner.modules() if hasattr(module, "_disable_adapters")]
    if not layers:
        raise WrongSetup("scale_adapter: the model has no LoRA adapter, nor any other on its layers.")
    if factor != 1:
        _refuse_what_no_scale_reaches(inner, layers)
    by_number = [layer for layer in layers if _number_is_all(layer)]
    others = [layer for layer in layers if not _number_is_all(layer) and factor != 1]
    before = [dict(layer.scaling) for layer in by_number]
    hooks = [layer.register_forward_hook(_part_of_the_way(factor), with_kwargs=True) for layer in others]
    try:
        for layer, scaling in zip(by_number, before, strict=True):
            layer.scaling.update({name: factor * value for name, value in scaling.items()})
        for layer in others:
            layer.merge = _refuse_to_merge
        yield
    finally:
        for layer, scaling in zip(by_number, before, strict=True):
            layer.scaling.update(scaling)
        for hook in hooks:
            hook.remove()
        for layer in others:
            vars(layer).pop("merge", None)  # uncovers the class's own


def _refuse_to_merge(*_: object, **__: object) -> None:
    raise WrongSetup(
        "scale_adapter: this kind of adapter is scaled in the forward, so merging it inside the context would put the "
        "whole of it into the weights. Merge it outside, or scale plain LoRA, whose number s goes with it."
    )


def _number_is_all(layer: Any) -> bool:
    """Say whether a layer's change is s times something: one of PEFT's LoRA layers without a variant such as DoRA."""
    return getattr(layer, "lora_variant", None) == {}


def _refuse_what_no_scale_reaches(model: nn.Module, layers: Sequence[Any]) -> None:
    why = next(filter(None, map(why_no_scale, adapter_configs(model).values())), "")
    if any(getattr(layer, "merged", False) for layer in layers):
        why = "an adapter is merged into the base weights; call model.unmerge_adapter() first"
    if why:
        raise WrongSetup(
            f"scale_adapter: scale 0 would not be the base: {why}. Measure the adapter as it is (1), or train one "
            "that leaves the base alone (init_lora_weights: true, bias: none, no modules_to_save)."
        )


def _part_of_the_way(factor: float) -> Callable[..., Tensor]:
    """Return the forward hook that gives `factor` of an adapted layer's change."""

    def hook(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], whole: Tensor) -> Tensor:
        off, layer._disable_adapters = layer._disable_adapters, True
        try:
            base = layer.forward(*args, **kwargs)
        finally:
            layer._disable_adapters = off
        return torch.lerp(base, whole, factor)  # exact at both ends

    return hook


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
        NeverSupported: for an adapter whose change of the base weights is not s · B A (PiSSA, DoRA, SineLoRA, ...).
        WrongSetup: if there is no LoRA adapter, one is merged, a layer of it is not in both sets of weights, or
            alignment did not change it.
    """
    inside = unwrap(model)
    updates = low_rank_updates(inside, trainable(model))
    if not updates:
        raise WrongSetup("safe_lora: no LoRA adapter is trained in this model. Give it with its adapter, unfrozen.")
    if variants := sorted({update.variant for update in updates} - {""}):
        raise NeverSupported(
            f"safe_lora on {', '.join(variants)}: the change of the base weights is not s · B A, so a projection of B "
            "would not project it. Use plain LoRA."
        )
    if any(getattr(module, "merged", False) for module in inside.modules()):
        raise WrongSetup("safe_lora: the adapter is merged into the base weights. Call model.unmerge_adapter() first.")
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
