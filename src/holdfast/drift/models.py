"""What probes ask: one base model and what tuning made of it, side by side, with adapters switched and never merged.

    with models.on("base") as model: ...       # the same weights, adapter off
    with models.on("tuned") as model: ...      # adapter on

Two sides are either one model with its adapters switched, or models of their own; a probe cannot tell. Read next:
`holdfast.drift.generation`, how answers are written, and `holdfast.drift.probe`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..core.digest import digest
from ..core.tap import evaluation
from .generation import Replies, Reply, greedy
from .probe import BASE, ProbeError, Tick, digest_of

__all__ = ["Models", "Side", "chat_ids", "digest"]

Side = Callable[[], AbstractContextManager[nn.Module]]
"""Makes the context in which a model is that side; the module that it gives answers."""


class Models:
    """A base model and tuned ones, with one tokenizer.

    Args:
        sides: by name, the base as `"base"` first.
        tokenizer: of all of them.
        digests: by side, of what answers (`digest`); needed for a cache, and to say in a ledger what was measured.
        batch_size: answers that are written at a time; results do not depend on it.
        cache: a folder in which answers are kept as they are written, for a run that is started again; None: memory.

    Raises:
        ProbeError: if there is no base, or no tokenizer that can be used.
    """

    def __init__(
        self,
        sides: Mapping[str, Side],
        tokenizer: Any,
        *,
        digests: Mapping[str, str] | None = None,
        batch_size: int = 16,
        cache: Path | None = None,
    ) -> None:
        faults = [] if BASE in sides else [f"there is no side {BASE!r} among {list(sides)}"]
        if tokenizer is None or not hasattr(tokenizer, "decode"):
            faults.append(f"the tokenizer is {tokenizer!r:.40}: load it from the base's folder and pass it")
        elif tokenizer.eos_token_id is None:
            faults.append("the tokenizer has no end-of-sequence token, so no answer would ever end: set eos_token")
        if cache is not None and (unknown := [side for side in sides if side not in (digests or {})]):
            faults.append(
                f"answers can be kept only with the digests of what gave them; {', '.join(unknown)} have none"
            )
        if batch_size < 1:
            faults.append(f"batch_size must be at least 1, got {batch_size}")
        if faults:
            raise ProbeError("These models cannot be measured:", faults)
        self.sides, self.tokenizer, self.batch_size = dict(sides), tokenizer, batch_size
        self._digests = dict(digests or {})
        self._replies = Replies(cache)
        self._asked: dict[str, list[int]] = {}
        self._plain: dict[str, list[int]] = {}

    @contextmanager
    def on(self, side: str) -> Iterator[nn.Module]:
        """The model as that side, in evaluation mode, without gradients."""
        if side not in self.sides:
            raise ProbeError(f"There is no side {side!r}; there are {', '.join(self.sides)}.")
        with self.sides[side]() as model, evaluation(model), torch.no_grad():
            yield model

    def digest(self, side: str) -> str:
        """The digest of what answers as this side; its name where none was given."""
        return self._digests.get(side, side)

    def forget(self, side: str) -> None:
        """Drop what this side answered: its weights have changed."""
        self._replies.forget(self._author(side))

    @cached_property
    def device(self) -> torch.device:
        """Where the base is."""
        with self.on(BASE) as model:
            return next(model.parameters()).device

    def _author(self, side: str) -> str:
        """What answers of this side are kept under: other devices round otherwise."""
        return digest_of([self.digest(side), str(self.device)])

    def ids(self, prompt: str) -> list[int]:
        """A user's prompt as tokens: in the chat template, ready to be answered, if the tokenizer has one."""
        if prompt not in self._asked:
            self._asked[prompt] = chat_ids(self.tokenizer, prompt)
        return list(self._asked[prompt])

    def plain_ids(self, text: str) -> list[int]:
        """A text as tokens, without any of the tokenizer's special ones."""
        if text not in self._plain:
            self._plain[text] = list(self.tokenizer(text, add_special_tokens=False).input_ids)
        return list(self._plain[text])

    def ask(self, prompts: Sequence[str], side: str, max_new_tokens: int, tick: Tick = lambda n: None) -> list[Reply]:
        """Greedy answers to prompts, each asked once per side and length, in the order of the prompts."""
        wanted = {prompt: tuple(self.ids(prompt)) for prompt in dict.fromkeys(prompts)}
        known = self._replies.of(self._author(side), max_new_tokens)
        missing = sorted({ids for ids in wanted.values() if ids not in known}, key=lambda ids: (len(ids), ids))
        tick(len(prompts) - sum(wanted[prompt] not in known for prompt in prompts))
        if missing:
            with self.on(side) as model:
                for batch in greedy(model, self.tokenizer, missing, max_new_tokens, self.batch_size):
                    self._replies.keep(self._author(side), max_new_tokens, batch)
                    written = set(batch)
                    tick(sum(wanted[prompt] in written for prompt in prompts))
        known = self._replies.of(self._author(side), max_new_tokens)
        return [known[wanted[prompt]] for prompt in prompts]


def chat_ids(tokenizer: Any, prompt: str) -> list[int]:
    """One user turn as token ids, in the chat template if there is one; else the plain text with its special tokens."""
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        return list(tokenizer(text, add_special_tokens=False).input_ids)
    return list(tokenizer(prompt).input_ids)
