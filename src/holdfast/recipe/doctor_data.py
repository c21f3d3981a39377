"""Can the data of a recipe be read, and is there enough to retain?

Data on this machine are read as training reads them. What lies on the hub is read where it is asked for, or where the
hub is switched off and so only the cache is looked into. Read next: `doctor_disk`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.errors import WrongSetup
from ..core.method import Method, OutputMethod, needs_retain, samples_pool
from ..core.retain import Retain
from ..core.stream import beside
from ..core.types import Batch
from ..integrations.pools import _opened
from ..integrations.retain_data import to_sets
from ..methods.gradient.orthogonal_projection import OrthogonalProjection
from ..methods.weight.fisher_method import FisherMethod
from .config import Recipe, Stage
from .data import Data, _is_here, _keys_fault
from .doctor_findings import Findings
from .memory_facts import Facts
from .run import _retain
from .training import training_arguments

MANY = 100  # passes over a pool


@dataclass(frozen=True)
class Read:
    """What was read of one data set: number of rows and names of their columns."""

    rows: int
    columns: frozenset[str]


def look(recipe: Recipe, tokenizer: Any, found: Findings, *, load: bool) -> dict[int, Read]:
    """Read every data set of a recipe, and return what the stages train on, by their numbers from 0.

    Args:
        recipe: to be run.
        tokenizer: of the model; None: it could not be had.
        found: where findings go.
        load: fetch what is on the hub, too.
    """
    stages: dict[int, Read] = {}
    for name, data, use, field in _all(recipe):
        with found.noting("data"):
            if not load and not _reachable(data):
                found.warn("data", f"{name}: {data.path} is on the hub and is not read here (--load fetches it)")
                continue
            rows = data.rows()
            columns = set(rows.column_names)
            if fault := _keys_fault(data, columns, use, field):
                raise WrongSetup(f"{name}: {fault}")
            if tokenizer is not None and _chat(rows[0]) and not tokenizer.chat_template:
                raise WrongSetup(
                    f"{name}: rows of {data.path} hold messages, and the tokenizer of {recipe.model.name!r} has no "
                    "chat template to write them with. Take an instruct model's tokenizer, or rows of text."
                )
            found.ok("data", f"{name}: {data.path}, {len(rows):,} rows of {', '.join(sorted(columns))}")
            if name.startswith("stage ") and name.endswith(" data"):
                stages[int(name.split()[1]) - 1] = Read(len(rows), frozenset(columns))
    return stages


def _all(recipe: Recipe) -> Iterator[tuple[str, Data, Any, str]]:
    for number, stage in enumerate(recipe.stages, 1):
        field = stage.options.get("dataset_text_field", "text")
        yield f"stage {number} data", stage.data, stage.trainer, field
        if stage.eval_data is not None:
            yield f"stage {number} eval_data", stage.eval_data, stage.trainer, field
    for name, data in recipe.retain.items():
        yield (name if name == "retain" else f"retain {name}"), data, "retain", "text"
    for split, sets in recipe.measured.items():
        for name, data in sets.items():
            yield f"evaluate {split}.{name}", data, "text", "text"


def _reachable(data: Data) -> bool:
    from huggingface_hub import constants

    return bool(_is_here(data) or Path(data.path).is_dir() or constants.HF_HUB_OFFLINE)


def _chat(row: Mapping[str, Any]) -> bool:
    keys = ("messages", "conversations", "prompt", "completion", "chosen")
    return any(isinstance(row.get(key), list) for key in keys)


# --- retain --------------------------------------------------------------------------------------------------------


def retain_sets(recipe: Recipe, stage: Stage, tokenizer: Any, found: Findings) -> dict[str, list[Batch]]:
    """Return the retain batches of a stage as its host makes them; none where the base writes them first."""
    sets: dict[str, list[Batch]] = {}
    here = all(map(_reachable, recipe.retain.values()))
    if tokenizer is None or not recipe.retain or not here or not any(map(needs_retain, stage.methods)):
        return sets
    with found.noting("retain"):
        options = training_arguments(stage.trainer, stage.options, recipe.output / "unused", recipe.seed)
        sets = to_sets(_opened(_retain(recipe, stage), tokenizer), tokenizer, max_length=options.max_length)
    return sets


def enough(stage: Stage, number: int, facts: Facts, read: Read | None, found: Findings) -> None:
    """Note how far the retain data go, and where methods get less than they ask for."""
    about = f"stage {number + 1}: retain"
    acting = [method for method in stage.methods if method.strength and needs_retain(method)]
    if not acting:
        return
    if not facts.retain:
        if any(map(samples_pool, acting)):
            found.ok(about, "the base writes a pool before training, once (docs/pool.md)")
        return
    rows = {name: sum(len(batch["input_ids"]) for batch in batches) for name, batches in facts.retain.items()}
    before = len(found)
    for method in acting:
        for text in _short(method, rows, facts, steps_of(stage, facts, read)):
            found.warn(about, text)
    if len(found) == before:
        told = ", ".join(f"{name} {count:,}" for name, count in rows.items())
        found.ok(about, f"{told} sequences, enough for {', '.join(method.name for method in acting)}")


def _short(method: Method, rows: Mapping[str, int], facts: Facts, steps: int | None) -> Iterator[str]:
    asked = method.rows if isinstance(method, FisherMethod) else 0
    asked = method.samples if isinstance(method, OrthogonalProjection) else asked
    for name, count in rows.items():
        if count < asked:
            yield f"{method.name} asks for {asked} rows of a set, and {name!r} has {count}: it takes what there is"
    if isinstance(method, OutputMethod) and method.on == "retain" and steps:
        pool = len(Retain(facts.retain).sequences(method.data))
        times = steps * beside(facts.batch * facts.accumulation, method.share) / pool
        if times > MANY:
            yield f"{method.name}: each of {pool:,} sequences is seen about {times:.0f} times; a larger pool keeps more"


def steps_of(stage: Stage, facts: Facts, read: Read | None) -> int | None:
    """Return how many optimizer steps a stage has on one process, about; None where its rows were not counted."""
    options = stage.options
    if (most := options.get("max_steps", -1)) > 0:
        return int(most)
    if read is None:
        return None
    return math.ceil(read.rows / (facts.batch * facts.accumulation) * options.get("num_train_epochs", 3))
