"""The pools: the default one, what is taken out of it, what of each skill a pool shows; read `training` next.

What is taken out is replaced by other sequences of the same kind, so that every pool has 256, unless it says otherwise.
In the lab text and chat begin with the same token, so most of what the pool calls `text` is chat; here *plain text* is
what has no user's turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arms import (
    CHAT,
    NO_FACTS,
    NO_LISTS,
    NO_REFUSALS,
    NOISE,
    NOT_EVEN_SOFTLY,
    OTHER,
    ROWS,
    SHORT,
    SMALL,
    TEXT,
    TINY,
    WHOLE,
)
from .shown import base, is_chat, thought_of_refusing, words

if TYPE_CHECKING:
    from holdfast.retain.pool import Kept, Pool

SIZE, SPARE, SOFTLY = (
    256,
    1500,
    0.02,
)  # sequences; those that replacements come from; P(refusal) that counts as a thought


def pool(name: str, work: Path) -> Pool:
    """A pool by its name: made once, and kept in a folder."""
    from holdfast.retain.pool import Pool

    folder = work / "pools" / name.replace(" ", "-").replace(",", "")
    if not (folder / "manifest.json").is_file():
        _made(name, work).save(folder)
    return Pool.load(folder)


def _made(name: str, work: Path) -> Pool:
    if name in SAMPLED:
        return _sampled(**SAMPLED[name])
    if name == "stories":
        return _stories(SIZE + 32)
    stories = [kept for kept in pool("stories", work) if not is_chat(kept)] if name in (TEXT, NOISE, ROWS) else []
    if name == TEXT:
        return _of(stories[:SIZE])
    if name == NOISE:
        noise = [kept for kept in _known(work) if kept.kind == "noise"]
        return _of([*stories[: SIZE // 2], *noise[: SIZE // 2]])
    if name == ROWS:
        return _of([*stories[:24], *_rows()])
    return _of(list(_refilled(pool(WHOLE, work), _known(work), KEEP[name]())))


SAMPLED: dict[str, dict[str, Any]] = {
    WHOLE: {"n": SIZE, "seed": 0},
    OTHER: {"n": SIZE, "seed": 1},
    TINY: {"n": 8, "seed": 0},
    SMALL: {"n": 32, "seed": 0},
    SHORT: {"n": SIZE, "seed": 0, "max_tokens": 8},
    "spare": {"n": SPARE, "seed": 100, "mix": {"text": 0.1, "chat": 0.3, "noise": 0.6}},
}


def without(skill: str) -> Callable[[Kept], bool]:
    """Return what tells whether a sequence shows nothing of a skill."""
    pattern = words(skill)
    return lambda kept: not pattern.search(kept.text)


def never_refusing() -> Callable[[Kept], bool]:
    """Return what tells whether a sequence has no refusal, and the base does not think of one where it answers."""
    silent = without("refusal")
    return lambda kept: silent(kept) and thought_of_refusing(kept) < SOFTLY


KEEP: dict[str, Callable[[], Callable[[Kept], bool]]] = {
    NO_REFUSALS: lambda: without("refusal"),
    NOT_EVEN_SOFTLY: never_refusing,
    NO_FACTS: lambda: without("fact"),
    NO_LISTS: lambda: without("list"),
    CHAT: lambda: is_chat,
}


def _sampled(**settings: Any) -> Pool:
    from holdfast.retain.making import make
    from holdfast.retain.settings import Settings

    return make(*base(), Settings(**settings))


def _stories(n: int) -> Pool:
    """What the base writes where a text begins, unless it begins with a user's turn: it is the base, given that."""
    import torch
    from holdfast.retain.making import make
    from holdfast.retain.settings import Settings

    model, tokenizer = base()

    def sampler(prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
        found = model.generate(
            torch.tensor(prompts),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=max_tokens,
            begin_suppress_tokens=[tokenizer.convert_tokens_to_ids("<|user|>")],
            pad_token_id=tokenizer.pad_token_id,
        )
        return [row[len(prompts[0]) :] for row in found.tolist()]

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make(model, tokenizer, Settings(n=n, mix={"text": 1.0}), sampler=sampler)


def _rows() -> list[Kept]:
    """Eight prompts with their answers, of the split that may be trained on."""
    from holdfast.lab import world
    from holdfast.retain.rows import sequences

    items = [world.sample(make, 1, "train", seed=5)[0] for make in (*world.SKILLS.values(), world.how)]
    said = [(("user", item.prompt), ("assistant", item.answer)) for item in items]
    rows = [{"messages": [{"role": role, "content": text} for role, text in each]} for each in said]
    return sequences(rows, base()[1])


def _known(work: Path) -> list[Kept]:
    """Sequences of all kinds beyond those of the default pool."""
    return list(pool("spare", work))


def _refilled(whole: Pool, spare: Sequence[Kept], fits: Callable[[Kept], bool]) -> Iterator[Kept]:
    """The sequences of a pool that fit, and in the place of every other one a spare one of its kind that does."""
    there = {kept.id for kept in whole}
    for kind in whole.counts:
        own = [kept for kept in whole if kept.kind == kind]
        more = iter([kept for kept in spare if kept.kind == like(kind) and kept.id not in there and fits(kept)])
        for kept in own:
            if (found := kept if fits(kept) else next(more, None)) is not None:
                yield found


def like(kind: str) -> str:
    """The kind of a spare sequence: chat replaces answers to built-in prompts."""
    return "chat" if kind == "prompts" else kind


def _of(sequences: Sequence[Kept]) -> Pool:
    from holdfast.retain.pool import Pool

    return Pool(()).add(sequences)
