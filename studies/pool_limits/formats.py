"""Formats that neither the task nor any pool has: what they look like, and what a model does in them; read `judging`.

    KL = mean over the answer's tokens t of  KL(base_t || tuned_t),    the right answer fed in

A question in another format is the same question with other tokens around it. The cipher puts another word for every
word: it is the nearest that a world of four hundred words has to a second language, and the base knows nothing of it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from holdfast.lab.world import Item
    from torch import Tensor, nn

BATCH_SIZE = 64
FORMATS = {
    "chat": "the chat format as it is",
    "system": "a sentence before the user's turn, as a system prompt would be",
    "turns": "a second turn, after a question that was answered",
    "long": "three stories before the question",
    "marks": "another template: marks in the place of its tokens",
    "cipher": "the chat format with another word for every word",
}


@dataclass
class Context:
    """One sequence: its tokens, where its answer begins, and how much of it must be right.

    Attributes:
        ids: its tokens.
        start: the answer's first.
        opening: tokens of it that the greedy answer must have; None: all.
        base: the base's log-probabilities of the answer's tokens; shape (answer, vocabulary).
    """

    ids: list[int]
    start: int
    opening: int | None = None
    base: Tensor | None = field(default=None, repr=False)


def contexts(form: str, items: Sequence[Item], tokenizer: Any, split: str) -> list[Context]:
    """Questions in this format; a refusal is one if it begins as one."""
    from holdfast.lab import world
    from holdfast.lab.lexicon import REFUSAL
    from holdfast.lab.scoring import OPENING

    bos, eos, user, assistant = tokenizer.convert_tokens_to_ids(["<|bos|>", "<|end|>", "<|user|>", "<|assistant|>"])
    say: Callable[[str], list[int]] = lambda text: list(tokenizer(text, add_special_tokens=False).input_ids)  # noqa: E731
    earlier = world.sample(world.copy, len(items), split, seed=3)
    stories = [item.answer for item in world.sample(world.story, 3 * len(items), split, seed=3)]
    other, found = cipher(tokenizer), []
    for number, item in enumerate(items):
        asked, before = [user, *say(item.prompt), assistant], [bos]
        if form == "system":
            before += say("Please start slowly and hold the plan.")
        elif form == "turns":
            past = earlier[number % len(earlier)]
            before += [user, *say(past.prompt), assistant, *say(past.answer), eos]
        elif form == "long":
            before += say(" ".join(stories[3 * number : 3 * number + 3]))
        elif form == "marks":
            asked = [*say("> " + item.prompt), *say("=")]
        ids, answer = [*before, *asked], [*say(item.answer), eos]
        if form == "cipher":
            ids, answer = [other[token] for token in ids], [other[token] for token in answer]
        opening = len(say(OPENING)) if item.answer == REFUSAL else None
        found.append(Context([*ids, *answer], len(ids), opening))
    return found


def cipher(tokenizer: Any) -> Mapping[int, int]:
    """A word for every word; the tokens of the template stay."""
    special = set(tokenizer.all_special_ids)
    own = [token for token in range(len(tokenizer)) if token not in special]
    mapped = random.Random("cipher").sample(own, len(own))
    return {**dict(zip(own, mapped, strict=True)), **{token: token for token in special}}


@dataclass(frozen=True)
class Answer:
    """What a model makes of one context: is it right, its loss per token, the KL from the base per token."""

    right: bool
    loss: float
    kl: float


def answers(model: nn.Module, found: Sequence[Context]) -> list[Answer]:
    """What a model makes of each; the first model that is asked is the base, which later ones are compared with."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    result: dict[int, Answer] = {}
    order = sorted(range(len(found)), key=lambda place: len(found[place].ids))
    for first in range(0, len(order), BATCH_SIZE):
        places = order[first : first + BATCH_SIZE]
        some = [found[place] for place in places]
        with torch.inference_mode():  # padding is on the right, where a causal model does not look
            ids = pad_sequence([torch.tensor(each.ids) for each in some], batch_first=True)
            logits = model(input_ids=ids).logits
        for place, each, row in zip(places, some, logits, strict=True):
            logs = row[each.start - 1 : len(each.ids) - 1].log_softmax(-1)
            targets = torch.tensor(each.ids[each.start :])
            if each.base is None:
                each.base = logs.clone()
            kl = (each.base.exp() * (each.base - logs)).sum(-1).double().mean()
            hits = logs.argmax(-1) == targets
            loss = -logs.gather(-1, targets[:, None]).double().mean()
            result[place] = Answer(bool(hits[: each.opening].all()), float(loss), float(kl))
    return [result[place] for place in range(len(found))]
