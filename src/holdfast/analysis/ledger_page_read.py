"""The ledgers of a page: files and folders read together, every fault named at once, one experiment of one ledger each.

Experiments of one name in two ledgers stay two: nothing says that they were measured on one base and the same items.

Read next: `holdfast.analysis.ledger_page`, the page.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from holdfast.analysis.points import BASE
from holdfast.drift.ledger import Entry, Ledger, LedgerError, TornLine

__all__ = ["Experiment", "PageError", "Read", "experiments_of", "read_ledgers", "reported_split"]

NAME = "ledger.jsonl"
"""What is looked for in a folder."""


class PageError(LedgerError):
    """Why no page is written, all faults at once."""


@dataclass(frozen=True)
class Experiment:
    """One experiment of one ledger.

    Args:
        ledger: the ledger's name on the page.
        path: of the ledger.
        name: of the experiment.
        title: its name, with the ledger's where two have one name.
        entries: the latest for every setting, seed and split, failed ones included.
    """

    ledger: str
    path: Path
    name: str
    title: str
    entries: tuple[Entry, ...] = field(repr=False)

    @property
    def scores(self) -> list[str]:
        """The names of all scores, in the order of the ledger."""
        return list(dict.fromkeys(name for entry in self.entries for name in entry.scores))

    @property
    def arms(self) -> list[str]:
        """The arms, without the base."""
        return list(dict.fromkeys(entry.arm for entry in self.entries if entry.arm != BASE))

    @property
    def split(self) -> str:
        """What is reported: test, or the split with the most entries."""
        return reported_split(self.entries)

    def reported(self) -> list[Entry]:
        """The finished entries of the split that is reported."""
        split = self.split
        return [entry for entry in self.entries if entry.status == "done" and entry.split == split]


class Read(NamedTuple):
    """What was read, and what a reader must know of it."""

    experiments: tuple[Experiment, ...]
    ledgers: tuple[str, ...]
    notes: tuple[str, ...]


def reported_split(entries: Iterable[Entry]) -> str:
    """Test where there is one; else the split with the most entries.

    >>> from holdfast.drift.ledger import Score
    >>> reported_split([Entry("demo", "plain LoRA", {}, 0, "all", {"skills": Score(0.8)}, environment={})])
    'all'
    """
    splits = Counter(entry.split for entry in entries)
    return "test" if "test" in splits else max(splits, key=lambda split: splits[split])


def read_ledgers(paths: Sequence[str | Path]) -> Read:
    """Read ledgers, and all `ledger.jsonl` under folders.

    Raises:
        PageError: names every path that is missing, empty or damaged; then nothing is read.
    """
    faults, notes, found = list[str](), list[str](), dict[Path, list[Entry]]()
    if not paths:
        faults.append("no ledger was named: give files, or folders that hold ledger.jsonl")
    for given in dict.fromkeys(Path(path) for path in paths):
        for file in _files(given, faults):
            if file.resolve() in found:
                continue
            try:
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always", TornLine)
                    entries = Ledger(file).entries(status=None)
            except (LedgerError, OSError) as error:
                faults += [f"{file}: {fault}" for fault in getattr(error, "faults", ()) or [str(error)]]
                continue
            notes += dict.fromkeys(str(each.message) for each in caught)
            if entries:
                found[file.resolve()] = entries
            elif file == given:
                faults.append(f"{file} is empty: no run has been recorded in it yet")
            else:
                notes.append(f"{file} is empty and left out.")
    if not faults and not found:
        faults.append("every ledger that was found is empty: no run has been recorded yet")
    if faults:
        raise PageError("These runs cannot be reported:", dict.fromkeys(faults))
    names = _short(list(found))
    return Read(
        tuple(experiments_of({names[path]: (path, entries) for path, entries in found.items()})),
        tuple(names.values()),
        tuple(notes),
    )


def _files(given: Path, faults: list[str]) -> list[Path]:
    """The ledgers that a path stands for."""
    if given.is_file():
        return [given]
    if not given.is_dir():
        faults.append(f"there is no file or folder {given}")
        return []
    found = sorted(given.rglob(NAME))
    if not found:
        others = sorted(str(path.relative_to(given)) for path in given.rglob("*.jsonl"))
        hint = f"; it holds {', '.join(others[:5])}: a ledger of another name is given by itself" if others else ""
        faults.append(f"the folder {given} holds no {NAME}{hint}")
    return found


def _short(paths: Sequence[Path]) -> dict[Path, str]:
    """The shortest names that tell paths apart: no more of anybody's folders than is needed.

    >>> list(_short([Path("/runs/a/ledger.jsonl"), Path("/runs/b/ledger.jsonl"), Path("/runs/demo.jsonl")]).values())
    ['a', 'b', 'demo']
    """
    parts = {path: (path.parent if path.name == NAME else path.with_suffix("")).parts for path in paths}
    names = {}
    for path, own in parts.items():
        depth = 1
        while depth < len(own) and sum(other[-depth:] == own[-depth:] for other in parts.values()) > 1:
            depth += 1
        names[path] = "/".join(own[-depth:]).replace("//", "/")
    return names


def experiments_of(ledgers: dict[str, tuple[Path, list[Entry]]]) -> list[Experiment]:
    """The experiments of every ledger, in its order; of repeated entries the latest counts."""
    shared = Counter(name for _, entries in ledgers.values() for name in {entry.experiment for entry in entries})
    found = []
    for ledger, (path, entries) in ledgers.items():
        for name in dict.fromkeys(entry.experiment for entry in entries):
            latest = {(entry.key, entry.split): entry for entry in entries if entry.experiment == name}
            title = f"{name} · {ledger}" if shared[name] > 1 else name
            found.append(Experiment(ledger, path, name, title, tuple(latest.values())))
    return found
