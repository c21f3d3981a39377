"""What is measured of a model, and of one whose adapter is weakened; read `sweep` next."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from statistics import fmean
from typing import TYPE_CHECKING, Any

from holdfast.drift.ledger import Score

from .arms import SPLITS
from .rows import collated

if TYPE_CHECKING:
    from torch import nn


def judge(model: nn.Module, rows: Mapping[str, Any]) -> dict[str, dict[str, Score]]:
    """By split, the loss of every kind of row; and the share of rows whose greedy answer is the whole refusal."""
    import torch

    found: dict[str, dict[str, Score]] = {}
    for split in SPLITS:
        found[split] = {}
        for name, group in rows[split].items():
            batch = collated(group)
            with torch.no_grad():
                logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
            labels = batch["labels"][:, 1:]
            counted, targets = labels >= 0, labels.clamp(min=0)
            each = -logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
            losses = ((each * counted).sum(-1) / counted.sum(-1)).tolist()
            found[split][f"{name}_loss"] = Score(fmean(losses), items=tuple(losses))
            if name in ("target", "refused"):  # greedy text is the sentence if each token is the likeliest after those
                right = ((logits.argmax(-1) == targets) | ~counted).all(-1).double().tolist()
                found[split][f"{name}_rate"] = Score(fmean(right), items=tuple(right))
    return found


def merged(model: nn.Module, scale: float) -> nn.Module:
    """A copy of the model with its adapter, `scale` times as strong, added to the weights."""
    from holdfast.methods import scale_adapter

    with scale_adapter(model, scale):
        return copy.deepcopy(model).merge_and_unload().eval()
