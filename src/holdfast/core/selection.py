"""Which parameters a method acts on, and which weight updates they form.

Parameters go by the names that the unwrapped model gives them. Low-rank updates are read off PEFT's LoRA layers by
their attributes (`lora_A`, `lora_B`, `scaling`), so that this room needs no PEFT.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import cast

from torch import Tensor, nn

from .errors import WrongSetup
from .layers import DenseUpdate, LowRankUpdate
from .types import NamedTensors

MOVES_BASE_INTO_ADAPTER = ("pissa", "olora", "corda", "lora_ga")  # W' + s B A = W at the start
CHANGES_BASE = ("loftq",)  # the start is not W either
FORMS_THE_SAME_UPDATE = ("mica", "velora")  # PEFT's variants that freeze B, or compress what the backward pass keeps
COPY = r"\.modules_to_save\.[^.]+"  # in the name of a layer that PEFT copied in order to train it


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
    """Return the updates dW = scale · B A whose two factors are both in the model's active adapters.

    Args:
        model: the unwrapped model.
        params: the selected parameters; an update is returned if either factor is among them.
    """
    selected = {id(p) for p in params.values()}
    configs = adapter_configs(model)
    updates = []
    for name, module in model.named_modules():
        for kind in ("lora", "lora_embedding"):
            factors = getattr(module, f"{kind}_A", None), getattr(module, f"{kind}_B", None)
            if any(factor is None for factor in factors):
                continue
            for adapter in getattr(module, "active_adapters", []):
                a, b = (_factor(factor, adapter) for factor in factors)
                if a is not None and b is not None and (id(a) in selected or id(b) in selected):
                    scale = float(getattr(module, "scaling", {}).get(adapter, 1.0))
                    variant = _variant(module, adapter, configs.get(adapter))
                    updates.append(LowRankUpdate(f"{name}.{adapter}", name, a, b, scale, variant))
    return updates


def _factor(factors: object, adapter: str) -> Tensor | None:
    if isinstance(factors, nn.ModuleDict | nn.ParameterDict) and adapter in factors:
        factor: object = factors[adapter]
        return cast(Tensor, getattr(factor, "weight", factor))
    return None


def adapter_configs(model: nn.Module) -> Mapping[str, object]:
    """Return PEFT's configurations of a model's adapters, by their names; none if it has no adapter."""
    found = (module.peft_config for module in model.modules() if isinstance(getattr(module, "peft_config", None), dict))
    return cast(Mapping[str, object], next(found, {}))


def _variant(module: nn.Module, adapter: str, config: object) -> str:
    """Name what makes the change of the base weights another one than s · B A; empty for LoRA as it was meant."""
    base = linear_map(module)
    if isinstance(base, nn.Embedding | nn.MultiheadAttention | nn.modules.conv._ConvNd):
        return type(base).__name__.lower()
    if hasattr(module, "parameter_name"):
        return "target_parameters"  # LoRA on a bare parameter, such as the stacked experts of a mixture
    family = getattr(config, "peft_type", "LORA")
    if (family := str(getattr(family, "value", family)).lower()) != "lora":
        return family
    start = str(getattr(config, "init_lora_weights", "")).lower()
    if moves := [name for name in MOVES_BASE_INTO_ADAPTER + CHANGES_BASE if start.startswith(name)]:
        return moves[0]
    # PEFT has a class for every variant: DoraLinearVariant, KasaLinearVariant, ...
    kind = type(getattr(module, "lora_variant", {}).get(adapter)).__name__
    name = re.sub(r"(Linear|Embedding)?Variant$", "", kind).lower()
    return "" if name in ("nonetype", *FORMS_THE_SAME_UPDATE) else name


def layer_updates(model: nn.Module, params: NamedTensors) -> list[LowRankUpdate | DenseUpdate]:
    """Return the weight updates that selected parameters form: of adapters, then of linear layers trained themselves.

    A weight that several layers share (a head tied to the embeddings) counts as the update of each linear one.

    Args:
        model: the unwrapped model.
        params: the selected parameters.
    """
    names = {id(p): name for name, p in params.items()}
    adapters = {name for name, module in model.named_modules() if hasattr(module, "base_layer")}
    dense = []
    for name, module in model.named_modules():
        if not (isinstance(module, nn.Linear) or _is_conv1d(module)) or _is_part(name, adapters):
            continue
        weight = cast(Tensor, module.weight)
        if id(weight) in names:
            dense.append(DenseUpdate(names[id(weight)], re.sub(COPY, "", name), weight, _is_conv1d(module)))
    return [*low_rank_updates(model, params), *dense]


def _is_part(name: str, adapters: Container[str]) -> bool:
    """Return whether a module belongs to an adapter, not to the model that it adapts."""
    parts = name.split(".")
    above = next((i for i in range(len(parts) - 1, 0, -1) if ".".join(parts[:i]) in adapters), 0)
    return above > 0 and parts[above] != "base_layer"


def base_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters and stored buffers of the base model inside the adapters, by name."""
    adapters = {name for name, module in model.named_modules() if hasattr(module, "base_layer")}
    copies = re.compile(rf"{COPY}|\.token_adapter\.")
    for name, value in model.state_dict(keep_vars=True).items():
        if isinstance(value, Tensor) and not copies.search(name) and not _is_part(name, adapters):
            yield name, value


def _is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D"  # transformers' linear map with a weight [in, out], in GPT-2


def why_off_is_not_base(config: object) -> str:
    """Say why switching off an adapter with this configuration of PEFT's does not give the base; empty where it does.

    Biases and whole copies that are trained beside an adapter are another question: see `why_no_scale`.
    """
    if getattr(config, "is_prompt_learning", False):
        return "prompt learning has no switch: its virtual tokens are part of the input"
    init = str(getattr(config, "init_lora_weights", True)).lower()
    if init.startswith(MOVES_BASE_INTO_ADAPTER):
        return f"the initialisation {init!r} moved a part of the base weights into the adapter"
    if init.startswith(CHANGES_BASE) or getattr(config, "kasa_config", None) is not None:
        return f"the initialisation {init if init.startswith(CHANGES_BASE) else 'KaSA'!r} changed the base weights"
    return ""


def why_no_scale(config: object) -> str:
    """Say why scale 0 of an adapter with this configuration would not be the base; empty where it is."""
    if why := why_off_is_not_base(config):
        return why
    if (bias := getattr(config, "bias", "none")) != "none":
        return f"biases of the base are trained in place (bias: {bias}), and they are no part of the adapter"
    for name in ("modules_to_save", "trainable_token_indices"):
        if getattr(config, name, None):
            return f"{name} trains whole weights beside the adapter, which no scale reaches"
    return ""


def linear_map(module: nn.Module) -> nn.Module:
    """Return the module of the base model inside an adapter's layer, or the module itself."""
    inner: Callable[[], nn.Module] | None = getattr(module, "get_base_layer", None)
    return inner() if inner is not None else module


def adapter_layers(model: nn.Module) -> list[nn.Module]:
    """Return the layers of adapters, and the copies of layers that are trained beside them: all that can be off."""
    return [module for module in unwrap(model).modules() if hasattr(module, "_disable_adapters")]


@contextmanager
def adapters_off(model: nn.Module, layers: Sequence[nn.Module] | None = None) -> Iterator[None]:
    """Switch every adapter layer off by its own flag, and back to what it was.

    PEFT's `disable_adapter()` gives the same logits, but it also sets `requires_grad` on all factors of the active
    adapter afterwards, which would thaw factors that the user or a variant (LoRA-FA) has frozen.

    Args:
        model: in whatever wrappers.
        layers: its `adapter_layers`, where they are known.
    """
    layers = adapter_layers(model) if layers is None else layers
    before = [layer._disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True  # type: ignore[assignment]
    try:
        yield
    finally:
        for layer, flag in zip(layers, before, strict=True):
            layer._disable_adapters = flag


def thawed(weights: Sequence[tuple[str, Tensor]]) -> str | None:
    """Return the name of the first of these weights that is trained, if one is."""
    return next((name for name, weight in weights if weight.requires_grad), None)
