"""Finishes drafts: what a base needs to know of its tokenizer to write sequences, and the writing in few large batches.

    draft --(the user's words, where they are to be invented)--> context --(an answer)--> sequence

What was invented goes through the chat template as a user's words do, so its tokens are those that training would see.
Read next: `sampling`.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from ..core.tap import language_model
from .formats import chat_formats, special_ids, turn_end
from .kept import Kept, PoolError, id_of
from .sampling import Sampler, Writer, ends_of
from .settings import Settings
from .sources import Draft

__all__ = ["Finisher"]


class Finisher:
    """Turns drafts into sequences, and counts those that came to nothing.

    Attributes:
        formats: the chat formats that there are.
        said: what people should know of them.
        start: the token with which text starts.
        longest: tokens that a sequence may have.
        dropped: how many drafts of each kind were dropped, by reason.

    Raises:
        PoolError: if nothing would ever end, or the model cannot be turned back into the base.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, settings: Settings, sampler: Sampler | None) -> None:
        ends = ends_of(model, tokenizer)
        if not ends:
            raise PoolError("The tokenizer has no end-of-sequence token, so no sample would ever end: set eos_token.")
        config = getattr(language_model(model), "config", None)
        bound = min(
            int(getattr(config, "max_position_embeddings", None) or 2**31), int(tokenizer.model_max_length or 2**31)
        )
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(ends)
        starts = tokenizer.bos_token_id, getattr(config, "bos_token_id", None), tokenizer.eos_token_id
        self.start = next((int(token) for token in starts if isinstance(token, int)), min(ends))
        self.tokenizer, self.settings, self.longest = tokenizer, settings, min(settings.max_length, bound)
        self.budget = {"nothing": 0, "first": 1, "all": min(settings.max_tokens, max(1, bound // 2))}
        self.room = {write: min(settings.max_length, bound - tokens) for write, tokens in self.budget.items()}
        self.formats, self.said = chat_formats(tokenizer, settings.systems)
        end = turn_end(tokenizer)
        self.ends = ends if end is None else ends | {end}
        self.special = special_ids(tokenizer) | ends
        self.dropped: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.writer = Writer(
            model,
            pad,
            temperature=settings.temperature,
            seed=settings.seed,
            batch_size=settings.batch_size,
            sampler=sampler,
        )

    def write(self, drafts: Sequence[Draft]) -> Iterator[tuple[Kept, list[list[int]]]]:
        """Sequences, each with the stretches in it that the base wrote; what is empty or too long is dropped."""
        asked, words = self._invented([draft for draft in drafts if self._fits(draft)])
        short = [place for place, draft in enumerate(asked) if self._fits(draft)]
        answers: dict[int, list[int]] = {place: [] for place in short}
        for write in ("first", "all"):
            places = [i for i in short if asked[i].write == write]
            written = self.writer.write([asked[i].context for i in places], self.budget[write], self.ends)
            answers |= zip(places, written, strict=True)
        for i in short:
            draft, said = asked[i], [token for token in answers[i] if token not in self.special]
            if draft.write == "all" and not self.tokenizer.decode(said).strip():
                self.dropped[draft.kind]["empty"] += 1
                continue
            ids = (*draft.context, *answers[i])
            start = len(draft.context) if draft.prompt_tokens is None else draft.prompt_tokens
            kept = Kept(id_of(ids), draft.kind, draft.source, self.tokenizer.decode(list(ids)), ids, start)
            yield kept, [words.get(i, []), said]

    def _invented(self, drafts: Sequence[Draft]) -> tuple[list[Draft], dict[int, list[int]]]:
        """The drafts with the user's words in them, and the tokens that the base wrote, by place, where it did."""
        inventing = [draft for draft in drafts if draft.invent is not None]
        limit = max(1, self.budget["all"] // 2)
        written = iter(self.writer.write([draft.context for draft in inventing], limit, self.special))
        asked: list[Draft] = []
        words: dict[int, list[int]] = {}
        for draft in drafts:
            if draft.invent is None:
                asked.append(draft)
                continue
            said = [token for token in next(written) if token not in self.special]
            if text := draft.invent.cut(self.tokenizer.decode(said)):
                words[len(asked)] = said
                context = self.tokenizer(draft.invent.render(text), add_special_tokens=False).input_ids
                asked.append(replace(draft, context=tuple(context), invent=None))
            else:
                self.dropped[draft.kind]["empty"] += 1
        return asked, words

    def _fits(self, draft: Draft) -> bool:
        """Whether a draft leaves room for what is still to be written; one that does not is dropped."""
        fits = len(draft.context) <= self.room[draft.write]
        if not fits:
            self.dropped[draft.kind]["too long"] += 1
        return fits
