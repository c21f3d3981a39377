"""The ledger: one append-only JSON Lines file that records what every run learned, kept and cost.

It is the only result format of the package, so that every figure, table and verdict can be traced to lines that nobody
edits. A line is whole or absent: it is written by one `os.write` on a file opened for appending, under a lock, and what
a killed process left unfinished is reported and set aside, never joined to the next line. Standard library only.

Read next: `holdfast.analysis.frontier`, which reads these lines, and docs/ledger.md.
"""

from __future__ import annotations

import errno
import os
import warnings
from collections import defaultdict
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from holdfast.drift.entry import JSON, SCHEMA, Entry, LedgerError, RunKey, Score
from holdfast.drift.environment import environment

try:
    import fcntl
except ImportError:  # Windows: an append is still a single write, but a torn tail may be met by two processes at once
    fcntl = None  # type: ignore[assignment]

__all__ = ["JSON", "SCHEMA", "Entry", "Ledger", "LedgerError", "RunKey", "Score", "TornLine", "environment"]


class TornLine(UserWarning):
    """The ledger ends in an unfinished line: a process was killed, or the disk filled up, while it wrote."""


class Ledger:
    """Appends entries to a file and reads them back; several processes may do so at once.

    Args:
        path: the file; it and its folder are made by the first append.
        torn: what to do with an unfinished last line. `"set aside"`: warn, skip it when reading, and have the next
            append move it to `<path>.torn`, so that nothing is lost. `"refuse"`: raise, and touch nothing.

    >>> import tempfile
    >>> ledger = Ledger(Path(tempfile.mkdtemp()) / "ledger.jsonl")
    >>> ledger.append(Entry("demo", "plain LoRA", {"learning_rate": 1e-3}, 0, "test", {"skills": Score(0.8)}))
    >>> ledger.entries(arm="plain LoRA")[0].scores["skills"].value
    0.8
    >>> RunKey.of("demo", "plain LoRA", {"learning_rate": 1e-3}, 0) in ledger.runs(splits=["test"])
    True
    """

    def __init__(self, path: str | Path, torn: Literal["set aside", "refuse"] = "set aside") -> None:
        self.path, self.torn = Path(path), torn
        self._lines()

    def append(self, entry: Entry) -> None:
        """Write the entry as one whole line, or raise and leave the file as it was."""
        line = entry.to_json().encode() + b"\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o644)
        try:
            with _locked(file, exclusive=True):
                self._set_aside(file)
                end = os.lseek(file, 0, os.SEEK_END)
                if os.write(file, line) != len(line):
                    os.ftruncate(file, end)
                    raise OSError(errno.ENOSPC, "no room for a whole line; the ledger is as it was", str(self.path))
                os.fsync(file)
        finally:
            os.close(file)

    def entries(
        self,
        experiment: str | None = None,
        arm: str | None = None,
        split: str | None = None,
        status: Literal["done", "failed"] | None = "done",
    ) -> list[Entry]:
        """The entries that match, in the order of writing; None matches everything.

        Raises:
            LedgerError: names every line that cannot be read; a damaged ledger is never read in part.
        """
        found, faults = [], []
        for number, line in enumerate(self._lines(), start=1):
            try:
                found.append(Entry.from_json(line.decode()))
            except ValueError as error:
                faults.append(f"line {number}: {error}")
        if faults:
            raise LedgerError(f"{self.path} cannot be read:", faults)
        wanted = {"experiment": experiment, "arm": arm, "split": split, "status": status}
        return [
            entry
            for entry in found
            if all(value is None or getattr(entry, name) == value for name, value in wanted.items())
        ]

    def runs(
        self, experiment: str | None = None, splits: Collection[str] = ("validation", "test")
    ) -> frozenset[RunKey]:
        """What need not be run again: the settings and seeds that have a finished entry for every one of `splits`."""
        done: dict[RunKey, set[str]] = defaultdict(set)
        for entry in self.entries(experiment):
            done[entry.key].add(entry.split)
        return frozenset(key for key, found in done.items() if found.issuperset(splits))

    def _lines(self) -> list[bytes]:
        """The whole lines of the file; warns or raises about an unfinished one."""
        try:
            with self.path.open("rb") as file, _locked(file.fileno(), exclusive=False):
                *lines, tail = file.read().split(b"\n")
        except FileNotFoundError:
            return []
        if tail:
            self._report(tail)
        return lines

    def _set_aside(self, file: int) -> None:
        """Move an unfinished last line into `<path>.torn`; under the lock, its writer must be dead."""
        end = os.lseek(file, 0, os.SEEK_END)
        if not end:
            return
        os.lseek(file, end - 1, os.SEEK_SET)
        if os.read(file, 1) == b"\n":
            return
        tail = self.path.read_bytes().rpartition(b"\n")[2]
        self._report(tail)
        with self.path.with_name(self.path.name + ".torn").open("ab") as aside:
            aside.write(tail + b"\n")
            aside.flush()
            os.fsync(aside.fileno())
        os.ftruncate(file, end - len(tail))

    def _report(self, tail: bytes) -> None:
        told = f"{self.path} ends in an unfinished line of {len(tail)} bytes: a process was stopped while it wrote."
        if self.torn == "refuse":
            raise LedgerError(
                f"{told} Open the ledger with torn='set aside' to move that line to {self.path.name}.torn."
            )
        warnings.warn(
            f"{told} It is not read; the next append moves it to {self.path.name}.torn.", TornLine, stacklevel=3
        )


@contextmanager
def _locked(file: int, exclusive: bool) -> Iterator[None]:
    """Hold the file's lock: alone to write, shared to read. Where there are no locks, go on without."""
    if fcntl is not None:
        with suppress(OSError):  # some network file systems have none
            fcntl.flock(file, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
    try:
        yield
    finally:
        if fcntl is not None:
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_UN)
