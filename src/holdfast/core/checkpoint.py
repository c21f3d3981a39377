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

from .distributed import rank
from .errors import WrongSetup
from .types import NamedTensors

TENSORS, RECORD = "holdfast.safetensors", "holdfast.json"
SCHEMA = 1


def write(folder: Path, tensors: NamedTensors, record: Mapping[str, Any]) -> None:
    """Write tensors and record; only the main process writes."""
    if rank() != 0:
        return
    from safetensors.torch import save

    folder.mkdir(parents=True, exist_ok=True)
    data = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    text = json.dumps({"schema": SCHEMA, **record, "sha256": hashlib.sha256(data).hexdigest()}, indent=1)
    for name, content in ((TENSORS, data), (RECORD, text.encode())):
        temporary = folder / f".{name}.{os.getpid()}"
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(folder / name)


def read(folder: Path, methods: Sequence[str]) -> tuple[NamedTensors, dict[str, Any]]:
    """Return tensors and record of `folder`, which must be of the same methods with the same settings.

    Raises:
        WrongSetup: if there is no complete state, or it is another list's.
    """
    from safetensors.torch import load

    if not (folder / RECORD).is_file() or not (folder / TENSORS).is_file():
        raise WrongSetup(
            f"{folder} has no state of holdfast's ({RECORD}, {TENSORS}), so a resumed run would start its methods "
            "and its reference anew from trained weights. Resume from a checkpoint made with holdfast attached."
        )
    record = json.loads((folder / RECORD).read_text())
    data = (folder / TENSORS).read_bytes()
    if record["schema"] != SCHEMA:
        raise WrongSetup(f"{folder / RECORD} has schema {record['schema']}; this holdfast reads schema {SCHEMA}.")
    if record["sha256"] != hashlib.sha256(data).hexdigest():
        raise WrongSetup(f"{folder}: {TENSORS} and {RECORD} are of two different moments. Use an earlier checkpoint.")
    if record["methods"] != list(methods):
        raise WrongSetup(
            f"{folder} holds the state of other methods or settings.\n  there: {record['methods']}\n"
            f"  here:  {list(methods)}\nAttach the same list, or start a new run."
        )
    return load(data), record
