"""One safetensors file that may be larger than memory: written whole or not at all, and read a few rows at a time.

The header comes first and says where every tensor will lie, so rows are put in place as they are made; the file gets
its name when the last one is there. A reader maps it into memory and copies what it asks for. The facts that the file
depends on are in its header, and a file that belongs to other facts is refused by name of those that differ.
Read next: `cache`, which knows what is kept.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import torch
from torch import Tensor

from ..core.errors import WrongSetup

__all__ = ["Facts", "Stored", "Writer", "differing", "size", "sweep"]

Facts = Mapping[str, str | int]
Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
TYPES = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.uint8: "U8",
}


def size(layout: Layout) -> int:
    """Return how many bytes the tensors of a layout take.

    >>> size({"rows": (torch.float16, (3, 5)), "constants": (torch.float64, (3,))})
    54
    """
    return sum(dtype.itemsize * torch.Size(shape).numel() for dtype, shape in layout.values())


class Writer:
    """Writes tensors of known shapes piece by piece; leaving the context without an error gives the file its name.

    Args:
        file: what comes of it. Its folder is made if need be.
        layout: dtype and shape of every tensor, by name.
        facts: what the file depends on.
    """

    def __init__(self, file: Path, layout: Layout, facts: Facts) -> None:
        self._file = file
        self._temporary = file.with_name(f".{file.name}.{platform.node()}.{os.getpid()}")
        self._places: dict[str, tuple[int, int]] = {}  # where a tensor starts, and the bytes of a row of it
        self._header = self._plan(layout, facts)

    def _plan(self, layout: Layout, facts: Facts) -> bytes:
        entries: dict[str, Any] = {"__metadata__": {"holdfast": json.dumps(dict(facts))}}
        end = 0
        for name, (dtype, shape) in sorted(layout.items(), key=lambda item: -item[1][0].itemsize):  # all are aligned
            start, end = end, end + size({name: (dtype, shape)})
            entries[name] = {"dtype": TYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
            self._places[name] = start, dtype.itemsize * torch.Size(shape[1:]).numel()
        text = json.dumps(entries).encode()
        text += b" " * (-len(text) % 8)
        self._end = 8 + len(text) + end
        self._places = {name: (8 + len(text) + at, row) for name, (at, row) in self._places.items()}
        return len(text).to_bytes(8, "little") + text

    def __enter__(self) -> Writer:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        sweep(self._file.parent, self._file.name)
        self._open = self._temporary.open("wb")
        self._open.write(self._header)
        self._open.truncate(self._end)
        return self

    def put(self, name: str, row: int, values: Tensor) -> None:
        """Write rows of a tensor, the first of them as row number `row`."""
        start, width = self._places[name]
        host = values.detach().cpu().contiguous()
        self._open.seek(start + row * width)
        if host.numel():
            self._open.write((ctypes.c_char * (host.numel() * host.element_size())).from_address(host.data_ptr()))

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        if kind is None:
            self._open.flush()
            os.fsync(self._open.fileno())
        self._open.close()
        if kind is None:
            self._temporary.replace(self._file)
        else:
            self._temporary.unlink()


def sweep(folder: Path, name: str = "") -> None:
    """Remove what writers that were killed on this machine have left in a folder.

    Args:
        folder: that they wrote into.
        name: of the file that they were writing; empty: of any.
    """
    machine = f".{platform.node()}."
    for left in folder.glob(f".{name}*{machine}*"):
        begun, _, number = left.name.rpartition(machine)
        if (not name or begun == f".{name}") and number.isdigit() and not Path(f"/proc/{number}").exists():
            left.unlink(missing_ok=True)


class Stored:
    """A file of `Writer`, mapped into memory.

    Args:
        file: to be read.
        expected: facts that it must have; those not named may be anything.
        remedy: what to do if it has others.

    Raises:
        WrongSetup: if there is no such file, it cannot be read, or it belongs to other facts: all of them are named.
    """

    def __init__(
        self, file: Path, expected: Facts, remedy: str = "Make another with ReferenceCache.of(...), or go back to what "
        "this one was made of."
    ) -> None:  # fmt: skip
        from safetensors import SafetensorError, safe_open

        if not file.is_file():
            raise WrongSetup(
                f"There is no reference cache {file}. Make it with ReferenceCache.of(...); with several machines, in a "
                "folder that all of them see ($HOLDFAST_CACHE)."
            )
        try:
            self._file = cast(Any, safe_open(str(file), framework="pt"))
            metadata = self._file.metadata() or {}
        except (OSError, SafetensorError) as error:
            raise WrongSetup(f"{file} cannot be read ({error}). Delete it, and it will be made anew.") from None
        if "holdfast" not in metadata:
            raise WrongSetup(f"{file} is no reference cache of holdfast's. Give the file of one.")
        self.facts: Facts = json.loads(metadata["holdfast"])
        if lines := differing(self.facts, expected):
            raise WrongSetup(
                f"{file} does not belong to this run, so its KL would be to another base or on other tokens. What "
                "differs:\n" + "\n".join(lines) + f"\n{remedy}"
            )

    def rows(self, name: str, start: int, end: int) -> Tensor:
        """Return rows of a tensor, copied out of the file."""
        found: Tensor = self._file.get_slice(name)[start:end]
        return found

    def whole(self, name: str) -> Tensor:
        """Return a whole tensor."""
        found: Tensor = self._file.get_tensor(name)
        return found


def differing(there: Facts, expected: Facts) -> list[str]:
    """Return a line for each expected fact that is another one there.

    >>> differing({"dtype": "float16", "mask": "none"}, {"dtype": "float32", "mask": "none"})
    ['  dtype: float16 there, float32 here']
    """
    return [
        f"  {name}: {_short(there.get(name, 'none'))} there, {_short(value)} here"
        for name, value in expected.items()
        if there.get(name) != value
    ]


def _short(value: str | int) -> str:
    text = str(value)
    return f"{text[:12]}…" if len(text) == 64 else text
