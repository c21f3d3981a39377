"""What a comparison's folder holds, in one small file, and whether it may go on there: more is fine, other is not.

    output/
      compare.json      what is compared; beside it everything that `compare` and `compare_results` write
      ledger.jsonl      every point of every run
      runs/             one folder, recipe and log for each run
      .at-work          held while a comparison runs here, so that no second one begins

Arms, settings, seeds, scales, checkpoints and repairs may be added between two starts. Anything else would put results
of two experiments into one ledger, and is refused with the difference. Read next: `compare`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..core.errors import WrongSetup
from .progress import differences, trained

try:
    import fcntl
except ImportError:  # Windows: nobody is kept out
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from .compare_settings import Comparing
    from .config import Recipe

FILE = "compare.json"
AT_WORK = ".at-work"
FIXED = ("shared", "measured", "experiment")


class Folder:
    """The record of a comparison.

    Args:
        recipe: with `compare`; its output folder is made if it is not there.
        comparing: what it compares.

    Raises:
        WrongSetup: if the folder holds something else; the message names the difference and the way out.
    """

    def __init__(self, recipe: Recipe, comparing: Comparing) -> None:
        self.path = recipe.output / FILE
        self._record: dict[str, Any] = {"schema": 1, "probes": None, **_described(recipe, comparing)}
        if self.path.is_file():
            there = json.loads(self.path.read_text(encoding="utf-8"))
            if there.get("schema") != 1:
                raise WrongSetup(f"{self.path} is of another version of holdfast: choose another `output`.")
            if found := list(_changes(there, self._record)):
                raise WrongSetup(
                    f"The output folder {recipe.output} holds another comparison:\n"
                    + "".join(f"  - {change}\n" for change in found[:8])
                    + "Arms, values of their settings, seeds, scales, checkpoints and repairs may be added; anything "
                    "else needs another `output`. Or put the recipe back as it was, or remove the folder to start anew."
                )
            if there["probes"] is not None:
                self._record |= {key: there[key] for key in ("probes", "suite_scores")}
        elif recipe.output.is_dir() and any(path.name != AT_WORK for path in recipe.output.iterdir()):
            raise WrongSetup(
                f"The output folder {recipe.output} is not empty and holds no comparison ({FILE}). Choose another "
                "`output`, or empty the folder."
            )
        if not recipe.ledger.is_file():
            self._record["probes"] = None  # known when the base is measured

    @property
    def probes(self) -> Mapping[str, Collection[str]] | None:
        """By split, names of the probes that are run; None: the base is not measured yet."""
        found: Mapping[str, Collection[str]] | None = self._record.get("probes")
        return found

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Context: nobody else runs a comparison in this folder.

        Raises:
            WrongSetup: if somebody does.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.with_name(AT_WORK).open("w") as file:  # the system lets go of it when this process ends
            try:
                if fcntl is not None:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise WrongSetup(
                    f"Another `holdfast compare` is at work in {self.path.parent}; two would train in the same places. "
                    "Wait until it ends, or end it: what is finished is kept."
                ) from None
            yield

    def measured(self, probes: Mapping[str, Collection[str]]) -> None:
        """Note which probes give what is compared."""
        self._record["probes"] = {split: list(names) for split, names in probes.items()}
        self.write()

    def write(self) -> None:
        """Keep the record, whole or not at all."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_name(f".{FILE}.{os.getpid()}")
        with unfinished.open("w", encoding="utf-8") as file:
            json.dump(self._record, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(self.path)


def _described(recipe: Recipe, comparing: Comparing) -> dict[str, Any]:
    """What decides the numbers in the ledger; losses are all measured, of a suite only what is compared."""
    data = {name: each for sets in recipe.measured.values() for name, each in sets.items()}
    measured = {
        "evaluate": recipe.plain.get("evaluate"),
        "digests": {each.path: digest for each in data.values() if (digest := each.digest())},
        "suite": None if comparing.suite is None else comparing.suite.described(),
    }
    of_data = comparing.kinds
    found = {
        "shared": trained(recipe),
        "measured": measured,
        "experiment": recipe.experiment,
        "settings": {variant.name: trained(variant.recipe) for variant in comparing.variants},
        "seeds": list(comparing.seeds),
        "scales": {variant.name: list(variant.scales) for variant in comparing.variants},
        "checkpoints": list(comparing.checkpoints),
        "repairs": list(comparing.repairs),
        "suite_scores": [name for name in (comparing.learn, *comparing.keep) if name not in of_data],
    }
    whole: dict[str, Any] = json.loads(json.dumps(found, default=str))
    return whole


def _changes(there: Mapping[str, Any], here: Mapping[str, Any]) -> Iterator[str]:
    shared = [*differences({k: there[k] for k in FIXED}, {k: here[k] for k in FIXED})]
    yield from shared
    if shared:
        return  # every arm has them too
    for name, before in there["settings"].items():
        if name not in here["settings"]:
            yield f"{name} was compared there, and is missing here"
        else:
            yield from differences(before, here["settings"][name], name)
            if lost := [scale for scale in there["scales"][name] if scale not in here["scales"][name]]:
                yield f"{name}: scales there and not here: {lost}"
    for key in ("seeds", "checkpoints", "repairs"):
        if lost := [each for each in there.get(key, ()) if each not in here[key]]:
            yield f"{key} there and not here: {lost}"
    new = [name for name in here["suite_scores"] if name not in there["suite_scores"]]
    if new and there["probes"] is not None:
        yield f"of the suite only the scores {there['suite_scores']} were measured there, not {new}"
