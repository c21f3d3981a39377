"""Loads a base and what tuning made of it as the sides of one comparison, and proves that "base" is the base.

Adapters are put on one model and switched. `disable_adapter()` gives the base back only if loading the adapter left the
base's weights alone (PiSSA, OLoRA, trained biases and others do not), so logits are compared before and after; where
they differ, the base is loaded a second time. Read next: `holdfast.drift.models`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..core.errors import NotYetSupported, WrongSetup
from ..core.reference import probe_batch
from ..core.tap import evaluation
from ..drift.models import Models, Side, digest
from ..drift.probe import BASE
from .model import ModelSpec

WEIGHTS = "adapter_model.safetensors"
SMALL, LARGE_BATCH, SMALL_BATCH = 100_000_000, 128, 32  # parameters; answers at a time up to there, and beyond


@dataclass(frozen=True)
class Loaded:
    """The sides, and what a ledger says of each."""

    models: Models
    described: Mapping[str, Mapping[str, str]]


def load(
    base: ModelSpec,
    tuned: Mapping[str, str],
    *,
    device: str | None = None,
    batch_size: int | None = None,
    cache: Path | None = None,
    any_base: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> Loaded:
    """Load a base and adapters, or whole models, tuned from it.

    Args:
        base: the model before tuning.
        tuned: by name, folders of adapters or of whole models.
        device: where everything runs; a GPU if there is one.
        batch_size: answers written at a time; by the model's size if None.
        cache: where answers are kept; None: in memory.
        any_base: take adapters that say that they belong to another base.
        say: where messages go.

    Raises:
        WrongSetup: if something cannot be loaded or does not belong together; of all adapters at once.
        NotYetSupported: for prompt learning.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if faults := [fault for name, folder in tuned.items() for fault in _faults(base, name, Path(folder), any_base)]:
        raise WrongSetup("These cannot be measured against " + base.name + ":" + "".join(f"\n  - {f}" for f in faults))
    model, tokenizer = base.load()
    model.to(device)
    before = _logits(model)
    digests = {BASE: digest(model.state_dict())}
    sides: dict[str, Side] = {BASE: _always(model)}
    described = {BASE: {"name": base.name, "sha256": digests[BASE]}}
    peft: Any = None
    for name, folder in tuned.items():
        if _is_adapter(Path(folder)):
            peft = _with_adapter(model, peft, name, Path(folder), base)
            sides[name] = _switched_on(peft, name)
            digests[name] = _adapter_digest(peft, name, Path(folder), digests[BASE])
        else:
            other, own = replace(base, name=folder, revision=None).load()
            if own.get_vocab() != tokenizer.get_vocab():
                raise WrongSetup(f"{folder} has another vocabulary than {base.name}: their tokens cannot be compared.")
            sides[name] = _always(other.to(device))
            digests[name] = digest(other.state_dict())
        described[name] = {"name": Path(folder).name, "folder": folder, "sha256": digests[name]}
    if peft is not None:
        sides[BASE] = _switched_off(peft)
        with sides[BASE]() as off:
            same = torch.equal(_logits(off), before)
        if not same:
            say(f"an adapter changed the weights of {base.name} when it was loaded: the base is loaded a second time.")
            sides[BASE] = _always(base.load()[0].to(device))
    for name, side in sides.items():
        with side() as model_of_side:
            if not bool(_logits(model_of_side).isfinite().all()):
                raise WrongSetup(
                    f"{name} says nothing that could be measured: its logits are not finite (it diverged)."
                )
    at_once = batch_size or (SMALL_BATCH if sum(p.numel() for p in model.parameters()) > SMALL else LARGE_BATCH)
    return Loaded(Models(sides, tokenizer, digests=digests, batch_size=at_once, cache=cache), described)


def _faults(base: ModelSpec, name: str, folder: Path, any_base: bool) -> Iterator[str]:
    """What can be told from files alone."""
    if name == BASE:
        yield f"a tuned model cannot be called {BASE!r}; give it another name"
    if not folder.is_dir():
        yield f"{name}: there is no folder {folder}"
    elif not (_is_adapter(folder) or (folder / "config.json").is_file()):
        yield f"{name}: {folder} has neither adapter_config.json nor config.json, so it is no adapter and no model"
    elif _is_adapter(folder):
        if not (folder / WEIGHTS).is_file():
            yield f"{name}: {folder} has no {WEIGHTS}; save it with save_pretrained (pickled weights are not read)"
        try:
            of = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")
        except ValueError as error:
            yield f"{name}: {folder}/adapter_config.json is not JSON ({error})"
            return
        if of and not any_base and Path(of).name not in (Path(base.place).name, Path(base.name).name):
            yield (
                f"{name}: {folder} says that it was trained on {Path(of).name!r}, not on {base.name!r}. "
                "Give that base, or say --any-base if it is the same under another name"
            )


def _is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file()


def _with_adapter(model: nn.Module, peft: Any, name: str, folder: Path, base: ModelSpec) -> Any:
    """The model with one more adapter, every tensor of which has found its place."""
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict
    from safetensors import safe_open

    wrong = f"{folder} is not an adapter of {base.name}"
    try:
        config = PeftConfig.from_pretrained(str(folder))
        if config.is_prompt_learning:
            raise NotYetSupported(f"{folder}: prompt learning is not measured: its positions are not the base's.")
        if peft is None:
            peft = PeftModel.from_pretrained(model, str(folder), adapter_name=name, torch_device="cpu")
        else:
            peft.load_adapter(str(folder), adapter_name=name, torch_device="cpu")
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise WrongSetup(
            f"{wrong}: {' '.join(str(error).split())[:300]}. Give the base that it was trained on."
        ) from error
    peft.to(next(model.parameters()).device).eval()
    with safe_open(str(folder / WEIGHTS), framework="pt") as file:
        stored = set(file.keys())
    here = set(get_peft_model_state_dict(peft, adapter_name=name))
    if stored != here:
        lost, extra = sorted(stored - here), sorted(here - stored)
        told = [f"{len(lost)} of its tensors have no place, such as {lost[0]}"] if lost else []
        told += [f"{len(extra)} are not in its file, such as {extra[0]}"] if extra else []
        raise WrongSetup(f"{wrong}: {'; '.join(told)}. Give the base that it was trained on.")
    return peft


def _adapter_digest(peft: Any, name: str, folder: Path, of: str) -> str:
    from peft import get_peft_model_state_dict

    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    config.pop("base_model_name_or_path", None)  # a path of the machine that trained it
    return digest(get_peft_model_state_dict(peft, adapter_name=name), of=of + json.dumps(config, sort_keys=True))


def _always(model: nn.Module) -> Side:
    return lambda: nullcontext(model)


def _switched_on(peft: Any, name: str) -> Side:
    def on() -> AbstractContextManager[nn.Module]:
        peft.set_adapter(name)
        return nullcontext(peft)

    return on


def _switched_off(peft: Any) -> Side:
    @contextmanager
    def off() -> Iterator[nn.Module]:
        with peft.disable_adapter():
            yield peft

    return off


def _logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad(), evaluation(model):
        logits: torch.Tensor = model(**probe_batch(model)).logits
        return logits
