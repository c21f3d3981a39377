"""Rows to train, retain and measure on: local files, folders, hub data sets, and the lab's own tasks.

A name is a local file (`.jsonl`, `.json`, `.parquet`, `.csv`, `.txt`), a folder, a pool (`holdfast retain sample`),
`lab:shift` and the like, or else a name on the Hugging Face hub. Rows stay in whatever TRL format they are in;
`format_fault` says whether a trainer can read them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..core.errors import WrongSetup
from ..retain.files import MANIFEST
from ..retain.pool import Pool, PoolError
from .lines import Faults, Node, Section, guess

if TYPE_CHECKING:
    from datasets import Dataset

READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text"}
SETTING = ("data", "path", "name", "split", "samples")
LAB = (
    "shift",
    "second",
    "safety_sft",
    "preference_pairs",
    "retain",
    "retain_chat",
    "retain_completion",
    "retain_preferences",
)


@dataclass(frozen=True)
class Data:
    """Where rows come from.

    Attributes:
        path: a file, a folder, a pool's folder, `lab:TASK`, or a hub name.
        name: the hub configuration or subset.
        split: of the data set; a local file has only `train`.
        samples: take the first so many rows; None: all.
        line: where the recipe says so.
    """

    path: str
    name: str | None = None
    split: str = "train"
    samples: int | None = None
    line: int = 0

    @property
    def is_file(self) -> bool:
        """Whether this names one local file."""
        return Path(self.path).suffix in READERS

    @property
    def pool(self) -> Pool | None:
        """The pool in this folder, if it is that of one.

        Raises:
            PoolError: if it cannot be read.
        """
        if not (Path(self.path) / MANIFEST).is_file():
            return None
        pool = Pool.load(self.path)
        return replace(pool, sequences=pool.sequences[: self.samples])

    def rows(self) -> Dataset:
        """Load the rows.

        Raises:
            WrongSetup: if they cannot be had, with the reason and the way out.
        """
        rows = self._load()
        if self.samples is not None and self.samples < len(rows):
            rows = rows.select(range(self.samples))
        if not len(rows):
            raise WrongSetup(f"{self.path} (split {self.split!r}) has no rows.")
        return rows

    def _load(self) -> Dataset:
        from datasets import Dataset, load_dataset

        if self.path.startswith("lab:"):
            return Dataset.from_list(self._lab_rows())
        if (pool := self.pool) is not None:
            return Dataset.from_list([{"text": kept.text, "input_ids": list(kept.input_ids)} for kept in pool])
        try:
            if self.is_file:
                return load_dataset(READERS[Path(self.path).suffix], data_files=self.path, split="train")
            return load_dataset(self.path, self.name, split=self.split)
        except Exception as error:  # the hub client raises errors of a dozen unrelated kinds
            where = "file" if self.is_file else "folder" if Path(self.path).is_dir() else "data set on the hub"
            raise WrongSetup(
                f"Cannot load the {where} {self.path!r}: {type(error).__name__}: {' '.join(str(error).split())[:300]}. "
                "Check the name, the split and the network; a local file needs its ending "
                f"({', '.join(READERS)})."
            ) from error

    def _lab_rows(self) -> list[dict[str, Any]]:
        from .. import lab

        task, split, n = self.path.removeprefix("lab:"), self.split, self.samples
        makers: Mapping[str, Callable[[], list[Any]]] = {
            "safety_sft": lambda: lab.safety_sft(n or 400, split=_lab_split(split)),
            "preference_pairs": lambda: lab.preference_pairs(n or 400, split=_lab_split(split)),
            "retain": lambda: lab.retain(n or 256, split=_lab_split(split)),
            "retain_preferences": lambda: lab.retain_preferences(n or 256, split=_lab_split(split)),
            "retain_completion": lambda: lab.retain(n or 256, split=_lab_split(split), form="completion"),
            "retain_chat": lambda: lab.retain(n or 256, split=_lab_split(split), form="chat"),
        }
        return makers[task]() if task in makers else list(lab.task(task, split=_lab_split(split), n=n))

    def digest(self) -> str | None:
        """Return a hash of a local file or pool, to tell whether it is still the same; None for anything else."""
        if (pool := self.pool) is not None:
            return pool.digest[:16]
        return hashlib.sha256(Path(self.path).read_bytes()).hexdigest()[:16] if self.is_file else None


def _lab_split(split: str) -> Any:
    return split


def data_of(node: Node, name: str, faults: Faults) -> Data | None:
    """Read a data setting: a string, or a mapping of `data` (or `path`), `name`, `split`, `samples`."""
    if isinstance(node.value, str):
        data = Data(node.value, line=node.line)
    else:
        section = Section(node, name, faults)
        path = section.text("data") or section.text("path")
        data = Data(
            path,
            name=section.text("name") or None,
            split=section.text("split", "train"),
            samples=section.whole("samples", least=1),
            line=node.line,
        )
        section.close()
        if not path:
            if isinstance(node.value, dict):
                faults.add(node.line, f"{name} needs 'data': a file, a folder or a hub name")
            return None
    if fault := _place_fault(data):
        faults.add(node.line, fault)
        return None
    return data


def _place_fault(data: Data) -> str | None:
    path = Path(data.path)
    if data.path.startswith("lab:"):
        task = data.path.removeprefix("lab:")
        if task not in LAB:
            return f"the lab has no data {task!r}.{guess(task, LAB)} It has: {', '.join(LAB)}."
        if data.split not in ("train", "validation", "test"):
            return f"the lab's data has splits train, validation and test, not {data.split!r}"
        return None
    if data.is_file:
        if not path.is_file():
            near = guess(path.name, [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else [])
            return f"there is no file {data.path!r} (looked from {Path.cwd()}).{near}"
        return None if data.split == "train" else "a local file has no splits: give each its own file"
    if data.path.startswith((".", "/", "~")) and not path.is_dir():
        return f"there is no folder {data.path!r}"
    return None


class DataSets(dict[str, Data]):
    """Data sets by name, which also have one path to print and one digest to compare, as a single one has."""

    @property
    def path(self) -> str:
        """All paths; of a single set, its own."""
        return ", ".join(data.path for data in self.values())

    def digest(self) -> str | None:
        """Return a hash over those of the local files; of a single file, its own."""
        found = [digest for data in self.values() if (digest := data.digest())]
        if len(found) < 2:
            return found[0] if found else None
        return hashlib.sha256(" ".join(found).encode()).hexdigest()[:16]


def sets_of(node: Node | None, name: str, faults: Faults) -> DataSets:
    """Read one data setting, which is then called as its key is, or a mapping from names to data settings."""
    if node is None:
        return DataSets()
    if isinstance(node.value, dict) and not _is_setting(node.value):
        found = {key: data_of(each, f"{name}.{key}", faults) for key, each in node.value.items()}
    else:
        found = {name: data_of(node, name, faults)}
    return DataSets({key: data for key, data in found.items() if data is not None})


def _is_setting(given: Mapping[str, Node]) -> bool:
    """Tell a data setting, misspelt perhaps, from names of sets; a set may be called `data` or `name`."""
    if given and all(isinstance(each.value, dict) for each in given.values()):
        return False
    others = given.keys() - SETTING
    if not others:
        return True
    place = any(isinstance(given[key].value, str) for key in ("data", "path") if key in given)
    return place and any(guess(key, SETTING) or not isinstance(given[key].value, str | dict) for key in others)


Use = Literal["sft", "dpo", "text", "retain"]


def format_fault(data: Data, use: Use, text_field: str = "text") -> str | None:
    """Look at the first row of data that is on this machine; return what is wrong with its format for this use."""
    if not _is_here(data):
        return None
    try:
        keys = set(_first(data)[0])
    except (WrongSetup, PoolError) as error:
        return str(error)
    return _keys_fault(data, keys, use, text_field)


def refuse_format(data: Data, use: Use) -> None:
    """Raise what `format_fault` finds, in data from anywhere.

    Raises:
        WrongSetup: if the first row is not of a format for this use.
    """
    if fault := _keys_fault(data, set(data.rows().column_names), use, "text"):
        raise WrongSetup(f"The {fault}.")


def _keys_fault(data: Data, keys: set[str], use: Use, text_field: str) -> str | None:
    pair = {"chosen", "rejected"}
    if use == "dpo":
        known: list[set[str]] = [pair]
        need = "'chosen' and 'rejected' (and 'prompt')"
    else:
        known = [{text_field}, {"messages"}, {"prompt", "completion"}]
        need = f"{text_field!r}, 'messages', or 'prompt' and 'completion'"
        if use != "text":
            known += [{"conversations"}, {"input_ids"}]
        if use == "retain":
            known += [pair, {"prompt", "completions", "labels"}]
            need += ", or 'chosen' and 'rejected'"
    fine = any(each <= keys for each in known)
    return None if fine else f"rows of {data.path!r} have {', '.join(sorted(keys))}; here they need {need}"


def replay_fault(task: Data, retain: Mapping[str, Data], text_field: str = "text") -> str | None:
    """Say why retain rows on this machine cannot be mixed into the task's, judged by the first row of each."""
    from ..integrations.replay import converted_row

    if not _is_here(task):
        return None
    try:
        first = _first(task)[0]
        for data in retain.values():
            if _is_here(data):
                converted_row(_first(data)[0], first, text_field)
    except WrongSetup as error:
        return f"replay: {error}"
    return None


def _is_here(data: Data) -> bool:
    return data.is_file or data.path.startswith("lab:") or (Path(data.path) / MANIFEST).is_file()


def _first(data: Data) -> Dataset:
    return Data(data.path, split=data.split, samples=1).rows()
