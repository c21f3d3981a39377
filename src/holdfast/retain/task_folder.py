"""The folder of a task cache: what all of it depends on, and the shards of each kind.

    folder/cache.json             facts; whether it was built ahead and holds every sequence of the data
    folder/completion-target/     shards (`task_shards`)

A folder that differs in a fact is refused, whoever made it: the base's weights, configuration and head, the tokenizer,
the precision, the dtype, what is kept of which positions. What belongs to one sequence is in its key (`task_keys`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ..core.checkpoint import replace
from ..core.errors import WrongSetup
from .cache_file import Facts, differing
from .task_keys import Pieces
from .task_kinds import Kind
from .task_shards import REMEDY, Shards

__all__ = ["FILE", "Contents", "Manifest", "TaskFolder", "contents", "manifest"]

FILE = "cache.json"


class Manifest(NamedTuple):
    """What a folder says of itself."""

    facts: Facts
    whole: bool  # every sequence of the data is there: it was built ahead


def manifest(folder: Path) -> Manifest | None:
    """Return what a folder says of itself; None if there is no cache in it.

    Raises:
        WrongSetup: if it cannot be read.
    """
    if not (folder / FILE).is_file():
        return None
    try:
        found = json.loads((folder / FILE).read_text())
        return Manifest(dict(found["facts"]), bool(found["whole"]))
    except (ValueError, KeyError, TypeError) as error:
        raise WrongSetup(
            f"{folder / FILE} cannot be read ({type(error).__name__}: {error}). Delete the folder: what the base says "
            "is then kept anew."
        ) from None


class Contents(NamedTuple):
    """How much is kept of one kind."""

    name: str
    sequences: int
    tokens: int
    size: int  # bytes of its files


def contents(folder: Path, found: Manifest) -> list[Contents]:
    """Return how much a folder keeps of each kind.

    Args:
        folder: of a cache.
        found: its manifest.
    """
    told = []
    for name in str(found.facts["kept"]).split(", "):
        shards = Shards(folder / name, found.facts, ())
        size = sum(file.stat().st_size for file in (folder / name).glob("*.safetensors"))
        told.append(Contents(name, len(shards), shards.positions, size))
    return told


class TaskFolder:
    """A folder that is open.

    Args:
        path: made if need be.
        facts: what all of it depends on.
        kinds: what is kept in it.

    Raises:
        WrongSetup: if it depends on something else; all that differs is named.
    """

    def __init__(self, path: Path, facts: Facts, kinds: Sequence[Kind]) -> None:
        self.path, self._facts = path, facts
        there = manifest(path)
        if there is not None and (lines := differing(there.facts, facts)):
            raise WrongSetup(
                f"{path} keeps what the base said in another run, and this one would be held to that. What differs:\n"
                + "\n".join(lines)
                + f"\n{REMEDY}"
            )
        self.whole = there is not None and there.whole
        if there is None:
            self.mark(whole=False)
        self.shards = {kind: Shards(path / kind.name, facts, kind.tensors) for kind in kinds}

    def mark(self, *, whole: bool) -> None:
        """Say whether every sequence of the data is there."""
        self.path.mkdir(parents=True, exist_ok=True)
        replace(self.path / FILE, json.dumps({"facts": dict(self._facts), "whole": whole}, indent=1).encode())

    def write(self) -> None:
        """Write down what is in memory."""
        for shards in self.shards.values():
            shards.write()

    def refuse(self, kind: Kind, wanted: Pieces, lost: Sequence[int]) -> WrongSetup:
        """Return the error for sequences that a folder lacks that was built ahead, with what is there instead."""
        known = sum(self.shards[kind].has_tokens(wanted.tokens[i]) for i in lost)
        other = f"{known} with tokens that are there, but with other labels or position ids" if known else ""
        unknown = f"{len(lost) - known} with tokens that are not there" if known < len(lost) else ""
        return WrongSetup(
            f"{len(lost)} of the {len(wanted.keys)} sequences of this batch are not in {self.path}, which was built "
            f"ahead for all of them: {', '.join(filter(None, (other, unknown)))}. The data, the chat template, "
            "max_length, packing or what is supervised has changed. Run `holdfast cache build` again, which adds what "
            "is missing, or give another folder."
        )
