"""Runs the base of a recipe on its training data, ahead of training: what `holdfast cache build` does.

The trainer is made as training makes it, so its data, its batches and its precision are those of training, and every
sequence is found there. What is kept already is not made again, so a run that was stopped goes on. Read next:
`holdfast.retain.task_cache`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from ..core.errors import ConfigError, WrongSetup
from ..core.method import OutputMethod
from ..retain.cache_making import autocast_of
from ..retain.task_cache import TaskCache
from .config import Recipe
from .run import begun, result_folder

__all__ = ["build", "stages_to_build"]

Bar = Callable[[Iterable[Any], int], Iterable[Any]]


def stages_to_build(recipe: Recipe) -> list[int]:
    """Return the stages (from 0) in which a method reads the base on the task.

    Raises:
        ConfigError: if the recipe asks for no cache, or has no such stage.
    """
    faults = []
    if recipe.cache is False:
        faults.append("it keeps nothing of the base: add `cache: true`, or `cache: {folder: ..., dtype: float16}`")
    found = [
        number
        for number, stage in enumerate(recipe.stages)
        if any(isinstance(m, OutputMethod) and m.on == "task" and m.strength for m in stage.methods)
    ]
    if not found:
        faults.append("no stage has a method that reads the base on the task's own sequences, so there is none to keep")
    if faults:
        raise ConfigError(str(recipe.source), faults)
    return found


def build(recipe: Recipe, number: int, bar: Bar, batch_size: int | None = None) -> Path:
    """Keep what the base says of a stage's training data; return the folder.

    Args:
        recipe: the whole of it.
        number: of the stage, from 0.
        bar: shows how far it is, (iterable, its length) -> iterable.
        batch_size: sequences that the base runs on at a time, instead of the stage's.

    Raises:
        WrongSetup: if an earlier stage, from which this one starts, is not trained yet.
        NotYetSupported: if the methods cannot be kept.
    """
    if number and not result_folder(recipe, number - 1).exists():
        raise WrongSetup(
            f"Stage {number + 1} starts from what stage {number} makes, which is not there yet: train first, or build "
            f"stage 1 alone (--stage 1). While stage {number + 1} trains, its first epoch keeps what the base says."
        )
    stage = recipe.stages[number]
    with tempfile.TemporaryDirectory() as folder:
        trainer, _ = begun(recipe, stage, number, lambda text: None, Path(folder))
        trainer.args.dataloader_drop_last = False  # which rows are dropped changes from epoch to epoch
        if batch_size is not None:
            trainer._train_batch_size = batch_size
        loader, kept = trainer.get_train_dataloader(), trainer.holdfast.kept
        assert isinstance(kept, TaskCache)  # the stage has a method on the task
        with trainer.accelerator.autocast():
            precision = autocast_of(trainer.args.device)
        kept.build(_prepared(trainer, bar(loader, len(loader))), precision)
        trainer.holdfast.close()
    assert kept.folder is not None  # it was opened
    return kept.folder


def _prepared(trainer: Any, batches: Iterable[Any]) -> Iterator[Any]:
    return (trainer._prepare_inputs(batch) for batch in batches)
