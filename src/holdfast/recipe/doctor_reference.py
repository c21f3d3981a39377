"""Is the reference the base? By the checks of attach: on the model's structure always, by logits where it is loaded.

`attach` decides by the adapter's configuration, by the files of the weights and by logits. The first needs no weights,
so it is had for nothing; the others are had by loading the model, which is done where it is small or asked for. The
proof is one more than attach has: the logits of the model before the adapter came are what the reference must give.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.method import needs_reference
from ..core.reference import FrozenCopy, OtherModel, Reference, logits_of, probe_batch
from ..core.selection import MOVES_BASE_INTO_ADAPTER, base_weights
from ..core.tap import evaluation
from ..integrations.peft import tap_and_reference
from .config import Recipe, Stage
from .doctor_findings import Findings
from .memory_facts import Base
from .model import ModelSpec
from .run import BASE, _reference
from .skeleton import Skeleton

WORDS: dict[Base, str] = {
    "none": "no method has a reference",
    "off": "the base model: adapter switched off, no memory",
    "copy": "a frozen copy of what is trained, as it begins",
    "other": "another model in memory",
}


@dataclass(frozen=True)
class Gap:
    """How far the reference's logits are from the base's on a probe batch."""

    largest: float
    size: float
    tolerance: float

    @property
    def fine(self) -> bool:
        """Whether they are the same, to the rounding of their dtype."""
        return self.largest <= self.tolerance * self.size


def look(recipe: Recipe, number: int, bones: Skeleton, found: Findings, *, load: bool) -> Base:
    """Return where the reference of a stage comes from; note whether it is the base.

    Args:
        recipe: whose stage it is.
        number: of the stage, from 0.
        bones: the model without its weights.
        found: where findings go.
        load: read the weights and compare logits.
    """
    stage, about = recipe.stages[number], f"stage {number + 1}: reference"
    if not any(map(needs_reference, stage.methods)):
        found.ok(about, WORDS["none"])
        return "none"
    kind: Base = "none"
    with found.noting(about):
        kind = _planned(recipe, number, bones)
        if number:
            found.ok(about, f"{WORDS[kind]}; attach proves it when the stage begins, from what stage {number} has made")
        elif not load:
            found.ok(about, f"{WORDS[kind]}; from the configuration alone, not proven (--load reads the weights)")
        elif (gap := proof(recipe, stage)) is None:
            found.ok(about, f"{WORDS[kind]}; attach accepts it with the real weights")
        elif gap.fine:
            said = f"logits differ by {gap.largest:.2g} of {gap.size:.3g} from those of the base on a probe batch"
            found.ok(about, f"{WORDS[kind]}; proven: {said}")
        else:
            found.fault(
                about,
                f"its logits differ by {gap.largest:.2g} (of up to {gap.size:.3g}) from those of {recipe.model.name!r} "
                "before the adapter came, so methods would hold the model to something else. Choose another "
                "initialisation, or name the base: `reference: FOLDER`.",
            )
    return kind


def _planned(recipe: Recipe, number: int, bones: Skeleton) -> Base:
    """Return what attach would choose, or raise what it would raise, as far as that needs no weights."""
    stage, model = recipe.stages[number], bones.model
    if stage.reference not in (None, "base", "start"):
        return _stored(Path(str(stage.reference)), model)
    if number and stage.reference == BASE and not _turns_back(recipe, number):
        return "other"
    try:
        tap, reference = tap_and_reference(model, stage.methods, stage.reference)
    except RuntimeError:  # it came to comparing numbers, which a model without weights does not have
        return "copy" if _base_moves(model) else "off"
    if tap is not None:
        tap.remove()
    return _kind(reference)


def _kind(reference: Reference | None) -> Base:
    if reference is None:
        return "none"
    return "copy" if isinstance(reference, FrozenCopy) else "other" if isinstance(reference, OtherModel) else "off"


def _turns_back(recipe: Recipe, number: int) -> bool:
    """Return whether the run switches the adapter off for the base of a later stage, and does not load it once more."""
    unread = replace(recipe, model=_Unread(**vars(recipe.model)))
    try:
        return _reference(unread, recipe.stages[number], number, None) == BASE
    except _WouldLoad:
        return False


class _WouldLoad(Exception):
    """Raised in place of reading weights."""


class _Unread(ModelSpec):
    """A model that is not read, so that one may ask whether it would be."""

    def load(self) -> tuple[Any, Any]:
        raise _WouldLoad


def _base_moves(model: nn.Module) -> bool:
    """Return whether part of the base lies in the adapter, or weights of its own are trained."""
    config: Any = model.active_peft_config
    moved = str(getattr(config, "init_lora_weights", True)).lower().startswith(MOVES_BASE_INTO_ADAPTER)
    return moved or any(weight.requires_grad for _, weight in base_weights(model))


def _stored(folder: Path, model: nn.Module) -> Base:
    if (folder / "adapter_config.json").is_file() and hasattr(model, "peft_config"):
        return "copy"
    return "other"


def proof(recipe: Recipe, stage: Stage) -> Gap | None:
    """Load the model, put the adapter on it and attach a reference; return how far that is from the base.

    Returns:
        None where the reference is not meant to be the base (`start`, a folder).

    Raises:
        WrongSetup, NeverSupported, NotYetSupported: what attach would raise.
    """
    from peft import get_peft_model

    model, _ = recipe.model.load()
    probe = probe_batch(model)
    base = _logits(model, probe)
    if (config := recipe.model.peft_config()) is not None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            model = get_peft_model(model, config)
    tap, reference = tap_and_reference(model, stage.methods, stage.reference)
    assert tap is not None  # a method of this stage has a reference
    assert reference is not None
    tap.check(probe)
    if stage.reference not in (None, BASE):
        return None
    theirs = logits_of(reference, tap, probe).float()
    exact = base.dtype in (torch.float32, torch.float64)
    gap = (base.float() - theirs).abs().max().item()
    return Gap(gap, max(base.float().abs().max().item(), 1e-3), 1e-4 if exact else 2e-2)


def _logits(model: Any, probe: dict[str, Tensor]) -> Tensor:
    with torch.no_grad(), evaluation(model):
        logits: Tensor = model(**probe).logits
    return logits
