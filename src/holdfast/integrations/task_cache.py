"""`cache=` of a host: what the base says of the task is kept from one epoch to the next, and from one run to the next.

    holdfast.attach(trainer, methods, cache=True)                                    # a folder for this very base
    holdfast.attach(trainer, methods, cache="kept")                                  # this folder, or an error
    holdfast.attach(trainer, methods, cache={"folder": "kept", "dtype": "float16"})  # at half the room

Read next: `holdfast.retain.task_cache`, which keeps it, and docs/cache.md.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch

from ..core.digest import tokenizer_digest
from ..core.errors import ConfigError
from ..core.kept_task import KeepTask, KeptTask
from ..core.session import Session
from ..retain.task_cache import TaskCache
from ..retain.task_kinds import Keeping

Cache: TypeAlias = "bool | str | Path | Mapping[str, str | Path]"
"""What users hand to a host: whether to keep the base, or where, or {folder: ..., dtype: ...}."""
KNOWN = ("folder", "dtype")
DTYPES = {"float32": torch.float32, "float16": torch.float16}
log = logging.getLogger(__name__)


def faults_of(cache: object) -> list[str]:
    """Return a sentence for everything that is wrong with a setting.

    >>> faults_of({"foler": "kept", "dtype": "bfloat16"})[0]
    "cache has no setting 'foler'. Did you mean 'folder'?"
    >>> faults_of(True), faults_of("kept")
    ([], [])
    """
    if isinstance(cache, bool) or (isinstance(cache, str | Path) and str(cache)):
        return []
    if not isinstance(cache, Mapping):
        return [f"cache is true, a folder, or {{folder: ..., dtype: ...}}, got {cache!r}"]
    faults = []
    for name in cache:
        if name not in KNOWN:
            close = get_close_matches(str(name), KNOWN, 1)
            hint = f"Did you mean {close[0]!r}?" if close else f"There are {', '.join(KNOWN)}."
            faults.append(f"cache has no setting {name!r}. {hint}")
    if (dtype := cache.get("dtype", "float32")) not in DTYPES:
        faults.append(f"cache: dtype must be float32 or float16 (bfloat16 loses a small KL), got {dtype!r}")
    if "folder" in cache and not (isinstance(cache["folder"], str | Path) and str(cache["folder"])):
        faults.append(f"cache: folder must be a path, got {cache['folder']!r}")
    return faults


def keeping_of(cache: Cache, tokenizer: Any) -> Keeping | None:
    """Return where and how the base is kept; None if it is not.

    Args:
        cache: what the user asked for.
        tokenizer: the model's, if the host has one.

    Raises:
        ConfigError: with all faults of the setting.
    """
    if faults := faults_of(cache):
        raise ConfigError("cache", faults)
    if cache is False:
        return None
    asked: Mapping[str, Any] = {} if cache is True else cache if isinstance(cache, Mapping) else {"folder": cache}
    folder = Path(asked["folder"]) if "folder" in asked else None
    dtype = DTYPES[asked["dtype"]] if "dtype" in asked else None
    known = hasattr(tokenizer, "get_vocab")  # the processor of a model of images has none
    return Keeping(folder, dtype, tokenizer_digest(tokenizer) if known else Keeping.tokenizer)


def keeper(cache: Cache, tokenizer: Any) -> KeepTask | None:
    """Return what keeps the base for a session; None if it is not to be kept. See `keeping_of`."""
    keeping = keeping_of(cache, tokenizer)
    return None if keeping is None else partial(TaskCache, keeping=keeping)


def tell_if_idle(cache: Cache, session: Session) -> None:
    """Say so where a cache was asked for and nothing would be kept."""
    if cache is not False and session.kept is None:
        log.warning("cache=%r does nothing here: no method reads the base on the task's own sequences.", cache)


def write_at_ends(trainer: Any, session: Session) -> None:
    """Have a trainer write down what is kept at the end of every epoch and of the run.

    At the end of an epoch, so that a sequence that goes to another process in the next one is found there.
    """
    if session.kept is not None:
        trainer.add_callback(_callback_class()(session.kept))


def forget_ends(trainer: Any) -> None:
    """Undo `write_at_ends`."""
    for callback in list(trainer.callback_handler.callbacks):
        if getattr(callback, "keeps_the_base", False):
            trainer.remove_callback(callback)


def _callback_class() -> Any:
    from transformers import TrainerCallback

    class Writing(TrainerCallback):
        """Writes what is kept of the base."""

        keeps_the_base = True

        def __init__(self, kept: KeptTask) -> None:
            self._kept = kept

        def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
            self._kept.write()

        on_train_end = on_epoch_end

    return Writing
