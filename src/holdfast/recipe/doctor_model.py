"""Looks at the model of a recipe: can it be read, is it whole, does its tokenizer fit, is an adapter to be put on it?

Files are looked at from outside: the header of a safetensors file says whether the file is whole. From the hub nothing
but configuration and tokenizer is fetched, as training would fetch them. Read next: `doctor_reference`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..analysis.memory import GIB
from .doctor_findings import Findings
from .model import ModelSpec
from .skeleton import Skeleton, skeleton

ABOUT = "model"
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLE = ("model.safetensors", "pytorch_model.bin")


def look(spec: ModelSpec, found: Findings) -> tuple[Skeleton | None, Any]:
    """Return the model without its weights, and its tokenizer, each None where it cannot be had; findings are noted.

    Args:
        spec: of the recipe.
        found: where findings go.
    """
    place = Path(spec.place)
    if (place / "adapter_config.json").is_file():
        found.fault(
            ABOUT,
            f"{spec.name!r} holds an adapter, and the base of a recipe is a model without one: transformers would load "
            "both as one. Name the base under `model`; an earlier adapter is what `reference` or a first stage is for.",
        )
        return None, None
    bones = None
    with found.noting(ABOUT):
        bones = skeleton(spec)
        numbers = sum(p.numel() for p in bones.model.parameters())
        trained = sum(p.numel() for p in bones.trained.values())
        kind = spec.peft_type or "all weights"
        found.ok(
            ABOUT,
            f"{bones.config.model_type}, {numbers:,} parameters in {spec.dtype}, {bones.base_bytes / GIB:.2f} GiB; "
            f"{kind}: {trained:,} are trained",
        )
    files = _files(spec, found)
    _whole(files, found)
    tokenizer = _tokenizer(spec, found)
    if bones is not None and tokenizer is not None:
        _fits(bones, tokenizer, found)
    return bones, tokenizer


def weights_are_here(spec: ModelSpec) -> bool:
    """Return whether the files of the weights are on this machine."""
    own = Findings()
    _files(spec, own)
    return not own


def _files(spec: ModelSpec, found: Findings) -> list[Path]:
    """Return the files of the weights that are here; note what is missing."""
    from huggingface_hub import constants

    get = _in_folder if Path(spec.place).is_dir() else _in_cache
    wanted: list[str] = []
    for index in INDEXES:
        if (file := get(spec, index)) is not None:
            wanted = sorted(set(json.loads(file.read_text())["weight_map"].values()))
            break
    else:
        wanted = next(([name] for name in SINGLE if get(spec, name) is not None), [])
    here = {name: file for name in wanted if (file := get(spec, name)) is not None}
    lost = [name for name in wanted if name not in here]
    local = Path(spec.place).is_dir()
    what = f"{', '.join(lost[:3])}{', ...' if len(lost) > 3 else ''}" if lost else "weights (safetensors or bin)"
    if local and (lost or not wanted):
        found.fault(ABOUT, f"{spec.name!r} has no {what}: a folder with config.json and all its weights is needed.")
    elif lost or not wanted:
        said = f"{spec.name!r} has no {what} in the hub's cache on this machine"
        if constants.HF_HUB_OFFLINE:
            found.fault(ABOUT, f"{said}, and HF_HUB_OFFLINE is set. Download it first, or unset HF_HUB_OFFLINE.")
        else:
            found.warn(ABOUT, f"{said}: training will download it.")
    return list(here.values())


def _in_folder(spec: ModelSpec, name: str) -> Path | None:
    file = Path(spec.place) / name
    return file if file.is_file() else None


def _in_cache(spec: ModelSpec, name: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        file = try_to_load_from_cache(spec.place, name, revision=spec.revision)
    except HFValidationError:  # neither a folder nor a name that the hub could have; told where it is loaded
        return None
    return Path(file) if isinstance(file, str) else None


def _whole(files: Iterable[Path], found: Findings) -> None:
    from safetensors import SafetensorError, safe_open

    size = 0
    for file in files:
        size += file.stat().st_size
        if file.suffix == ".safetensors":
            try:
                with safe_open(str(file), "pt"):
                    pass
            except SafetensorError as error:
                found.fault(ABOUT, f"{file} is not whole ({error}): copy or download it again.")
    if size:
        found.ok(ABOUT, f"weights are here, {size / GIB:.2f} GiB")


def _tokenizer(spec: ModelSpec, found: Findings) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            spec.place, revision=spec.revision or "main", trust_remote_code=spec.trust_remote_code
        )
    except (OSError, ValueError) as error:
        found.fault(
            ABOUT,
            f"cannot load the tokenizer of {spec.name!r}: {' '.join(str(error).split())[:300]} Check the name and the "
            "network, or give a folder with its files.",
        )
        return None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _fits(bones: Skeleton, tokenizer: Any, found: Findings) -> None:
    rows, pieces = bones.model.get_input_embeddings().weight.shape[0], len(tokenizer)
    if tokenizer.pad_token is None:
        found.fault(ABOUT, "its tokenizer has no pad and no end-of-sequence token, so no batch can be made: set one.")
    if pieces > rows:
        found.fault(
            ABOUT,
            f"its tokenizer has {pieces:,} tokens and its embeddings {rows:,} rows: the last ones would be looked up "
            "outside. Use the model's own tokenizer, or resize its embeddings and save it.",
        )
