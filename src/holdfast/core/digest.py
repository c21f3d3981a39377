"""Names a model and a tokenizer by what they are, whatever files they came from: sha256 over names, shapes and values.

What is stored for one base (a pool, a cache, answers) is right for that base alone, so it keeps these and compares.
Read next: `holdfast.retain.pool`, and `holdfast.drift.models`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .selection import base_weights
from .tap import language_model

__all__ = ["base_digest", "digest", "name_in_base", "tokenizer_digest"]


def digest(weights: Mapping[str, torch.Tensor], *, of: str = "") -> str:
    """The sha256 of names, shapes, types and values of weights: what answered, whatever files it came from.

    Args:
        weights: by name, such as a `state_dict()`.
        of: what they belong to: for an adapter, the digest of its base and its configuration.

    >>> digest({"a": torch.zeros(2)}) == digest({"a": torch.ones(2)})
    False
    """
    whole = hashlib.sha256(of.encode())
    for name, tensor in sorted(weights.items()):
        whole.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        if tensor.numel():
            whole.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return whole.hexdigest()


def base_digest(model: nn.Module) -> str:
    """The digest of the base inside wrappers and adapters: the same before an adapter is put on it and afterwards.

    Args:
        model: a causal language model of transformers, plain, in DDP or in PEFT.

    >>> base_digest(nn.Linear(2, 2)) == base_digest(nn.Linear(2, 2))
    False
    """
    return digest({name_in_base(name): tensor for name, tensor in base_weights(language_model(model))})


def name_in_base(name: str) -> str:
    """A weight's name without what PEFT puts around it: the base is the same before an adapter comes and afterwards.

    >>> name_in_base("base_model.model.layers.0.q_proj.base_layer.weight")
    'layers.0.q_proj.weight'
    """
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".").replace(".original_module.", ".")


def tokenizer_digest(tokenizer: Any) -> str:
    """The sha256 of a tokenizer's pieces with their ids: what ids mean. A chat template is no part of it.

    Args:
        tokenizer: one of transformers.
    """
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()
