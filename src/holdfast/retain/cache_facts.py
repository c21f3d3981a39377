"""What a reference cache depends on, as named facts: the base, its head, the tokens, what is kept and how.

Each fact is a short text or a sha256, so that a cache that does not fit can say which of them differ. Weights are those
that the reference runs with: the base inside adapters where these are switched off, else all there are, adapters too,
with its frozen copies in their places. Read next: `cache`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..core.digest import digest, name_in_base
from ..core.reference import AdapterOff, OtherModel, Reference
from ..core.selection import adapter_configs, base_weights
from ..core.tap import Tap
from ..functional.divergence import Divergence
from ..functional.head import Head
from .cache_file import Facts

__all__ = [
    "FORMAT", "Lengths", "autocast", "inexact", "key", "lengths_of", "of_base", "of_head", "of_tokens", "same",
    "weight",
]  # fmt: skip

FORMAT = 1
PASSING = ("transformers_version", "use_cache", "architectures")  # in a configuration, but not in a forward
PASSING_OF_ADAPTERS = (
    "base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping", "task_type",
)  # fmt: skip


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
    """Return the facts of the frozen base: its weights and configuration, the adapters that act in it, its head."""
    model = _model(tap, reference)
    return {
        "base weights": digest({name_in_base(name): tensor for name, tensor in _weights(model, reference)}),
        "base configuration": _of_configuration(model),
        "adapters": "none" if isinstance(reference, AdapterOff) else _of_adapters(model),
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


class Lengths(NamedTuple):
    """Lengths at which a base whose RoPE follows the longest row of a batch answers differently; most have none."""

    switches: tuple[int, ...] = ()  # longrope: beyond such a length all rows of a batch get other frequencies
    grows: int | None = None  # dynamic: from here on frequencies follow what the model has run on before, too

    def beyond(self, longest: int) -> int:
        """Return how many switches a batch whose longest row has so many positions is beyond."""
        return sum(longest > length for length in self.switches)

    def grown(self, longest: int) -> bool:
        """Return whether the answer to such a batch depends on the batches before it."""
        return self.grows is not None and longest >= self.grows

    def vary(self, longest: int) -> bool:
        """Return whether the answer to a sequence may depend on those beside it, if the longest has so many tokens.

        >>> Lengths(switches=(4096,)).vary(4096), Lengths(grows=4096).vary(4096), Lengths().vary(10**6)
        (False, True, False)
        """
        return self.beyond(longest) > 0 or self.grown(longest)


def lengths_of(tap: Tap, reference: Reference) -> Lengths:
    """Return the lengths at which a base answers differently; see transformers' `dynamic_rope_update`."""
    switches, grows = set[int](), list[int]()
    for module in _model(tap, reference).modules():
        kinds = getattr(module, "rope_type", None)  # of all layers, or of each kind of layer
        for layer, kind in (kinds if isinstance(kinds, dict) else {None: kinds}).items():
            if kind == "longrope":
                settings: Any = module.config.rope_parameters  # type: ignore[union-attr]
                switches.add(int((settings[layer] if layer else settings)["original_max_position_embeddings"]))
            elif "dynamic" in str(kind):
                grows.append(int(module.original_max_seq_len))  # type: ignore[arg-type]
    return Lengths(tuple(sorted(switches)), min(grows, default=None))


def _model(tap: Tap, reference: Reference) -> nn.Module:
    return reference.model if isinstance(reference, OtherModel) else tap.model


def _weights(model: nn.Module, reference: Reference) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights that the reference runs with, by name."""
    if isinstance(reference, AdapterOff):
        yield from base_weights(model)
        return
    copies = reference.state()
    copied = {id(p): copies[name] for name, p in model.named_parameters() if name in copies}
    for name, value in model.state_dict(keep_vars=True).items():
        if isinstance(value, Tensor):
            yield name, copied.get(id(value), value)


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


def _of_adapters(model: nn.Module) -> str:
    """Return a sha256 of how adapters act: their settings, and where each is active, at which scale, or merged."""
    configs = {
        name: {key: value for key, value in config.to_dict().items() if key not in PASSING_OF_ADAPTERS}
        for name, config in adapter_configs(model).items()
        if hasattr(config, "to_dict")
    }
    layers = {
        name: [getattr(module, of, None) for of in ("active_adapters", "scaling", "merged_adapters")]
        + [module._disable_adapters]
        for name, module in model.named_modules()
        if hasattr(module, "_disable_adapters")
    }
    if not configs and not layers:
        return "none"
    return hashlib.sha256(json.dumps([configs, layers], sort_keys=True, default=_plain).encode()).hexdigest()


def _plain(value: object) -> object:
    """Return what json does not know as something that it does, in a fixed order."""
    if isinstance(value, Tensor):
        return value.tolist()
    return sorted(map(str, value)) if isinstance(value, set | frozenset) else str(value)
