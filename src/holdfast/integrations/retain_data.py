"""Turns retain data in any of TRL's row formats into batches of tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..core.errors import WrongSetup
from ..core.types import IGNORED, Batch


def to_batches(
    rows: Iterable[Mapping[str, Any]],
    tokenizer: Any,
    *,
    batch_size: int = 4,
    max_length: int | None = None,
    device: torch.device | str = "cpu",
) -> list[Batch]:
    """Return batches with `input_ids`, `attention_mask` and `labels`, padded on the right.

    Args:
        rows: ready batches of tensors (kept as they are), or rows with `text`, with `messages`, or with `prompt` and
            `completion` (strings or messages). Of the last only the completion is supervised.
        tokenizer: with a chat template, if rows hold messages.
        batch_size: rows in a batch; a fixed number, so that a reference gradient does not depend on the host's.
        max_length: longer rows are cut on the right.
        device: where the batches go.

    Raises:
        WrongSetup: for a row of another format; the message names its keys.
    """
    rows = list(rows)
    if rows and isinstance(rows[0].get("input_ids"), Tensor):
        return [{key: value.to(device) for key, value in row.items()} for row in rows]
    pairs = [_tokenize(row, tokenizer) for row in rows]
    cut = slice(None, max_length)
    pairs = [(ids[cut], labels[cut]) for ids, labels in pairs]
    return [_collate(pairs[i : i + batch_size], tokenizer, device) for i in range(0, len(pairs), batch_size)]


def _tokenize(row: Mapping[str, Any], tokenizer: Any) -> tuple[list[int], list[int]]:
    if "messages" in row:
        ids = _template(tokenizer, row["messages"])
        return ids, ids
    if "prompt" in row and "completion" in row:
        prompt, completion = row["prompt"], row["completion"]
        if isinstance(prompt, str):
            start, ids = tokenizer(prompt)["input_ids"], tokenizer(prompt + completion)["input_ids"]
            ids = _ended(ids, tokenizer)
        else:
            start = _template(tokenizer, prompt, add_generation_prompt=True)
            ids = _template(tokenizer, prompt + completion)
        return ids, [IGNORED] * len(start) + ids[len(start) :]
    if "text" in row:
        ids = _ended(tokenizer(row["text"])["input_ids"], tokenizer)
        return ids, ids
    raise WrongSetup(
        f"A retain row has keys {sorted(row)}. Give rows with 'text', with 'messages', or with 'prompt' and "
        "'completion', or batches of tensors with 'input_ids' and 'labels'."
    )


def _template(tokenizer: Any, messages: Any, **options: Any) -> list[int]:
    encoded = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)
    return list(encoded["input_ids"])


def _ended(ids: list[int], tokenizer: Any) -> list[int]:
    end = tokenizer.eos_token_id
    return ids if end is None or (ids and ids[-1] == end) else [*ids, end]


def _collate(pairs: list[tuple[list[int], list[int]]], tokenizer: Any, device: torch.device | str) -> Batch:
    longest = max(len(ids) for ids, _ in pairs)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id

    def padded(rows: list[list[int]], value: int) -> Tensor:
        return torch.tensor([row + [value] * (longest - len(row)) for row in rows], device=device)

    return {
        "input_ids": padded([ids for ids, _ in pairs], pad),
        "attention_mask": padded([[1] * len(ids) for ids, _ in pairs], 0),
        "labels": padded([labels for _, labels in pairs], IGNORED),
    }
