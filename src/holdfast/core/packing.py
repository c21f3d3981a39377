"""Puts small retain batches of one group together, so that a reference gradient takes few passes: right-padded rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .types import IGNORED, Batch

TOKENS = 2048  # of a pass, padding included


def passes(jobs: Sequence[tuple[int, Batch]]) -> list[tuple[int, Batch]]:
    """Put small batches of the same group together into passes of at most `TOKENS` tokens, in order.

    A larger batch stays as it is, so no pass takes more memory than a retain batch alone.

    Args:
        jobs: group numbers with batches.
    """
    packed = list[tuple[int, list[Batch]]]()
    for number, batch in jobs:
        last = packed[-1][1] if packed and packed[-1][0] == number else []
        together = [each["input_ids"] for each in (*last, batch)]
        tokens = sum(len(ids) for ids in together) * max(ids.shape[1] for ids in together)
        if last and tokens <= TOKENS and all(_plain(each) for each in (*last, batch)):
            last.append(batch)
        else:
            packed.append((number, [batch]))
    return [(number, stack(batches)) for number, batches in packed]


def _plain(batch: Batch) -> bool:
    return batch.keys() <= {"input_ids", "attention_mask", "labels", "completion_mask"}


def stack(batches: Sequence[Batch]) -> Batch:
    """Return one batch of the rows of several, padded on the right; masks of completions become labels."""
    if len(batches) == 1:
        return batches[0]
    longest = max(batch["input_ids"].shape[1] for batch in batches)

    def padded(tensor: Tensor, value: int) -> Tensor:
        return nn.functional.pad(tensor, (0, longest - tensor.shape[1]), value=value)

    def labels(batch: Batch) -> Tensor:
        if "labels" in batch:
            return batch["labels"]
        return batch["input_ids"].masked_fill(batch["completion_mask"] == 0, IGNORED)

    masks = [b["attention_mask"] if "attention_mask" in b else torch.ones_like(b["input_ids"]) for b in batches]
    return {
        "input_ids": torch.cat([padded(batch["input_ids"], 0) for batch in batches]),
        "attention_mask": torch.cat([padded(mask, 0) for mask in masks]),
        "labels": torch.cat([padded(labels(batch), IGNORED) for batch in batches]),
    }
