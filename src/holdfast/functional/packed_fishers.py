"""Fishers of many layers as tensors by name, and back: the form that checkpoints and the cache hold."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .fisher import Factor, Kronecker
from .sample_gram import SampleGram

LayerFisher = Kronecker | SampleGram


def pack(fishers: Mapping[str, LayerFisher], prefix: str = "") -> dict[str, Tensor]:
    """Return the Fishers of layers as tensors by name, for checkpoints; a factor that layers share is there once.

    Args:
        fishers: by layer; any names.
        prefix: goes before every name, as it is.
    """
    tensors: dict[str, Tensor] = {}
    numbers: dict[Factor, int] = {}
    for layer, fisher in fishers.items():
        place = f"{prefix}layer/{layer}"
        if isinstance(fisher, SampleGram):
            tensors |= {f"{place}/left": fisher.left, f"{place}/right": fisher.right}
        else:
            both = [numbers.setdefault(factor, len(numbers)) for factor in (fisher.out, fisher.into)]
            tensors[f"{place}/factors"] = torch.tensor(both)
    for factor, number in numbers.items():
        fields = {"vectors": factor.vectors, "values": factor.values, "rest": factor.rest}
        tensors |= {f"{prefix}factor/{number}/{k}": tensor for k, tensor in fields.items() if tensor is not None}
    return tensors


def unpack(tensors: Mapping[str, Tensor], prefix: str = "") -> dict[str, LayerFisher]:
    """Return what was packed with this prefix, shared factors shared again; tensors of other names are left alone.

    Raises:
        ValueError: if a tensor is missing.
    """
    places: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith(prefix):
            place, _, field = name.removeprefix(prefix).rpartition("/")
            places.setdefault(place, {})[field] = tensor
    factors: dict[str, Factor] = {}
    fishers: dict[str, LayerFisher] = {}
    try:
        for place, fields in places.items():
            if place.startswith("factor/"):
                factors[place] = Factor(fields.get("vectors"), fields["values"], fields["rest"])
        for place, fields in places.items():
            if place.startswith("layer/") and "factors" in fields:
                out, into = (factors[f"factor/{number}"] for number in fields["factors"].tolist())
                fishers[place.removeprefix("layer/")] = Kronecker(out, into)
            elif place.startswith("layer/"):
                fishers[place.removeprefix("layer/")] = SampleGram(fields["left"], fields["right"])
    except KeyError as missing:
        raise ValueError(
            f"The packed Fisher {prefix!r} is not whole: {missing} is missing. Estimate it anew."
        ) from None
    return fishers
