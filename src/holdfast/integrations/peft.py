"""Chooses the reference for a model, and proves that it is the base that the user means.

`disable_adapter()` is the base only if the initialisation left the base weights alone: PiSSA, OLoRA, CorDA and LoRA-GA
move part of them into the adapter, LoftQ and KaSA change them for good, `bias="all"` trains them. So: adapter off where
that provably equals the start; a frozen step-0 copy of the adapter where the start is the base but adapter-off is not;
a clear refusal for the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core import selection
from ..core.errors import NeverSupported, WrongSetup
from ..core.method import Method, needs_reference, needs_retain
from ..core.reference import (
    AdapterOff,
    FrozenCopy,
    OtherModel,
    Reference,
    logits_of,
    probe_batch,
    weights_of_base,
)
from ..core.selection import adapter_layers, adapters_off, low_rank_updates, thawed, trainable, unwrap
from ..core.tap import Tap, evaluation
from ..core.transforms import refuse_shards

MOVES_BASE_INTO_ADAPTER, CHANGES_BASE = selection.MOVES_BASE_INTO_ADAPTER, selection.CHANGES_BASE


def is_peft(model: nn.Module) -> bool:
    """Return whether PEFT has put an adapter on the model."""
    return hasattr(unwrap(model), "peft_config")


def tap_and_reference(
    model: nn.Module,
    methods: Sequence[Method],
    choice: str | nn.Module | None,
    *,
    backbone: str | None = None,
    head: str | None = None,
) -> tuple[Tap | None, Reference | None]:
    """Return the tap and the reference that the methods need: both, the tap alone (for reference gradients), or none.

    Raises:
        NeverSupported: for prompt learning, which has no adapter-free forward of the same positions.
        WrongSetup, NotYetSupported: as `Tap` and `choose_reference`.
    """
    refuse_shards(unwrap(model), methods)
    with_reference = any(map(needs_reference, methods))
    if not with_reference and not any(map(needs_retain, methods)):
        return None, None
    if is_peft(model) and getattr(unwrap(model).active_peft_config, "is_prompt_learning", False):
        raise NeverSupported("Prompt learning prepends virtual tokens, so base and student positions do not match.")
    tap = Tap(model, backbone, head)
    return tap, choose_reference(model, choice, tap) if with_reference else None


def choose_reference(model: nn.Module, choice: str | nn.Module | None, tap: Tap) -> Reference:
    """Return the reference that `choice` names, checked.

    Args:
        model: as the host holds it, before its first step.
        choice: `base`: the weights before any adapter; `start`: the model as it is now, adapter included; a folder: an
            adapter or a model saved there; a module: that model; None: the base, if it can be told.
        tap: the model's tap.

    Raises:
        WrongSetup: if the base cannot be had from this model; the message names the way out.
    """
    model = unwrap(model)
    if isinstance(choice, nn.Module):
        return OtherModel(choice)
    if choice not in (None, "base", "start"):
        return _stored_reference(model, Path(str(choice)))
    if choice == "start":
        return FrozenCopy(model)
    if not is_peft(model):
        _refuse_if_stored_weights_differ(model)
        return FrozenCopy(model)
    return _base_of_adapter(model, choice, tap)


def _base_of_adapter(model: nn.Module, choice: str | None, tap: Tap) -> Reference:
    config: Any = model.active_peft_config
    if any(getattr(module, "merged", False) for module in model.modules()):
        raise WrongSetup(
            "An adapter is merged into the base weights, so they are not the base's. Call model.unmerge_adapter() "
            "first, or choose reference='start'."
        )
    init = str(getattr(config, "init_lora_weights", True)).lower()
    if init.startswith(CHANGES_BASE) or getattr(config, "kasa_config", None) is not None:
        raise WrongSetup(
            f"This initialisation ({'KaSA' if not init.startswith(CHANGES_BASE) else init}) changes the base weights "
            "and does not put them back into the adapter, so the base is gone from memory. Choose reference='start' "
            "(the model as it begins), or pass the base: reference='folder or loaded model'."
        )
    _refuse_if_stored_weights_differ(model)
    batch = probe_batch(model)
    with torch.no_grad(), evaluation(model), adapters_off(model):
        off = tap.head(original=True).logits(tap.run((), batch).hidden)
    changed = not _same(logits_of(None, tap, batch), off)
    moved, in_place = init.startswith(MOVES_BASE_INTO_ADAPTER), thawed(weights_of_base(model))
    trains_base = in_place is not None or getattr(config, "bias", "none") != "none"
    if (moved and not _fresh(model)) or (trains_base and changed):
        took = repr(init) if moved else f"what was trained in place ({in_place or 'biases'})"
        raise WrongSetup(
            f"The run begins from a trained adapter, and {took} took the place of base weights, so neither adapter-off "
            "nor the start is the base. Pass the base: reference='folder or loaded model', or choose reference='start' "
            "(the model as it begins)."
        )
    if moved or trains_base:
        return FrozenCopy(model)  # the start is the base; the adapter switched off is not, or soon will not be
    if choice is None and changed:
        raise WrongSetup(
            "The run begins from an adapter that already changes the model, so 'the base' could mean two things. "
            "Choose reference='base' (before the adapter), reference='start' (with it), or a folder."
        )
    return AdapterOff(lambda: adapters_off(model, tap.tree.find(adapter_layers)))


def _fresh(model: nn.Module) -> bool:
    """Say whether an adapter that took part of the base weights is as it was initialised.

    PiSSA, OLoRA, CorDA and LoRA-GA all draw B from a singular or QR decomposition, so its columns are orthogonal; the
    first optimizer step ends that.
    """
    for update in low_rank_updates(model, trainable(model)):
        gram = update.b.detach().float().T @ update.b.detach().float()
        along = gram.diagonal().norm()
        tolerance = 1e-3 if update.b.dtype in (torch.float32, torch.float64) else 3e-2
        if (gram - gram.diagonal().diag()).norm() > tolerance * along:
            return False
    return True


def _same(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> bool:
    size = ours.float().abs().max().clamp(min=1e-3)
    tolerance = tolerance if ours.dtype in (torch.float32, torch.float64) else 2e-2
    return bool((ours.float() - theirs.float()).abs().max() <= tolerance * size)


def _stored_reference(model: nn.Module, folder: Path) -> Reference:
    """Return the reference saved in a folder: an adapter of the same shape, or a whole model."""
    if (folder / "adapter_config.json").is_file() and is_peft(model):
        from peft import load_peft_weights, set_peft_model_state_dict

        now = {name: p.detach().clone() for name, p in trainable(model).items()}
        device = str(next(model.parameters()).device)
        result = set_peft_model_state_dict(model, load_peft_weights(str(folder), device=device))
        reference = FrozenCopy(model)
        with torch.no_grad():
            for name, p in trainable(model).items():
                p.copy_(now[name])
        if result.unexpected_keys:
            raise WrongSetup(
                f"{folder} holds another kind of adapter: it has {result.unexpected_keys[:2]}, unknown here."
            )
        return reference
    if (folder / "config.json").is_file():
        from transformers import AutoModelForCausalLM

        first = next(model.parameters())
        return OtherModel(AutoModelForCausalLM.from_pretrained(folder, dtype=first.dtype).to(first.device))
    raise WrongSetup(
        f"reference={str(folder)!r} is neither 'base', 'start', nor a folder with an adapter (adapter_config.json) or "
        "a model (config.json)."
    )


def _refuse_if_stored_weights_differ(model: nn.Module, most: int = 8) -> None:
    """Compare some base weights with the files that the model says it was loaded from, where they are on this disk.

    This finds what no forward can: an adapter merged and unloaded before, or a PiSSA adapter that is not fresh.
    """
    name_or_path = getattr(getattr(model, "config", None), "_name_or_path", "")
    folder = Path(str(name_or_path))
    if not name_or_path or not (folder / "config.json").is_file():
        return
    from safetensors import safe_open

    inner: nn.Module = model.get_base_model() if is_peft(model) else model  # type: ignore[operator]
    linear = {name: m for name, m in inner.named_modules() if hasattr(m, "base_layer") or isinstance(m, nn.Linear)}
    adapted = {name: m for name, m in linear.items() if hasattr(m, "base_layer")} or linear
    chosen = dict(list(adapted.items())[:: max(1, len(adapted) // most)])
    init = str(getattr(getattr(model, "active_peft_config", None), "init_lora_weights", ""))
    moved = init.lower().startswith(MOVES_BASE_INTO_ADAPTER)
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(str(file), "pt") as stored:
            for name in {f"{n}.weight" for n in chosen} & set(stored.keys()):
                layer: Any = chosen[name.removesuffix(".weight")]
                weight: Tensor = getattr(layer, "base_layer", layer).weight.detach()
                if weight.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
                    continue  # quantised: the stored weight is not what this model computes with
                then = stored.get_tensor(name).to(weight)
                if moved:
                    now = weight.float() + sum(layer.get_delta_weight(a).float() for a in layer.active_adapters)
                    unchanged = _same(then, now, 1e-4)
                else:
                    unchanged = torch.equal(weight, then)
                if weight.shape == then.shape and not unchanged:
                    raise WrongSetup(
                        f"{name} is not what {file} holds: the model was changed since it was loaded (an adapter "
                        "merged into it, or one that is not fresh). Choose reference='start' to keep the model as it "
                        "is now, or pass the true base: reference='folder or loaded model'."
                    )
