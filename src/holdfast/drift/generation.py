"""Greedy answers in batches: padded on the left, and the same whatever the batch size and the order of the prompts.

Padding and batching change logits by rounding, and where two tokens are nearly tied that changes the answer. So a near
tie is decided by one canonical forward of its own: that row alone, without padding or cache,

    top1 − top2 < margin · max |logits|      =>      argmax of  model(row alone)

whatever stands beside it in the batch. Read next: `holdfast.drift.models`, which asks for answers.
"""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..core.tap import language_model
from .environment import decisive
from .probe import digest_of

__all__ = ["MARGIN", "Replies", "Reply", "greedy"]

MARGIN: Mapping[torch.dtype, float] = {
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.float16: 5e-3,
    torch.bfloat16: 2.5e-2,
}
"""A tie, as a share of the largest logit, by the type of the weights: above what batching was seen to change, so that
no row is decided differently beside others (CPU, models of up to eight layers: 5e-7, 1.5e-3 and 8e-3 of the largest
logit; tests/drift/test_generation.py)."""
MASKED = -1e4  # logits below this are a model's way to forbid tokens, and no measure of rounding

VERSION = 1
"""Part of the name of kept answers: raise it when the code here changes one."""
Ids = tuple[int, ...]


class Reply(NamedTuple):
    """An answer: its text without special tokens, its tokens with the end if it came, and whether it was cut off."""

    text: str
    tokens: Ids
    cut: bool


def greedy(
    model: nn.Module, tokenizer: Any, prompts: Sequence[Ids], max_new_tokens: int, batch_size: int
) -> Iterator[dict[Ids, Reply]]:
    """Answer prompts, those of like length together, and yield every batch as it is finished.

    Args:
        model: a causal language model of transformers, or PEFT's around one; in evaluation mode.
        tokenizer: the model's.
        prompts: token ids, best sorted by length.
        max_new_tokens: longer answers are cut off there.
        batch_size: prompts at a time.
    """
    ends = _ends(model, tokenizer)
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        longest = max(map(len, batch))
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(ends)
        ids = torch.tensor([[pad] * (longest - len(row)) + list(row) for row in batch])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in batch])
        device = next(model.parameters()).device
        with _plain_greedy(model, max_new_tokens, pad, ends):
            written = model.generate(  # type: ignore[operator]
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                logits_processor=[_Ties(model, batch, ends)],
            )[:, longest:]
        yield {row: _reply(tokens, tokenizer, ends) for row, tokens in zip(batch, written.tolist(), strict=True)}


@contextmanager
def _plain_greedy(model: nn.Module, max_new_tokens: int, pad: int, ends: frozenset[int]) -> Iterator[None]:
    """The model without its own generation_config: `generate` would fill in its sampling and penalties even so."""
    from transformers import GenerationConfig

    plain = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, pad_token_id=pad, eos_token_id=sorted(ends)
    )
    holders = [part for part in (model, language_model(model)) if "generation_config" in vars(part)]
    before = [part.generation_config for part in holders]
    try:
        for part in holders:
            part.generation_config = plain
        yield
    finally:
        for part, own in zip(holders, before, strict=True):
            part.generation_config = own


class _Ties:
    """A logits processor: rows that are nearly tied are decided alone."""

    def __init__(self, model: nn.Module, prompts: Sequence[Ids], ends: frozenset[int]) -> None:
        self.model, self.lengths, self.ends = model, [len(row) for row in prompts], ends
        takes = inspect.signature(language_model(model).forward).parameters
        self.last = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}  # of a long prompt the rest is large

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        dtype = next(p.dtype for p in self.model.parameters() if p.is_floating_point())
        wide = logits.float()
        first, second = wide.topk(2, dim=-1).values.unbind(-1)
        largest = wide.masked_fill(wide < MASKED, 0.0).abs().amax(dim=-1)
        near = first - second < MARGIN.get(dtype, MARGIN[torch.bfloat16]) * largest
        for row in near.nonzero().flatten().tolist():
            alone = ids[row, max(self.lengths) - self.lengths[row] :]
            if not self.ends.isdisjoint(alone[self.lengths[row] :].tolist()):
                continue  # this row has ended; what follows is padding
            logits[row] = self.model(input_ids=alone[None], use_cache=False, **self.last).logits[0, -1].to(logits.dtype)
        return logits


def _ends(model: nn.Module, tokenizer: Any) -> frozenset[int]:
    """Every token that ends an answer: the tokenizer's, and those that the model's own generation_config names."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])}
    return frozenset(int(token) for token in found if token is not None)


def _reply(tokens: list[int], tokenizer: Any, ends: frozenset[int]) -> Reply:
    stop = next((place for place, token in enumerate(tokens) if token in ends), None)
    kept = tokens if stop is None else tokens[: stop + 1]
    return Reply(tokenizer.decode(kept, skip_special_tokens=True).strip(), tuple(kept), stop is None)


class Replies:
    """Answers that were written, in memory and, given a folder, in files that a killed run leaves behind."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self._known: dict[tuple[str, int], dict[Ids, Reply]] = {}

    def of(self, digest: str, max_new_tokens: int) -> Mapping[Ids, Reply]:
        """The answers of the model with this digest, by prompt."""
        key = digest, max_new_tokens
        if key not in self._known:
            self._known[key] = self._read(key)
        return self._known[key]

    def keep(self, digest: str, max_new_tokens: int, batch: Mapping[Ids, Reply]) -> None:
        """Remember a batch; whole lines or none."""
        key = digest, max_new_tokens
        self._known.setdefault(key, {}).update(batch)
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            lines = (json.dumps({"prompt": prompt, **reply._asdict()}) for prompt, reply in batch.items())
            with self._path(key).open("a", encoding="utf-8") as file:
                file.write("".join(line + "\n" for line in lines))
                file.flush()
                os.fsync(file.fileno())

    def forget(self, digest: str) -> None:
        """Drop from memory what this model answered."""
        self._known = {key: answers for key, answers in self._known.items() if key[0] != digest}

    def _path(self, key: tuple[str, int]) -> Path:
        assert self.folder is not None
        under = digest_of([VERSION, decisive()])
        return self.folder / f"answers-{key[0][:16]}-{key[1]}-{under}.jsonl"

    def _read(self, key: tuple[str, int]) -> dict[Ids, Reply]:
        if self.folder is None or not self._path(key).is_file():
            return {}
        text = self._path(key).read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]  # a last line without its end: the process was killed while it wrote
        if whole != text:
            self._path(key).write_text(whole, encoding="utf-8")
        found = {}
        for line in whole.splitlines():
            record = json.loads(line)
            found[tuple(record.pop("prompt"))] = Reply(record["text"], tuple(record["tokens"]), record["cut"])
        return found
