"""Repairs a trained adapter: what it wrote where the base had nothing like it is scaled down, after training.

    W0 + dW = Σⱼ sⱼ uⱼ vⱼᵀ        dW <- dW + (factor - 1) Σ_intruders sⱼ uⱼ vⱼᵀ

Intruders are the strong uⱼ that are unlike every singular vector of W0 (`holdfast.functional.intruders`). After
Shuttleworth et al. (arXiv 2410.21228), who find that much of LoRA's forgetting goes with them; the formula is that of
PEFT's `reduce_intruder_dimension`, which cuts the result to the adapter's rank. Here nothing is cut.

Read next: `posthoc`, the other baselines that act after training.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..core.errors import ConfigError, WrongSetup
from ..core.layers import LowRankUpdate
from ..core.selection import linear_map, low_rank_updates, unwrap
from ..functional.intruders import intruders
from ..functional.lowrank import LowRank

PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Types of a base weight that can be decomposed as it is."""


@contextmanager
def repair_intruders(
    model: nn.Module, factor: float, *, threshold: float = 0.5, top: int = 10
) -> Iterator[dict[str, int]]:
    """Context: the intruder dimensions of every LoRA layer have `factor` times their strength.

    They belong to W0 + dW, so at factor 0 a little of the base goes with them: that is not the base model. The repaired
    update has a higher rank than the adapter, one more for each intruder. It is held as longer factors A and B, in the
    adapter's own type, so that everything which reads the adapter sees it: the forward, a merge, `scale_adapter` inside
    this context. (`scale_adapter` around it repairs the scaled adapter, which is another thing.) Afterwards the very
    same parameters are back; do not save the adapter inside.

    Every context takes two singular value decompositions a layer: moments for the lab's model, on a CPU a second or two
    for each layer of some thousand rows.

    Args:
        model: in PEFT or a wrapper around it, its adapter plain LoRA on linear layers.
        factor: between 0 (intruders are taken out) and 1 (nothing changes).
        threshold: a direction is an intruder if its cosine with every one of the base is below this.
        top: how many singular vectors of W0 + dW are looked at in a layer, the strongest first.

    Yields:
        How many intruders there are, by layer; a warning says so if there are none at all.

    Raises:
        ConfigError: lists every argument that is out of its range.
        WrongSetup: lists every reason why this adapter cannot be repaired: no LoRA is active, it is DoRA or another
            variant, on an embedding or a convolution, merged or switched off; the base is quantised or sharded.
    """
    faults = [f"factor must be between 0 and 1, got {factor}"] * (not 0 <= factor <= 1)
    faults += [f"threshold must be between 0 and 1, got {threshold}"] * (not 0 < threshold < 1)
    faults += [f"top must be at least 1, got {top}"] * (not top >= 1)
    if faults:
        raise ConfigError("repair_intruders", faults)
    model = unwrap(model)
    counts: dict[str, int] = {}
    before: list[tuple[Any, nn.Parameter]] = []
    try:
        for update, weight in _plain_updates(model):
            part = _intruders(update, weight, threshold, top)
            counts[update.layer] = part.left.shape[1]
            if counts[update.layer] and factor != 1:
                factors = _factors(model, update)
                before += [(each, each.weight) for each in factors]
                _lengthen(*factors, part, (factor - 1) / update.scale)
        if not any(counts.values()):
            where = f"none of {len(counts)} layers has one among its {top} strongest directions"
            warnings.warn(f"repair_intruders: nothing to repair, {where} (threshold {threshold}).", stacklevel=3)
        yield counts
    finally:
        for each, weight in before:
            each.weight = weight


@torch.no_grad()
def _intruders(update: LowRankUpdate, weight: Tensor, threshold: float, top: int) -> LowRank:
    return intruders(weight, update.change({}), threshold=threshold, top=top)


def _factors(model: nn.Module, update: LowRankUpdate) -> tuple[Any, Any]:
    """The modules that hold A and B of an update."""
    layer, adapter = cast(Any, model.get_submodule(update.layer)), update.name.removeprefix(f"{update.layer}.")
    return layer.lora_A[adapter], layer.lora_B[adapter]


@torch.no_grad()
def _lengthen(a: Any, b: Any, part: LowRank, strength: float) -> None:
    """Give A more rows and B more columns, so that B A grows by strength · part."""
    a.weight, b.weight = (
        nn.Parameter(torch.cat([old, more.to(old)], dim), requires_grad=False)
        for old, more, dim in ((a.weight, part.right, 0), (b.weight, strength * part.left, 1))
    )


def _plain_updates(model: nn.Module) -> list[tuple[LowRankUpdate, Tensor]]:
    """Every update of the active adapter with its base weight [out, in].

    Raises:
        WrongSetup: lists every reason why not.
    """
    updates = low_rank_updates(model, dict(model.named_parameters()))
    if not updates:
        raise WrongSetup("repair_intruders: the model has no active LoRA adapter. Put one on it with PEFT, or load it.")
    found, reasons = [], dict[str, list[str]]()
    for update in updates:
        layer: Any = model.get_submodule(update.layer)
        weight: Any = getattr(linear_map(layer), "weight", None)
        for reason in _reasons(update, layer, weight):
            reasons.setdefault(reason, []).append(update.layer)
        if isinstance(weight, Tensor):
            found.append((update, weight.T if getattr(layer, "fan_in_fan_out", False) else weight))
    if reasons:
        told = [f"\n  - {why} ({len(where)} layers, {where[0]} first)" for why, where in reasons.items()]
        raise WrongSetup(f"repair_intruders cannot repair this adapter:{''.join(told)}")
    return found


def _reasons(update: LowRankUpdate, layer: Any, weight: Any) -> Iterator[str]:
    """Why the tuned weight of a layer is not W0 + s · B A, with W0 at hand."""
    if update.variant:
        yield f"{update.variant} is not plain LoRA on a linear layer; scale_adapter may do"
    elif type(weight) is not nn.Parameter or weight.dtype not in PLAIN:
        yield "the base weight is quantised or sharded; load the base unquantised, on one device"
    if getattr(layer, "merged", False):
        yield "the adapter is merged into the base; call model.unmerge_adapter() first"
    if getattr(layer, "disable_adapters", False):
        yield "the adapter is switched off; switch it on first"
    if len(layer.active_adapters) > 1:
        yield f"{len(layer.active_adapters)} adapters are active; choose one with model.set_adapter(name)"
