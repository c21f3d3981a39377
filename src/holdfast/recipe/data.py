"""Rows to train, retain and measure on: local files, folders, hub data sets, and the lab's own tasks.

A name is a local file (`.jsonl`, `.json`, `.parquet`, `.csv`, `.txt`), a folder, `lab:shift` and the like, or else a
name on the Hugging Face hub. Rows stay in whatever TRL format they are in; `format_fault` says whether a trainer can
read them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..core.errors import WrongSetup
from .lines import Faults, Node, Section, guess

if TYPE_CHECKING:
    from datasets import Dataset

READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text"}
LAB = ("shift", "second", "safety_sft", "preference_pairs", "retain", "retain_chat")


@dataclass(frozen=True)
class Data:
    """Where rows come from.

    Attributes:
        path: a file, a folder, `lab:TASK`, or a hub name.
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
            "retain_chat": lambda: lab.retain(n or 256, split=_lab_split(split), form="chat"),
        }
        return makers[task]() if task in makers else list(lab.task(task, split=_lab_split(split), n=n))

    def digest(self) -> str | None:
        """Return a hash of a local file's bytes, to tell whether it is still the same; None for anything else."""
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


def format_fault(data: Data, use: Literal["sft", "dpo", "text"], text_field: str = "text") -> str | None:
    """Look at the first row of data that is on this machine; return what is wrong with its format for this use."""
    if not (data.is_file or data.path.startswith("lab:")):
        return None
    try:
        keys = set(Data(data.path, split=data.split, samples=1).rows()[0])
    except WrongSetup as error:
        return str(error)
    if use == "dpo":
        fine = {"chosen", "rejected"} <= keys
        need = "'chosen' and 'rejected' (and 'prompt')"
    else:
        known: list[set[str]] = [{text_field}, {"messages"}, {"prompt", "completion"}]
        known += [{"conversations"}, {"input_ids"}] if use == "sft" else []
        fine = any(each <= keys for each in known)
        need = f"{text_field!r}, 'messages', or 'prompt' and 'completion'"
    return None if fine else f"rows of {data.path!r} have {', '.join(sorted(keys))}; here they need {need}"
