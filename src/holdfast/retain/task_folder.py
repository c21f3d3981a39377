"""The folder of a task cache: what all of it depends on, and the shards of each kind.

    folder/cache.json             facts; of which kinds it was built ahead, and holds every sequence of the data
    folder/completion-target/     shards of one kind (`task_shards`)

A folder that differs in a fact is refused, whoever made it: the base's weights, configuration, adapters and head, the
tokenizer, the precision, the dtype. What a method needs has a folder of its own in it, so runs with other methods may
share one. What belongs to one sequence is in its key (`task_keys`).
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from ..core.checkpoint import replace
from ..core.errors import WrongSetup
from .cache_file import Facts, differing
from .task_kinds import Kind
from .task_shards import REMEDY, Shards

__all__ = ["FILE", "Contents", "Manifest", "TaskFolder", "contents", "manifest", "refuse_place"]

FILE = "cache.json"


class Manifest(NamedTuple):
    """What a folder says of itself."""

    facts: Facts
    whole: tuple[str, ...]  # kinds of which every sequence of the data is there: they were built ahead


def manifest(folder: Path) -> Manifest | None:
    """Return what a folder says of itself; None if there is no cache in it.

    Raises:
        WrongSetup: if it cannot be read.
    """
    if not (folder / FILE).is_file():
        return None
    try:
        found = json.loads((folder / FILE).read_text())
        return Manifest(dict(found["facts"]), tuple(found["whole"]))
    except (ValueError, KeyError, TypeError) as error:
        raise WrongSetup(
            f"{folder / FILE} cannot be read ({type(error).__name__}: {error}). Delete the folder: what the base says "
            "is then kept anew."
        ) from None


def refuse_place(folder: Path) -> None:
    """Raise if no cache is in a folder, and none can be made there; a cache that is only read may be read-only.

    Args:
        folder: of a cache or of several, there or not.

    Raises:
        WrongSetup: then.
    """
    try:
        if (folder / FILE).is_file() or any(folder.glob(f"task-*/{FILE}")):
            return
        there = next(parent for parent in (folder, *folder.parents) if parent.exists())
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise _no_place(folder, error) from error


def _no_place(folder: Path, error: OSError) -> WrongSetup:
    return WrongSetup(
        f"What the base says of the task cannot be kept in {folder} ({error}). Give a folder that can be written to: "
        "cache='folder', or with cache=True the environment variable HOLDFAST_CACHE. cache=False keeps nothing."
    )


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
    for name in sorted({file.parent.name for file in folder.glob("*/*.safetensors")}):
        shards = Shards(folder / name, _facts_of(found.facts, name), ())
        size = sum(file.stat().st_size for file in (folder / name).glob("*.safetensors"))
        told.append(Contents(name, len(shards), shards.positions, size))
    return told


def _facts_of(facts: Facts, kind: str) -> Facts:
    """Return what the shards of a kind depend on."""
    return {**facts, "kept": kind}


class TaskFolder:
    """A folder that is open.

    Args:
        path: made if need be.
        facts: what all of it depends on.
        kinds: what is kept in it for this run.

    Raises:
        WrongSetup: if it depends on something else, all that differs is named; or if it cannot be made.
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
        self._whole = there.whole if there is not None else ()
        if there is None:
            self.mark(())
        self.shards = {kind: Shards(path / kind.name, _facts_of(facts, kind.name), kind.tensors) for kind in kinds}

    def mark(self, whole: Iterable[Kind]) -> None:
        """Say of kinds that every sequence of the data is there.

        Raises:
            WrongSetup: if that cannot be written.
        """
        there = manifest(self.path)
        names = {kind.name for kind in whole} | set(there.whole if there is not None else ())
        text = json.dumps({"facts": dict(self._facts), "whole": sorted(names)}, indent=1)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            replace(self.path / FILE, text.encode())
        except OSError as error:
            raise _no_place(self.path, error) from error

    def write(self, *, if_due: bool = False) -> None:
        """Write down what is in memory; with `if_due` only what is much, or has been there for long."""
        for shards in self.shards.values():
            if if_due:
                shards.write_if_due()
            else:
                shards.write()

    def refuse_new(self, kind: Kind, lost: int, of: int) -> None:
        """Raise if a batch has sequences that are not there, of a kind that was built ahead for all.

        Args:
            kind: whose they are.
            lost: how many are not there.
            of: how many the batch has.

        Raises:
            WrongSetup: then.
        """
        if kind.name in self._whole:
            raise WrongSetup(
                f"{lost} of the {of} sequences of this batch are not in {self.path / kind.name}, which was built ahead "
                "for all of them. The data, the chat template, max_length, packing or what is supervised has changed. "
                "Run `holdfast cache build` again, which adds what is missing, or give another folder."
            )
