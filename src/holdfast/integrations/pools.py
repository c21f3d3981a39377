"""Pools as retain data: one that the user has, or one that the base writes because nothing else was given.

    $HOLDFAST_CACHE/pools/<base>-<key>/     sampled once, found again by every run on the same base with the same seed

It is a pool as any other, to be looked at and changed: `holdfast retain show FOLDER`. The key is a hash of the base's
weights, the tokenizer and the settings. Read next: `holdfast.retain.making`, and `retain_data`, which batches rows.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeAlias

from torch import nn

from ..core.digest import base_digest, tokenizer_digest
from ..core.distributed import from_main
from ..core.errors import WrongSetup
from ..core.fisher_cache import folder
from ..core.method import Method, OutputMethod, samples_pool
from ..core.preset import with_own_retain
from ..core.reference import OtherModel, Reference
from ..core.retain import ONLY, Rows
from ..core.tap import language_model
from ..retain.files import MANIFEST
from ..retain.making import make
from ..retain.pool import Pool
from ..retain.settings import Settings
from .progress import counting

Source: TypeAlias = Rows | Pool | str | Path
RetainData: TypeAlias = Source | Mapping[str, Source]
"""What users hand to a host: rows, a pool or the folder of one; or several such by name."""
POOL = "pool"  # the name of a set that is a pool
log = logging.getLogger(__name__)


def retain_rows(
    methods: Sequence[Method],
    retain: RetainData,
    tokenizer: Any,
    model: nn.Module,
    reference: Reference | None,
    *,
    seed: int,
    max_length: int | None = None,
    shown: bool = False,
) -> Rows | Mapping[str, Rows]:
    """Return the rows that a run has: those that it was given, and a pool of the base's own where a method wants one.

    Args:
        methods: of the run; some bring rows of their own (`core.preset`).
        retain: what the host was given.
        tokenizer: the model's.
        model: as the host holds it, before its first step.
        reference: what the methods compare with; a pool comes from it where it is another model.
        seed: of sampling.
        max_length: of a sequence.
        shown: whether a bar is shown.

    Raises:
        WrongSetup: if a folder is no pool, or a pool is to be sampled and there is no tokenizer.
        PoolError: if a pool was made with another tokenizer, or cannot be sampled.
    """
    rows = with_own_retain(methods, _opened(retain, tokenizer))
    given = set(rows) if isinstance(rows, Mapping) else {ONLY} if not isinstance(rows, Sequence) or rows else set()
    wanting = [m for m in methods if samples_pool(m)]
    named = [m.data if isinstance(m, OutputMethod) else () for m in wanting]
    if not any(POOL in names if names else not given for names in named) or POOL in given:
        return rows
    if tokenizer is None:
        raise WrongSetup(
            f"{wanting[0].name} samples its sequences from the base, for which it needs the tokenizer: pass "
            "tokenizer=..., or what is to be kept: retain=..."
        )
    settings = Settings(seed=seed, max_length=min(Settings.max_length, max_length or Settings.max_length))
    base = reference.model if isinstance(reference, OtherModel) else model
    text = from_main(lambda: json.dumps([kept.input_ids for kept in sampled(base, tokenizer, settings, shown=shown)]))
    own: dict[str, Rows] = {POOL: [{"input_ids": ids} for ids in json.loads(text)]}
    return own | (dict(rows) if isinstance(rows, Mapping) else {ONLY: rows} if given else {})


def sampled(base: nn.Module, tokenizer: Any, settings: Settings, *, shown: bool = False) -> Pool:
    """Return the pool that the base writes with these settings: from its folder, if it was sampled before.

    Args:
        base: with adapters or without; they are switched off.
        tokenizer: the base's.
        settings: of sampling.
        shown: whether a bar is shown, and where the pool lies is printed.
    """
    name = Path(str(getattr(getattr(language_model(base), "config", None), "_name_or_path", "") or "model")).name
    facts = [
        base_digest(base),
        tokenizer_digest(tokenizer),
        str(getattr(tokenizer, "chat_template", "")),
        version("holdfast"),
    ]
    key = hashlib.sha256(json.dumps([*facts, settings.record()]).encode()).hexdigest()[:16]
    place = folder() / "pools" / f"{name}-{key}"
    if (place / MANIFEST).is_file():
        found = Pool.load(place, tokenizer=tokenizer)
        log.info("the pool was sampled before: %s", place)
        return found
    with counting(settings.n, "sampling the pool", shown=shown) as (tick, say):
        pool = make(base, tokenizer, settings, tick=tick)
        try:
            say(f"The base has written {len(pool)} sequences to keep: holdfast retain show {pool.save(place)}")
        except OSError as error:
            log.warning("The pool cannot be kept for the next run (%s): set HOLDFAST_CACHE.", error)
    return pool


def _opened(retain: RetainData, tokenizer: Any) -> Rows | Mapping[str, Rows]:
    """Return rows in place of pools and folders of pools."""
    if isinstance(retain, Pool | str | Path):
        return {POOL: _rows(retain, tokenizer)}
    if isinstance(retain, Mapping):
        return {name: _rows(each, tokenizer) for name, each in retain.items()}
    return retain


def _rows(source: Source, tokenizer: Any) -> Rows:
    if isinstance(source, str | Path):
        if not (Path(source) / MANIFEST).is_file():
            raise WrongSetup(
                f"retain={str(source)!r} is not the folder of a pool. Give one (holdfast retain sample MODEL --output "
                "FOLDER), or rows: a list of dicts, a data set, or several of them by name."
            )
        source = Pool.load(source)
    if not isinstance(source, Pool):
        return source
    if tokenizer is not None:
        source.check(tokenizer=tokenizer)
    ids: Iterable[tuple[int, ...]] = (kept.input_ids for kept in source)
    return [{"input_ids": list(each)} for each in ids]
