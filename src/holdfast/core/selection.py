"""Which parameters a method acts on, and which low-rank updates they form.

Parameters go by the names that the unwrapped model gives them. Low-rank updates are read off PEFT's LoRA layers by
their attributes (`lora_A`, `lora_B`, `scaling`), so that this room needs no PEFT.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import cast

from torch import Tensor, nn

from .errors import WrongSetup
from .types import LowRankUpdate, NamedTensors


def unwrap(model: nn.Module) -> nn.Module:
    """Return the module inside `DistributedDataParallel`, `DataParallel` or `torch.compile` wrappers."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = cast(nn.Module, model._orig_mod)
        else:
            return model


def trainable(model: nn.Module, select: Sequence[str] = ("*",)) -> NamedTensors:
    """Return the trainable parameters whose names match a glob pattern of `select`.

    Raises:
        WrongSetup: if none matches; the message shows some of the names there are.
    """
    names: NamedTensors = {name: p for name, p in unwrap(model).named_parameters() if p.requires_grad}
    chosen = {name: p for name, p in names.items() if any(fnmatchcase(name, pattern) for pattern in select)}
    if not chosen:
        shown = ", ".join(list(names)[:3]) or "none: is the model frozen?"
        raise WrongSetup(
            f"No trainable parameter matches {list(select)}. Trainable parameters ({len(names)}): {shown}"
            f"{', ...' if len(names) > 3 else ''}. Change `select`."
        )
    return chosen


def low_rank_updates(model: nn.Module, params: NamedTensors) -> list[LowRankUpdate]:
    """Return the updates dW = scale · B A whose two factors are both in the model's active LoRA adapters.

    Args:
        model: the unwrapped model.
        params: the selected parameters; an update is returned if either factor is among them.
    """
    selected = {id(p) for p in params.values()}
    updates = []
    for name, module in model.named_modules():
        factors_a, factors_b = getattr(module, "lora_A", None), getattr(module, "lora_B", None)
        if not isinstance(factors_a, nn.ModuleDict) or not isinstance(factors_b, nn.ModuleDict):
            continue
        for adapter in getattr(module, "active_adapters", []):
            if adapter not in factors_a:
                continue
            a: Tensor = factors_a[adapter].weight  # type: ignore[assignment]
            b: Tensor = factors_b[adapter].weight  # type: ignore[assignment]
            if id(a) in selected or id(b) in selected:
                scale = float(module.scaling[adapter])
                updates.append(LowRankUpdate(f"{name}.{adapter}", a, b, scale))
    return updates
