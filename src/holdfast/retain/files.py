"""A pool's two files: written whole or not at all, and read with every fault of every line told.

The manifest names the file of sequences and is renamed into place last, so a write that is killed leaves the old pool.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..core import checkpoint
from .kept import KINDS, Kept, PoolError, id_of

__all__ = ["FORMAT", "MANIFEST", "read", "read_manifest", "write"]

FORMAT = 1
MANIFEST = "manifest.json"


def write(folder: Path, sequences: Sequence[Kept], manifest: Mapping[str, Any]) -> None:
    """Write a pool; one that is there is replaced once the new one is complete.

    Args:
        folder: made if need be.
        sequences: what is kept.
        manifest: with the `digest` of the sequences.

    Raises:
        PoolError: if the folder has a manifest that is not a pool's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    before = read_manifest(folder)["sequences"] if (folder / MANIFEST).exists() else None
    lines = (json.dumps({**asdict(kept), "input_ids": list(kept.input_ids)}, ensure_ascii=False) for kept in sequences)
    name = f"sequences-{manifest['digest'][:8]}.jsonl"
    checkpoint.replace(folder / name, "".join(line + "\n" for line in lines).encode())
    text = json.dumps({**manifest, "format": FORMAT, "sequences": name}, indent=1, ensure_ascii=False)
    checkpoint.replace(folder / MANIFEST, text.encode())  # from here on the folder holds the new pool
    if before not in (None, name):
        (folder / str(before)).unlink(missing_ok=True)


def read(folder: Path) -> tuple[tuple[Kept, ...], dict[str, Any]]:
    """The sequences and the manifest of a pool.

    Raises:
        PoolError: names every fault of every line; nothing is read in part.
    """
    manifest = read_manifest(folder)
    path = folder / manifest["sequences"]
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # not splitlines: U+2028 may stand inside a text
    except (OSError, UnicodeDecodeError) as error:
        raise PoolError(f"{path} cannot be read ({error}). Sample the pool again.") from None
    faults: list[str] = []
    found: dict[str, Kept] = {}
    for number, line in enumerate(lines, 1):
        if line.strip():
            kept, wrong = _read(line)
            if kept is not None and kept.id in found:
                wrong = [f"the sequence {kept.id} is there already"]
            elif kept is not None:
                found[kept.id] = kept
            faults += [f"line {number}: {fault}" for fault in wrong]
    if faults:
        raise PoolError(f"{path} cannot be loaded; correct these lines, or take them out:", faults)
    return tuple(found.values()), manifest


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest in a pool's folder.

    Raises:
        PoolError: if there is none, or it is not a pool's.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise PoolError(
            f"{folder} has no {MANIFEST}, so it is no pool. Make one: holdfast retain sample MODEL --output"
        )
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PoolError(f"{path} cannot be read ({error}). Sample the pool again.") from None
    name = found.get("sequences") if isinstance(found, dict) and found.get("format") == FORMAT else None
    if not isinstance(name, str) or not name or Path(name).name != name:
        raise PoolError(f"{path} is not the manifest of a pool of format {FORMAT}. Give the folder of one.")
    return dict(found)


def _read(line: str) -> tuple[Kept | None, list[str]]:
    """The sequence of a line, or what is wrong with it."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return None, [f"not JSON ({error})"]
    names = list(Kept.__dataclass_fields__)
    if not isinstance(row, dict) or set(row) != set(names):
        return None, [f"not an object with exactly {', '.join(names)}"]
    ids, start = row["input_ids"], row["prompt_tokens"]
    faults = [f"{name} must be a text" for name in ("id", "kind", "source", "text") if not isinstance(row[name], str)]
    if row["kind"] not in KINDS:
        faults.append(f"kind must be one of {', '.join(KINDS)}, got {row['kind']!r:.40}")
    if not isinstance(ids, list) or len(ids) < 2 or not all(type(id) is int and id >= 0 for id in ids):
        faults.append("input_ids must be a list of at least two token ids")
    elif type(start) is not int or not 0 <= start <= len(ids):
        faults.append(f"prompt_tokens must be a number from 0 to {len(ids)}, got {start!r:.40}")
    elif row["id"] != id_of(ids):
        faults.append(f"id {row['id']!r:.40} is not that of its input_ids, {id_of(ids)!r}")
    return (None, faults) if faults else (Kept(**{**row, "input_ids": tuple(ids)}), [])
