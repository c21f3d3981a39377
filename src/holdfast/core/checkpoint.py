"""Writes a session's state beside a checkpoint: one safetensors file and one JSON file, whole or not at all.

The JSON file is renamed into place last and names the tensors' checksum, so a pair that belongs to two different
moments (a kill between the two renames) is found out and refused rather than resumed from.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .distributed import barrier, gather, rank, world_size
from .errors import WrongSetup
from .types import NamedTensors, State

TENSORS, RECORD = "holdfast.safetensors", "holdfast.json"
SCHEMA = 2


def write(folder: Path, tensors: NamedTensors, record: Mapping[str, Any], *, sharded: bool = False) -> None:
    """Write tensors and record, the tensors whole by the main process.

    Args:
        folder: made if need be.
        tensors: the state.
        record: plain values beside it.
        sharded: every process holds parts of its own (FSDP2) and writes them into its own file.
    """
    if rank() != 0 and not sharded:
        return
    from safetensors.torch import save

    folder.mkdir(parents=True, exist_ok=True)
    stored, shared = _once(tensors)
    data = save(stored)
    replace(folder / _tensors_name(sharded), data)
    parts = [json.dumps([hashlib.sha256(data).hexdigest(), shared])]
    checksums, sharing = zip(*map(json.loads, gather(parts[0]) if sharded else parts), strict=True)
    if rank() == 0:
        text = json.dumps({"schema": SCHEMA, **record, "sha256": checksums, "shared": sharing}, indent=1)
        replace(folder / RECORD, text.encode())
    if sharded:
        barrier()  # nobody goes on before the record says that the parts belong together


def _tensors_name(sharded: bool) -> str:
    return f"holdfast-{rank() + 1:05d}-of-{world_size():05d}.safetensors" if sharded else TENSORS


def _once(tensors: NamedTensors) -> tuple[NamedTensors, dict[str, str]]:
    """Return what to write, ready for safetensors, and for each tensor that is another one: that one's name.

    safetensors refuses shared memory, and methods with the same Fisher hold the very same tensors.
    """
    first: dict[tuple[object, ...], str] = {}
    stored: NamedTensors = {}
    shared: dict[str, str] = {}
    storages = set()
    for name, tensor in tensors.items():
        key = tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
        if tensor.numel() and key in first:
            shared[name] = first[key]
            continue
        first[key] = name
        whole = tensor.detach().cpu().contiguous()
        memory = whole.untyped_storage().data_ptr()
        stored[name] = whole.clone() if memory in storages else whole  # another view of the same memory
        storages.add(memory)
    return stored, shared


def replace(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: under another name first, then renamed into place."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def read(folder: Path, methods: Sequence[str], *, sharded: bool = False) -> tuple[NamedTensors, dict[str, Any]]:
    """Return tensors and record of `folder`, which must be of the same methods with the same settings.

    Raises:
        WrongSetup: if there is no complete state, or it is another list's, or another number of processes sharded it.
    """
    from safetensors.torch import load

    path = folder / _tensors_name(sharded)
    if not (folder / RECORD).is_file() or not path.is_file():
        others = sorted(p.name for p in folder.glob("holdfast*.safetensors"))
        raise WrongSetup(
            f"{folder} has no state of holdfast's ({RECORD}, {path.name}; there is: {', '.join(others) or 'nothing'}), "
            "so a resumed run would start its methods and its reference anew from trained weights. Resume from a "
            "checkpoint made with holdfast attached, under FSDP2 with as many processes."
        )
    record = json.loads((folder / RECORD).read_text())
    data = path.read_bytes()
    if record["schema"] != SCHEMA:
        raise WrongSetup(f"{folder / RECORD} has schema {record['schema']}; this holdfast reads schema {SCHEMA}.")
    if record["sha256"][rank() if sharded else 0] != hashlib.sha256(data).hexdigest():
        raise WrongSetup(f"{folder}: {path.name} and {RECORD} are of two different moments. Use an earlier checkpoint.")
    if record["methods"] != list(methods):
        raise WrongSetup(
            f"{folder} holds the state of other methods or settings.\n  there: {record['methods']}\n"
            f"  here:  {list(methods)}\nAttach the same list, or start a new run."
        )
    tensors = load(data)
    shared = record.get("shared", [{}] * len(record["sha256"]))[rank() if sharded else 0]
    return tensors | {name: tensors[first] for name, first in shared.items()}, record


def parted(
    tensors: NamedTensors, count: int, device: torch.device, on_host: Sequence[str]
) -> tuple[list[State], NamedTensors]:
    """Return the state of each method, and what is kept of the reference.

    Args:
        tensors: called `place/name`, where place is a method's number, or `reference`.
        count: of the methods.
        device: where tensors go.
        on_host: names of those that stay in host memory.
    """
    states: list[State] = [{} for _ in range(count)]
    kept: NamedTensors = {}
    moved = {id(t): t if key in on_host else t.to(device) for key, t in tensors.items()}
    for key, tensor in tensors.items():
        place, name = key.split("/", 1)
        home = kept if place == "reference" else states[int(place)]
        home[name] = moved[id(tensor)]  # what was one tensor stays one
    return states, kept
