"""The files of a task cache: sequences by their keys, in shards that are whole or not there, and in memory until then.

    folder/completion-target/3f2a...-00e1.safetensors     keys, where each one's tokens start, and what is kept of these

Every process writes shards of its own and reads those of all; nobody waits for anybody, and what two have written twice
is the same twice. A killed run loses what it had in memory, a few minutes' worth. Read first: `task_folder`.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections import ChainMap
from collections.abc import Sequence
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor

from ..core.errors import WrongSetup
from ..core.kept_task import CachedRows
from .cache_file import Facts, Stored, Writer, sweep
from .cache_making import check_room
from .task_keys import BYTES, Pieces, key_bytes

__all__ = ["Shards"]

SHARD = 128 * 2**20  # bytes after which what is in memory is written
SECONDS = 300.0  # and after which it is, however little: what a kill may cost
OPEN = 128  # shards that are held open: a process may open about a thousand files
REMEDY = "Give another folder (or cache=True, which finds one for every setting), or go back to what this one is of."
log = logging.getLogger(__name__)
_Place = tuple[Path, int, int]
_Kept = dict[str, Tensor]


class Shards:
    """What is kept of sequences, by their keys.

    Args:
        folder: made if need be, when there is something to write.
        facts: what every shard depends on.
        names: of the tensors of a position: `values`, and with statistics `constants` and perhaps `weights`.

    Raises:
        WrongSetup: if a shard belongs to other facts.
    """

    def __init__(self, folder: Path, facts: Facts, names: Sequence[str]) -> None:
        self.folder, self._facts, self._names = folder, facts, tuple(names)
        self._places: dict[bytes, _Place] = {}
        self._seen: set[str] = set()
        self._open: dict[Path, Stored] = {}
        self._new: dict[bytes, _Kept] = {}
        self._passing: dict[bytes, _Kept] = {}  # where the disk is full: the last that was made
        self._bytes, self._since, self._full = 0, time.monotonic(), False
        sweep(folder)
        self.look()

    def __len__(self) -> int:
        return len(self._places) + len(self._new)

    @property
    def positions(self) -> int:
        """How many supervised tokens are kept."""
        here = sum(len(tensors["values"]) for tensors in self._new.values())
        return here + sum(end - start for _, start, end in self._places.values())

    def look(self) -> None:
        """Take in the shards that have come since the last time, from other processes too."""
        for file in sorted(self.folder.glob("*.safetensors")):
            if file.name not in self._seen:
                self._take(file, Stored(file, self._facts, REMEDY))

    def _take(self, file: Path, stored: Stored) -> None:
        keys, starts = key_bytes(stored.whole("keys")), stored.whole("starts").tolist()
        for key, start, end in zip(keys, starts[:-1], starts[1:], strict=True):
            self._places[key] = file, start, end
        self._seen.add(file.name)

    def missing(self, keys: Sequence[bytes]) -> list[int]:
        """Return which of these sequences are not there, as places in `keys`; shards of others are looked for once."""
        lost = self._lost(keys)
        if lost:
            self.look()
            lost = self._lost(keys)
        return lost

    def _lost(self, keys: Sequence[bytes]) -> list[int]:
        return [i for i, key in enumerate(keys) if key not in self._places and key not in self._new]

    def read(self, keys: Sequence[bytes]) -> dict[str, Tensor]:
        """Return what is kept of sequences that are all there, in their order, by the name of the tensor."""
        here = ChainMap(self._passing, self._new)
        parts = [here[key] if key in here else self._stored(*self._places[key]) for key in keys]
        return {name: _joined([part[name] for part in parts]) for name in self._names}

    def _stored(self, file: Path, start: int, end: int) -> dict[str, Tensor]:
        if file not in self._open:
            if len(self._open) >= OPEN:
                del self._open[next(iter(self._open))]
            self._open[file] = Stored(file, self._facts, REMEDY)
        return {name: self._open[file].rows(name, start, end) for name in self._names}

    def put(self, pieces: Pieces, rows: CachedRows) -> None:
        """Keep what was made of sequences, in memory until there is enough for a shard.

        Args:
            pieces: whose it is.
            rows: of all their supervised tokens, one sequence after another.
        """
        tensors = {"values": rows.values, "constants": rows.constants, "weights": rows.weights}
        host = {name: tensor.cpu() for name, tensor in tensors.items() if tensor is not None and name in self._names}
        at, self._passing = 0, {}
        if not self._new:
            self._since = time.monotonic()
        for key, count in zip(*pieces, strict=True):
            own = {name: tensor[at : at + count].clone() for name, tensor in host.items()}  # not a view of the batch
            at += count
            if self._full:
                self._passing[key] = own
            elif key not in self._places and key not in self._new:
                self._new[key] = own
                self._bytes += sum(tensor.numel() * tensor.element_size() for tensor in own.values())
        self.write_if_due()

    def write_if_due(self) -> None:
        """Write what is in memory if it is much, or has been there for long."""
        if self._bytes >= SHARD or time.monotonic() - self._since > SECONDS:
            self.write()

    def write(self) -> None:
        """Write what is in memory as one shard; where the disk is full it stays in memory, and the log says so."""
        if not self._new or self._full:
            return
        keys = sorted(self._new)
        parts = [self._new[key] for key in keys]
        tensors = {name: _joined([part[name] for part in parts]) for name in self._names}
        ends = torch.tensor([0, *(len(part["values"]) for part in parts)]).cumsum(0)
        tensors |= {"starts": ends, "keys": _bytes(keys)}
        name = f"{hashlib.sha256(b''.join(keys)).hexdigest()[:12]}-{os.getpid():x}.safetensors"
        file = self.folder / name
        try:
            check_room(self.folder, self._bytes + len(keys) * 64)
            with Writer(file, {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()}, self._facts) as writer:
                for each, tensor in tensors.items():
                    writer.put(each, 0, tensor)
        except (OSError, WrongSetup) as error:
            self._full = True
            log.warning(
                "What the base says of the task cannot be written (%s). The run goes on: what there is stays in "
                "memory, and the base runs on the rest. Give a cache folder with room.", error,
            )  # fmt: skip
            return
        self._new, self._bytes = {}, 0
        self._take(file, Stored(file, self._facts, REMEDY))


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Return parts one after another, in the widest of their dtypes: of statistics float32 takes in float16."""
    widest = reduce(torch.promote_types, (part.dtype for part in parts))
    return torch.cat([part.to(widest) for part in parts])


def _bytes(keys: Sequence[bytes]) -> Tensor:
    return torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8).view(-1, BYTES)
