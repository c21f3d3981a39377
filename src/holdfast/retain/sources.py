"""Sources: small generators of what a pool is sampled from.

    text     the start token                                     the base writes on
    chat     the chat format up to the user's words              the base invents them, then answers
    prompts  a built-in prompt in the chat format                the base answers
    noise    random tokens in the chat format                    the base writes one token: its first word to anything
    task     a prompt of the task                                the base answers
    own      the user's row                                      nothing is written

What must be covered first is the *format*: what was never replayed in a format erodes there, while skills that were
never replayed are kept in formats that were (docs/pool.md). So chat and noise go through every format in turn. Read
next: `making`, which draws from these.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, cycle
from typing import Any, Literal

from .formats import ChatFormat, special_ids
from .kept import Kept
from .prompts import BuiltIn
from .rows import Prompt, prompt_ids

__all__ = ["Draft", "chat", "noise", "own", "prompts", "task", "text", "words_known"]

PASSES = 4  # answers to one prompt at most: more would be the same again
NOISE = 4, 24  # random tokens in a context


@dataclass(frozen=True)
class Draft:
    """A sequence that is to be written.

    Attributes:
        kind: of the sequence.
        source: more narrowly.
        context: the tokens to write on from.
        invent: the format in which the user's words are still to be invented; the context ends before them.
        write: how much the base is to write: nothing, its first token, or a whole answer.
    prompt_tokens: of the sequence; None: all of the context.
    """

    kind: str
    source: str
    context: tuple[int, ...]
    invent: ChatFormat | None = None
    write: Literal["nothing", "first", "all"] = "all"
    prompt_tokens: int | None = None


def text(start: int) -> Iterator[Draft]:
    """Free text, from the token with which text starts."""
    while True:
        yield Draft("text", "start token", (start,), prompt_tokens=0)


def chat(formats: Sequence[ChatFormat], tokenizer: Any) -> Iterator[Draft]:
    """Chat in which the base invents the user's words and answers them, in every format in turn."""
    for form in _half_plain(formats):
        before = tokenizer(form.before, add_special_tokens=False).input_ids
        yield Draft("chat", form.name, tuple(before), invent=form)


def prompts(built_in: Sequence[BuiltIn], tokenizer: Any, rng: random.Random) -> Iterator[Draft]:
    """Built-in prompts a few times over, every stretch with every kind."""
    for _ in range(PASSES):
        for prompt in _spread(built_in, rng):
            yield Draft("prompts", prompt.kind, tuple(prompt_ids(prompt.text, tokenizer)))


def noise(formats: Sequence[ChatFormat], tokenizer: Any, rng: random.Random, answered: bool) -> Iterator[Draft]:
    """Random ordinary tokens as the user's words, in every format in turn."""
    special = special_ids(tokenizer)
    vocabulary = [id for id in range(len(tokenizer)) if id not in special]
    for form in _half_plain(formats):
        words = ""
        while not words:
            ids = (rng.choice(vocabulary) for _ in range(rng.randint(*NOISE)))
            pieces = [id for id in ids if "\ufffd" not in tokenizer.decode([id])]  # half a character alone
            words = tokenizer.decode(pieces).strip()
        context = tokenizer(form.render(words), add_special_tokens=False).input_ids
        yield Draft("noise", form.name, tuple(context), write="all" if answered else "first")


def task(given: Sequence[Prompt], tokenizer: Any, rng: random.Random) -> Iterator[Draft]:
    """Prompts of the task in a random order, a few times over."""
    for _ in range(PASSES):
        for prompt in rng.sample(given, len(given)):
            yield Draft("task", "prompts", tuple(prompt_ids(prompt, tokenizer)))


def own(rows: Sequence[Kept], rng: random.Random) -> Iterator[Draft]:
    """The user's rows in a random order, each once."""
    for kept in rng.sample(rows, len(rows)):
        yield Draft("own", kept.source, kept.input_ids, write="nothing", prompt_tokens=kept.prompt_tokens)


def words_known(text: str, tokenizer: Any) -> bool:
    """Whether a tokenizer can say a text: no token of it is the unknown one."""
    return tokenizer.unk_token_id not in tokenizer(text, add_special_tokens=False).input_ids


def _spread(built_in: Sequence[BuiltIn], rng: random.Random) -> list[BuiltIn]:
    """Prompts in a random order in which every kind comes as often in one stretch as in another."""
    total, seen, places = Counter(prompt.kind for prompt in built_in), Counter[str](), {}
    for prompt in rng.sample(built_in, len(built_in)):
        places[prompt] = (seen[prompt.kind] + rng.random()) / total[prompt.kind]
        seen[prompt.kind] += 1
    return sorted(places, key=places.__getitem__)


def _half_plain(formats: Sequence[ChatFormat]) -> Iterator[ChatFormat]:
    """The formats in turn, every second time the one without a system prompt, if there is one."""
    plain = [form for form in formats if form.system is None]
    others = [form for form in formats if form.system is not None]
    if not plain or not others:
        yield from cycle(formats)
        return
    for i in count():
        yield others[i // 2 % len(others)] if i % 2 else plain[0]
