"""What is measured of a model, and of one whose adapter is weakened; read `sweep` next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from holdfast.drift.ledger import Score

from .rows import Tokens, load

if TYPE_CHECKING:
    from torch import nn

AT_ONCE = 64  # rows in a forward


def judge(model: nn.Module, rows: Mapping[str, Sequence[Tokens]]) -> dict[str, Score]:
    """The loss of every kind of row: the mean over rows of the mean over a row's supervised tokens."""
    return {f"{name}_loss": mean_loss(model, group) for name, group in rows.items()}


def mean_loss(model: nn.Module, rows: Sequence[Tokens]) -> Score:
    """The loss of rows in nats per token, with that of each."""
    import torch
    from holdfast.integrations.retain_data import to_batches

    losses: list[float] = []
    for batch in to_batches(rows, None, batch_size=AT_ONCE):
        with torch.no_grad():
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        labels = batch["labels"][:, 1:]
        counted = labels >= 0
        each = -logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        losses += [round(loss, 4) for loss in ((each * counted).sum(-1) / counted.sum(-1)).tolist()]
    return Score(fmean(losses), items=tuple(losses))


class Plain:
    """A model of its own into which adapters are merged: the trainer's has TRL's forward, which a copy would keep."""

    def __init__(self, work: Path) -> None:
        self.model = load(work)[0].eval()
        self.base = {name: weight.clone() for name, weight in self.model.state_dict().items()}

    def merge(self, adapted: nn.Module, scale: float) -> nn.Module:
        """Return the model with this adapter, `scale` times as strong, added to the base's weights."""
        import torch

        self.model.load_state_dict(self.base)
        for name, module in adapted.named_modules():
            if hasattr(module, "lora_A"):
                weight = self.model.get_submodule(name.removeprefix("base_model.model.")).weight
                with torch.no_grad():
                    weight.add_(module.get_delta_weight("default"), alpha=scale)
        return self.model
