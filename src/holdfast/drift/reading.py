"""Reads blocks of rows: what a model made of the positions that count, and logits of a few of them at a time.

Past the head where that is a plain linear map, so that a tokens x vocabulary tensor never exists; from the model's own
logits where it is not. In float32 from the logits on. Read next: `holdfast.drift.scoring`, which asks for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from holdfast.core.errors import NotYetSupported, WrongSetup
from holdfast.core.tap import Tap, last_hidden_state
from holdfast.functional.closed_form import divergence_rows_
from holdfast.functional.divergence import Divergence
from holdfast.functional.head import Head
from holdfast.functional.products import to_logits
from torch import Tensor, nn

if TYPE_CHECKING:
    from holdfast.drift.scoring import Row

__all__ = ["Reader", "States", "kl"]

LOGITS = 2**23
"""How many logits exist at a time."""
FULL_KL = Divergence(mask="none")


class States(NamedTuple):
    """What a model made of the positions of a block that count, in its own type."""

    values: Tensor  # hidden states [positions, hidden]; logits [positions, vocab] if there is no head to make them
    head: Head | None

    def parts(self) -> Iterator[slice]:
        size = self.values.shape[-1] if self.head is None else len(self.head.weight)
        step = max(16, LOGITS // size)
        return (slice(start, start + step) for start in range(0, len(self.values), step))

    def logits(self, part: slice) -> Tensor:
        """Logits of some positions, in float32 at least, in memory of their own."""
        states, head = self.values[part], self.head
        if head is None:
            return states.to(torch.promote_types(states.dtype, torch.float32), copy=True)
        wide = torch.promote_types(torch.promote_types(states.dtype, head.weight.dtype), torch.float32)
        logits = states.new_empty((len(states), len(head.weight)), dtype=wide)
        to_logits(head.scale * states.to(wide), head.weight, logits, rounded=False)
        if head.bias is not None:
            logits.add_(head.bias, alpha=head.scale)
        return logits if head.soft_cap is None else logits.div_(head.soft_cap).tanh_().mul_(head.soft_cap)


def kl(base: States, tuned: States, part: slice) -> Tensor:
    """KL(base ‖ tuned) at some positions, from the change of the logits: never below 0, and 0 where nothing changed."""
    logits = base.logits(part)
    change = tuned.logits(part).sub_(logits)
    no_target = torch.zeros((len(logits), 1), dtype=torch.long, device=logits.device)
    return divergence_rows_(logits, change, no_target, FULL_KL).divergence


class Reader:
    """Reads blocks on one side, past the head where that is a plain linear map; whether it is, is tried only once."""

    def __init__(self) -> None:
        self._model: nn.Module | None = None
        self._past: tuple[nn.Module, Head] | None = None

    def read(self, model: nn.Module, block: Sequence[Row]) -> States:
        """Run a block, padded on the right, and keep the positions that count, row after row."""
        device, longest = next(model.parameters()).device, max(len(row.ids) for row in block)
        ids = torch.tensor([[*row.ids, *[0] * (longest - len(row.ids))] for row in block], device=device)
        starts = torch.tensor([[row.first] for row in block], device=device)
        ends = torch.tensor([[len(row.ids)] for row in block], device=device)
        places = torch.arange(longest, device=device)
        if model is not self._model:
            self._model, self._past = model, _past_the_head(model, ids[:1, : min(4, len(block[0].ids))])
        inputs = {"input_ids": ids, "attention_mask": (places < ends).long(), "use_cache": False}
        if self._past is None:
            values, head = model(**inputs).logits, None
        else:
            backbone, head = self._past
            values = last_hidden_state(backbone(**inputs))
        return States(values[:, -longest:][(places >= starts) & (places < ends)], head)


def _past_the_head(model: nn.Module, few: Tensor) -> tuple[nn.Module, Head] | None:
    """The model's backbone and head, if on a few tokens head(backbone) is what the model itself says; else None."""
    try:
        tap = Tap(model)
    except (NotYetSupported, WrongSetup):
        return None
    tap.remove()
    # PEFT's copy of a trained head steps aside for the original one while adapters are off
    head = tap.head(original=bool(getattr(tap.head_module(), "disable_adapters", False)))
    said = model(input_ids=few, use_cache=False).logits
    ours = head.logits(last_hidden_state(tap.backbone(input_ids=few, use_cache=False)))
    if said.shape != ours.shape:  # prompt tuning adds positions
        return None
    tolerance = 1e-4 if said.dtype in (torch.float32, torch.float64) else 2e-2
    gap, size = (x.float().abs().max().item() for x in (said - ours, said))
    return (tap.backbone, head) if gap <= tolerance * max(size, 1e-3) else None
