"""A model in training as the two sides of a comparison, and the promise that measuring it leaves no trace.

    base:  the model with its adapters off, where that is the base; a frozen copy made before the first step, where all
           weights are trained; else a model that the user gives
    tuned: the model itself

Read next: `watch_callback`, which measures both; `sides`, the same for finished models in folders.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..core import selection
from ..core.digest import digest, name_in_base
from ..core.errors import WrongSetup
from ..core.reference import probe_batch
from ..core.selection import adapters_off, base_weights, trainable
from ..core.tap import evaluation
from ..drift.models import Side
from ..integrations.peft import is_peft

Precision = Callable[[], AbstractContextManager[None]]


def why_off_is_not_base(model: nn.Module) -> str:
    """Say why switching adapters off does not give the base back; empty where it does.

    Args:
        model: with an adapter of PEFT's, unwrapped.
    """
    if any(getattr(module, "merged", False) for module in model.modules()):
        return "an adapter is merged into the base weights"
    configs: Any = model.peft_config
    if why := next(filter(None, map(selection.why_off_is_not_base, configs.values())), ""):
        return why
    if moving := [name for name, weight in base_weights(model) if weight.requires_grad]:
        return f"{len(moving)} of the base's own weights are trained too, such as {moving[0]}"
    return ""


def refuse_lost_base(model: nn.Module, base: nn.Module | None) -> None:
    """Refuse an adapter that cannot be switched off, unless there is a base beside it.

    Raises:
        WrongSetup: says why, and the way out.
    """
    if base is None and is_peft(model) and (why := why_off_is_not_base(model)):
        raise WrongSetup(
            f"Drift is measured from the base, and switching the adapter off does not give it back: {why}. Pass the "
            "base as a model of its own: holdfast.watch(..., base=AutoModelForCausalLM.from_pretrained(...))."
        )


def base_side(model: nn.Module, other: nn.Module | None, precision: Precision) -> tuple[Side, str]:
    """Return the context in which the base answers, and the digest of its weights.

    Args:
        model: in training, unwrapped.
        other: the base, where it is another model.
        precision: makes the context of the trainer's own autocast.
    """
    if other is not None:
        return always(other, precision), digest(other.state_dict())
    weights = {name_in_base(name): value for name, value in base_weights(model)}

    @contextmanager
    def off() -> Iterator[nn.Module]:
        with precision(), adapters_off(model):
            yield model

    return off, digest(weights)


def always(model: nn.Module, precision: Precision) -> Side:
    """The model as it is."""

    @contextmanager
    def side() -> Iterator[nn.Module]:
        with precision():
            yield model

    return side


def frozen_copy(model: nn.Module, precision: Precision) -> nn.Module:
    """The model as it is now, for good: the memory of a whole model.

    Raises:
        WrongSetup: if the copy does not answer as the model does.
    """
    twin = copy.deepcopy(model).requires_grad_(False).eval()
    for module in twin.modules():
        # trainers put forwards of their own on a model (TRL's fused loss, autocast), and those of a copy still lead to
        # the model in training
        vars(module).pop("forward", None)
    ours, theirs = (logits(one, precision) for one in (model, twin))
    if ours.shape != theirs.shape or (ours - theirs).abs().max() > 2e-2 * ours.abs().max().clamp(min=1e-3):
        raise WrongSetup(
            "All weights are trained, and a copy of the model does not answer as the model does (its forward was "
            "replaced?). Pass the base: holdfast.watch(..., base=AutoModelForCausalLM.from_pretrained(...))."
        )
    return twin


def logits(model: nn.Module, precision: Precision) -> torch.Tensor:
    """Logits on a few tokens, in evaluation mode: equal for equal models, not finite for one that diverged."""
    with precision(), torch.no_grad(), evaluation(model):
        said: torch.Tensor = model(**probe_batch(model), use_cache=False).logits
        return said.float()


def tuned_digest(model: nn.Module, of: str) -> str:
    """The digest of what is trained, on the base with the digest `of`."""
    return digest(trainable(model), of=of)


def shares_weights(model: nn.Module, other: nn.Module) -> bool:
    """Say whether some weights of two models are the same tensors, so that training one moves both."""
    ours = {weight.data_ptr() for weight in model.parameters() if weight.numel()}
    return any(weight.data_ptr() in ours for weight in other.parameters() if weight.numel())


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Put random states and `requires_grad` flags back as they were, whatever probes and judges do with them."""
    flags = [(weight, weight.requires_grad) for weight in model.parameters()]
    device = next(model.parameters()).device
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
            for weight, flag in flags:
                weight.requires_grad_(flag)


def tokenizer_of(trainer: Any) -> Any:
    """The tokenizer, also out of a processor of text and images."""
    return getattr(trainer.processing_class, "tokenizer", trainer.processing_class)


def name_of(model: nn.Module) -> str:
    """What the model was loaded as, without folders."""
    config: Any = getattr(model, "config", None)
    return Path(getattr(config, "_name_or_path", "") or type(model).__name__).name
