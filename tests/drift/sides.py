"""A PEFT model as the two sides of a comparison, and the same numbers computed slowly in float64."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from typing import Any

import torch
from holdfast.drift.models import Models
from torch import Tensor, nn

import tiny


def models_of(model: Any, tokenizer: Any, **changes: Any) -> Models:
    """The base is the model with its adapter off, `tuned` the same model with it on."""

    @contextmanager
    def off() -> Iterator[nn.Module]:
        with model.disable_adapter():
            yield model

    @contextmanager
    def on() -> Iterator[nn.Module]:
        yield model

    return Models({"base": off, "tuned": on}, tokenizer, **changes)


def tuned_model(size: float = 0.1, **changes: Any) -> Any:
    """A tiny Llama with a LoRA adapter that does something (size 0: that does nothing, B = 0)."""
    model = tiny.lora(tiny.llama(**changes))
    if size:
        tiny.shake(model, size)
    return model


@lru_cache(maxsize=2)
def _double(model: Any) -> Any:
    """A copy in float64; of a model that is not changed any more."""
    return copy.deepcopy(model).double().eval()


@torch.no_grad()
def log_probabilities(model: Any, ids: Sequence[int], *, adapter: bool = True) -> Tensor:
    """Log-probabilities after every token [tokens, vocab], in float64 throughout: one row, no padding, full logits."""
    double = _double(model)
    with nullcontext() if adapter else double.disable_adapter():
        return double(input_ids=torch.tensor([list(ids)])).logits[0].log_softmax(-1)


def kl(model: Any, ids: Sequence[int]) -> Tensor:
    """KL(base || tuned) after every token, in float64."""
    base, tuned = (log_probabilities(model, ids, adapter=adapter) for adapter in (False, True))
    return (base.exp() * (base - tuned)).sum(-1)
