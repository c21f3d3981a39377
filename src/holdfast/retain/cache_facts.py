"""What a reference cache depends on, as named facts: the base, its head, the tokens, what is kept and how.

Each fact is a short text or a sha256, so that a cache that does not fit can say which of them differ. Weights are those
that the reference runs with: the base inside adapters, or the frozen copies where it has some. Read next: `cache`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..core.digest import digest, name_in_base
from ..core.reference import OtherModel, Reference
from ..core.selection import base_weights
from ..core.tap import Tap
from ..functional.divergence import Divergence
from ..functional.head import Head
from .cache_file import Facts

__all__ = ["FORMAT", "autocast", "inexact", "key", "of_base", "of_head", "of_tokens", "same", "weight"]

FORMAT = 1
PASSING = ("transformers_version", "use_cache", "architectures")  # in a configuration, but not in a forward


def inexact(head: Head, base: Head, divergence: Divergence) -> list[str]:
    """Return why the statistics of the base would not give this divergence; nothing if they do.

    Args:
        head: the student's.
        base: the reference's.
        divergence: that is asked for.
    """
    reasons = []
    if base.soft_cap is not None or head.soft_cap is not None:
        reasons.append(f"the head has a soft cap ({base.soft_cap})")
    if any(part is not None and part.requires_grad for part in (head.weight, head.bias)):
        reasons.append("the head is trained")
    elif not same(head, base):
        reasons.append("the student's head is not the base's")
    if divergence.direction != "forward":
        reasons.append(f"direction={divergence.direction!r} needs the base's probability of every token")
    if divergence.mask == "none" and (divergence.gamma or divergence.exclusion is not None):
        reasons.append("gamma and exclusion need the base's log-sum-exp without the target, as mask='target' has it")
    return reasons


def same(head: Head, base: Head) -> bool:
    """Return whether two heads map alike: the same tensors or equal ones, with the same scale and cap."""
    if (head.scale, head.soft_cap) != (base.scale, base.soft_cap) or (head.bias is None) != (base.bias is None):
        return False
    pairs = [(head.weight, base.weight)]
    if head.bias is not None and base.bias is not None:
        pairs.append((head.bias, base.bias))
    return all(a.data_ptr() == b.data_ptr() or (a.shape == b.shape and torch.equal(a, b.to(a))) for a, b in pairs)


def key(facts: Facts) -> str:
    """Return a hash of facts, whatever their order.

    >>> key({"a": 1, "b": "x"}) == key({"b": "x", "a": 1})
    True
    """
    return hashlib.sha256(json.dumps(dict(facts), sort_keys=True).encode()).hexdigest()


def weight(divergence: Divergence) -> Facts:
    """Return the fact of a divergence's weights; none where there are none.

    >>> weight(Divergence(gamma=1.0)), weight(Divergence())
    ({'weight': 'gamma=1.0, exclusion=None'}, {})
    """
    if not divergence.gamma and divergence.exclusion is None:
        return {}
    return {"weight": f"gamma={divergence.gamma}, exclusion={divergence.exclusion}"}


def autocast(state: tuple[str, torch.dtype, bool]) -> str:
    """Return the precision of a forward: `Call.autocast` in a word.

    >>> autocast(("cpu", torch.bfloat16, True)), autocast(("cpu", torch.bfloat16, False))
    ('bfloat16', 'off')
    """
    _, dtype, enabled = state
    return str(dtype).removeprefix("torch.") if enabled else "off"


def of_base(tap: Tap, reference: Reference) -> Facts:
    """Return the facts of the frozen base: its weights, its configuration and its head."""
    model = reference.model if isinstance(reference, OtherModel) else tap.model
    copies = {name: tensor.detach() for name, tensor in reference.state().items()}
    copied = {id(p): copies[name] for name, p in model.named_parameters() if name in copies}
    weights = {name_in_base(name): copied.get(id(tensor), tensor) for name, tensor in base_weights(model)}
    kept = {f"copy of {name}": tensor for name, tensor in copies.items()}
    return {
        "base weights": digest(weights | kept),
        "base configuration": _of_configuration(model),
        "head": of_head(reference.head(tap)),
    }


def of_head(head: Head) -> str:
    """Return a sha256 of a head: its weight, bias, scale and cap."""
    parts = {"weight": head.weight} | ({} if head.bias is None else {"bias": head.bias})
    return digest(parts, of=f"{head.scale} {head.soft_cap}")


def of_tokens(sequences: Sequence[Tensor]) -> Facts:
    """Return the facts of the pool's tokens, in their order.

    >>> of_tokens([torch.tensor([5, 6, 7]), torch.tensor([8, 9])])["positions"]
    3
    """
    whole = hashlib.sha256()
    for ids in sequences:
        whole.update(json.dumps(ids.tolist()).encode())
    return {
        "tokens": whole.hexdigest(),
        "sequences": len(sequences),
        "positions": sum(len(ids) - 1 for ids in sequences),
    }


def _of_configuration(model: nn.Module) -> str:
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_dict"):
        return "none"
    settings = {
        name: value
        for name, value in config.to_dict().items()
        if name not in PASSING and not name.startswith("_") and not name.endswith("_token_id")
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()
