"""Is the output folder this recipe's, and is there room on the disk for what the run writes?

Read next: `doctor`.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

from ..analysis.memory import GIB, Part, total
from ..core.fisher_cache import folder
from .config import Recipe, Stage
from .doctor_data import Read, steps_of
from .doctor_findings import Findings
from .memory_facts import Facts
from .progress import FILE, differences, trained

NEARLY = 0.9  # of the room there is
Written: TypeAlias = tuple[Stage, Facts, Sequence[Part], Read | None]
"""What is known of a stage: itself, its facts, its memory, and what was read of its rows."""


def look(recipe: Recipe, written: Sequence[Written], found: Findings) -> None:
    """Note whether the output folder is this recipe's, can be written to, and has room; the cache's folder likewise.

    Args:
        recipe: to be run.
        written: of every stage, what is known of it.
        found: where findings go.
    """
    output, cache = recipe.output, folder()
    _is_ours(recipe, found)
    needs: dict[Path, int] = {}
    for stage, facts, parts, read in written:
        for place, size in ((output, _checkpoints(stage, facts, parts, read)), (cache, total(parts, "disk"))):
            if size:
                there = next(parent for parent in (place.absolute(), *place.absolute().parents) if parent.exists())
                needs[there] = needs.get(there, 0) + size
    for there, needed in needs.items():
        free = shutil.disk_usage(there).free
        said = f"{there}: the run writes about {needed / GIB:.2f} GiB, and {free / GIB:.2f} GiB are free"
        if not os.access(there, os.W_OK):
            found.fault("disk", f"{there} cannot be written to. Choose another `output`, or set HOLDFAST_CACHE.")
        elif needed > free:
            found.fault("disk", f"{said}. Make room, or keep fewer checkpoints (save_total_limit).")
        elif needed > NEARLY * free:
            found.warn("disk", said)
        else:
            found.ok("disk", said)


def _is_ours(recipe: Recipe, found: Findings) -> None:
    """Note an output folder that holds something else, as the run would refuse it."""
    file = recipe.output / FILE
    if file.is_file():
        there = json.loads(file.read_text()).get("training", {})
        if different := list(differences(there, trained(recipe))):
            said = "; ".join(different[:4])
            found.fault("disk", f"{recipe.output} holds a run of another recipe: {said}. Choose another `output`.")
        else:
            found.ok("disk", f"{recipe.output} holds a run of this recipe, which goes on where it was")
    elif recipe.output.is_dir() and any(recipe.output.iterdir()):
        found.fault("disk", f"{recipe.output} is not empty and holds no run of holdfast's. Choose another `output`.")


def _checkpoints(stage: Stage, facts: Facts, parts: Sequence[Part], read: Read | None) -> int:
    """Return what a stage writes: its result, and every checkpoint with the optimizer's and the methods' state."""
    held = {part.name: part.size for part in parts if not part.of}
    kept = [part for part in parts if part.of and part.name != "retain batches"]
    states = total(kept, "held", "host")
    optimizer = next((size for name, size in held.items() if name.startswith("optimizer")), 0)
    result = held.get("adapter", held["base weights"])
    every, steps = stage.options.get("save_steps", 500), steps_of(stage, facts, read)
    if stage.options.get("save_strategy", "steps") == "no":
        count = 0
    elif stage.options.get("save_strategy") == "epoch":
        count = math.ceil(stage.options.get("num_train_epochs", 3))
    else:
        count = 1 if steps is None or every < 1 else steps // int(every) + 1
    count = min(count, stage.options.get("save_total_limit") or count)
    return int(result + count * (result + optimizer + states))
