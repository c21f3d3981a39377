"""The mean next-token loss on a data set, with what is known of its sampling error, for the ledger.

    L = Σ_i s_i / Σ_i n_i        (row i: loss sum s_i over its n_i supervised tokens)
    z_i = L + (s_i − L n_i) · rows / Σ_i n_i

L is a ratio of two random sums, so its standard error is that of its linearised items z_i, whose mean is exactly L
(the delta method; Cochran, "Sampling Techniques", 1977, ch. 6). The items go to the ledger, so that two runs
measured on the same rows are compared row by row.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from ..core.tap import Tap, evaluation, last_hidden_state
from ..core.types import IGNORED
from ..drift.ledger import Score
from ..functional.linear_divergence import linear_cross_entropy
from ..integrations.retain_data import to_batches
from ..methods.posthoc import scale_adapter
from .data import Data


def mean_loss(model: nn.Module, tokenizer: Any, data: Data, *, batch_size: int = 8, max_length: int = 1024) -> Score:
    """Return the mean loss over the supervised tokens of `data` (of prompt + completion rows, the completion).

    Args:
        model: a causal language model, with or without an adapter.
        tokenizer: the model's.
        data: rows in a TRL format.
        batch_size: rows in a forward.
        max_length: longer rows are cut.
    """
    device = next(model.parameters()).device
    batches = to_batches(data.rows(), tokenizer, batch_size=batch_size, max_length=max_length, device=device)
    sums, counts, tap = list[float](), list[int](), Tap(model)
    try:
        with torch.no_grad(), evaluation(model):
            head = tap.head()
            for batch in batches:
                inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
                hidden = last_hidden_state(tap.backbone(**inputs))
                for row, labels in zip(hidden[:, :-1], batch["labels"][:, 1:], strict=True):
                    kept = labels != IGNORED
                    loss = linear_cross_entropy(row[kept], head, labels[kept]) if kept.any() else 0.0
                    sums.append(float(loss))
                    counts.append(int(kept.sum()))
    finally:
        tap.remove()
    return ratio(sums, counts)


def ratio(sums: list[float], counts: list[int]) -> Score:
    """Return Σ sums / Σ counts with its linearised items and standard error.

    >>> score = ratio([2.0, 4.0], [1, 3])
    >>> score.value, score.items
    (1.5, (1.75, 1.25))
    """
    total, rows = sum(counts), len(counts)
    value = sum(sums) / total if total else math.nan
    scale = rows / total if total else 0.0
    items = tuple(round(value + (s - value * n) * scale, 5) for s, n in zip(sums, counts, strict=True))
    if not total or rows < 2:
        return Score(value, n=rows)
    variance = sum((item - value) ** 2 for item in items) / (rows - 1)
    return Score(value, n=rows, standard_error=math.sqrt(variance / rows), items=items)


def at_scale(model: nn.Module, scale: float) -> AbstractContextManager[None]:
    """Return the context in which an adapter counts `scale` times: a point between the base (0) and the end (1).

    Raises:
        WrongSetup: if scale 0 of this adapter is not the base, from the context's start.
    """
    return nullcontext() if scale == 1 else scale_adapter(model, scale)
