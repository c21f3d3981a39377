"""Makes a pool: draws from every source by its share, samples, drops what is broken or there already, and draws again.

    pool = make(model, tokenizer, Settings(n=256), tick=bar.update)
    pool.save("my-pool")

What cannot be had (no chat template, a source that only repeats itself) falls away, its share goes to the others, and
the manifest says so. Read next: `sources`, `writing`, `drops`.
"""

from __future__ import annotations

import platform
import random
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any

from torch import nn

from ..core.digest import base_digest, tokenizer_digest
from ..core.tap import language_model
from . import sources
from .drops import Sieve, broken
from .kept import KINDS, Kept, PoolError
from .pool import Pool
from .prompts import built_in
from .rows import Prompt, Row, sequences
from .sampling import Sampler
from .settings import MIX, Settings, quotas
from .sources import Draft
from .writing import Finisher

__all__ = ["make"]

ROUNDS, STRIKES = 16, 3  # rounds at most; rounds in which a source gives nothing new before its share goes to others


def make(
    model: nn.Module,
    tokenizer: Any,
    settings: Settings | None = None,
    *,
    task: Sequence[Prompt] = (),
    rows: Sequence[Row] | Sequence[Kept] = (),
    sampler: Sampler | None = None,
    tick: Callable[[int], None] = lambda n: None,
) -> Pool:
    """Make a pool of sequences that the base itself writes, and of the user's rows.

    Args:
        model: the base: a causal language model of transformers, or one with adapters, which are switched off.
        tokenizer: the model's.
        settings: how many, of what, how long, and the seed.
        task: prompts of the task, texts or messages, for the base to answer.
        rows: the user's own, in any of TRL's formats, or sequences that `rows.sequences` made.
        sampler: samples instead of the model (vLLM, a server).
        tick: called with the number of sequences that were just added.

    Raises:
        PoolError: if settings, rows and what is there do not fit together; all faults at once.
    """
    settings = settings or Settings()
    base = Finisher(model, tokenizer, settings, sampler)
    mine = [row for row in rows if isinstance(row, Kept)]
    given = [row for row in rows if not isinstance(row, Kept)]
    mine += sequences(given, tokenizer, max_length=base.longest)
    drafts = _drafts(base, task, mine)
    if faults := list(_faults(settings, drafts, base.said)):
        raise PoolError("The pool cannot be made:", faults)
    kept = _fill(base, drafts, tick)
    dropped = {kind: dict(why) for kind, why in base.dropped.items()}
    if not kept:
        raise PoolError(f"Nothing that the base wrote was of use: {dropped}. Is it a trained model?")
    pool = Pool(()).add(kept)
    return Pool(pool.sequences, {**_provenance(model, tokenizer, settings), "dropped": dropped, "said": base.said})


def _drafts(base: Finisher, task: Sequence[Prompt], rows: Sequence[Kept]) -> dict[str, Iterator[Draft]]:
    """What there is to draw from, by kind."""
    settings, tokenizer, formats = base.settings, base.tokenizer, base.formats
    rng = {kind: random.Random(f"{settings.seed} {kind}") for kind in KINDS}
    known = [prompt for prompt in built_in() if sources.words_known(prompt.text, tokenizer)]
    if len(known) < len(built_in()):
        base.said.append(f"the tokenizer has the words of {len(known)} of {len(built_in())} built-in prompts")
    found: dict[str, Iterator[Draft]] = {
        "text": sources.text(base.start),
        "prompts": sources.prompts(known, tokenizer, rng["prompts"]),
    }
    if formats:
        found["chat"] = sources.chat(formats, tokenizer)
        found["noise"] = sources.noise(formats, tokenizer, rng["noise"], settings.answer_noise)
    if task:
        found["task"] = sources.task(task, tokenizer, rng["task"])
    if rows:
        found["own"] = sources.own(rows, rng["own"])
    return found


def _faults(settings: Settings, drafts: Container[str], said: Sequence[str]) -> Iterator[str]:
    """What the mix and what was given have against each other."""
    for kind, what in (("task", "prompts of the task (task=)"), ("own", "rows (rows=)")):
        if settings.mix.get(kind) and kind not in drafts:
            yield f"mix asks for {kind}, and no {what} were given"
        if settings.mix and not settings.mix.get(kind) and kind in drafts:
            yield f"{what} were given, and mix has no share for {kind}"
    if not any(share and kind in drafts for kind, share in (settings.mix or MIX).items()):
        yield f"no source that mix asks for can be had here: {'; '.join(said)}"


def _fill(base: Finisher, drafts: Mapping[str, Iterator[Draft]], tick: Callable[[int], None]) -> list[Kept]:
    """Sequences of every kind, as many as its share, or as there are."""
    shares = base.settings.shares(drafts)
    target = quotas(base.settings.n, shares)
    kept: list[Kept] = []
    sieve, strikes = Sieve(), Counter[str]()
    for _ in range(ROUNDS):
        have = Counter(each.kind for each in kept)
        if not shares or have.total() == base.settings.n:
            break
        drawn = {kind: list(islice(drafts[kind], target[kind] - have[kind])) for kind in shares}
        for each, sampled in base.write([draft for some in drawn.values() for draft in some]):
            why = next(filter(None, map(broken, sampled)), None) or sieve.seen(each.input_ids)
            if why is None:
                kept.append(each)
                tick(1)
            else:
                base.dropped[each.kind][why] += 1
        now = Counter(each.kind for each in kept)
        strikes = Counter({k: strikes[k] + 1 for k, some in drawn.items() if some and now[k] == have[k]})
        done = [k for k in shares if len(drawn[k]) < target[k] - have[k] or strikes[k] == STRIKES]
        for kind in done:
            base.said.append(f"{kind}: {now[kind]} of {target[kind]}, there is no more of it; others fill the place")
            del shares[kind]
        if done and shares:
            spare = quotas(sum(target[kind] - now[kind] for kind in done), shares)
            target |= {kind: now[kind] for kind in done}
            target |= {kind: target[kind] + more for kind, more in spare.items()}
    if (more := sum(1 for _ in drafts["own"])) if "own" in drafts else 0:
        base.said.append(f"own: {more} rows are not in the pool, which has no place for them; raise n, or their share")
    if len(kept) < base.settings.n:
        base.said.append(f"{len(kept)} of {base.settings.n} sequences: what else the base wrote was dropped")
    return kept


def _provenance(model: nn.Module, tokenizer: Any, settings: Settings) -> dict[str, Any]:
    """Of what and how a pool was made."""
    name = Path(str(getattr(getattr(language_model(model), "config", None), "_name_or_path", "") or "model")).name
    versions = {"python": platform.python_version()}
    for package in ("holdfast", "torch", "transformers"):
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return {
        "base": {"name": name, "sha256": base_digest(model)},
        "tokenizer": {"name": Path(str(tokenizer.name_or_path or name)).name, "sha256": tokenizer_digest(tokenizer)},
        "settings": settings.record(),
        "versions": versions,
    }
