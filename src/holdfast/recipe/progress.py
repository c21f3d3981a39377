"""What a run has finished, in one small file of its output folder, and whether the folder is this recipe's at all.

A recipe that is started again goes on where it was; a different recipe in the same folder is refused, because the two
would silently become one. The file is always whole: it is written beside and renamed into place.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ..core.distributed import rank
from ..core.errors import WrongSetup

if TYPE_CHECKING:
    from .config import Recipe

FILE = "progress.json"
AFTERWARDS = ("evaluate", "output", "experiment", "arm", "ledger", "cache")
"""Keys that do not change what is trained: they may differ between two starts."""


class Progress:
    """The record of one output folder.

    Args:
        recipe: whose folder it is; the folder is made if it is not there.

    Raises:
        WrongSetup: if the folder holds something else; the message names the difference and the way out.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.folder = recipe.output
        self._record: dict[str, Any] = {"schema": 1, "training": trained(recipe), "stages": []}
        if (self.folder / FILE).is_file():
            self._continue()
        elif self.folder.is_dir() and any(self.folder.iterdir()):
            raise WrongSetup(
                f"The output folder {self.folder} is not empty and holds no run of holdfast's ({FILE}). Choose another "
                "`output`, or empty the folder."
            )
        else:
            self._write()
        if rank() == 0:
            (self.folder / "recipe.yaml").write_bytes(recipe.source.read_bytes())

    def _continue(self) -> None:
        found = json.loads((self.folder / FILE).read_text())
        if found.get("schema") != 1:
            raise WrongSetup(f"{self.folder / FILE} is of another version of holdfast: choose another `output`.")
        if different := list(differences(found["training"], self._record["training"])):
            raise WrongSetup(
                f"The output folder {self.folder} holds a run of another recipe:\n"
                + "".join(f"  - {difference}\n" for difference in different[:8])
                + "Choose another `output` for this recipe, put the recipe back as it was (a copy is in "
                f"{self.folder / 'recipe.yaml'}), or remove the folder to start anew."
            )
        self._record = found

    def stage(self, number: int) -> dict[str, Any] | None:
        """Return what a finished stage (from 0) left here; None if it is not finished."""
        return self._record["stages"][number] if number < len(self._record["stages"]) else None

    def finish(self, number: int, figures: Mapping[str, float]) -> None:
        """Note that a stage is finished, with its figures; its result must be in place."""
        assert number == len(self._record["stages"]), "stages finish in order"
        self._record["stages"].append(dict(figures))
        self._write()

    def _write(self) -> None:
        if rank():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / f".{FILE}.{os.getpid()}"
        with temporary.open("w") as file:
            json.dump(self._record, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.folder / FILE)


def trained(recipe: Recipe) -> dict[str, Any]:
    """Return what decides the trained weights: the recipe without its afterwards, and hashes of local data files."""
    plain = {key: value for key, value in recipe.plain.items() if key not in AFTERWARDS}
    sources = [stage.data for stage in recipe.stages] + ([recipe.retain] if recipe.retain else [])
    digests = {data.path: digest for data in sources if (digest := data.digest())}
    whole: dict[str, Any] = json.loads(json.dumps({"recipe": plain, "data": digests}, default=str))
    return whole


def differences(there: Any, here: Any, place: str = "") -> Iterator[str]:
    """Yield, in words, where two plain values differ."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in dict.fromkeys([*there, *here]):
            yield from differences(there.get(key), here.get(key), f"{place}.{key}".lstrip("."))
    elif isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        for i, (a, b) in enumerate(zip(there, here, strict=True)):
            yield from differences(a, b, f"{place}[{i}]")
    elif there != here:
        yield f"{place}: there {there!r}, here {here!r}"
