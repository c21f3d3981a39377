"""Remembers Fishers between runs: one safetensors file for each, named by a hash of everything that it depends on.

The folder is $HOLDFAST_CACHE, or ~/.cache/holdfast. A file is written whole or not at all, by the main process, and
used only if every process can read it; one that cannot be read is collected anew, with a warning.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ..functional.packed_fishers import LayerFisher, pack, unpack
from .checkpoint import replace
from .distributed import barrier, gather, rank
from .selection import base_weights
from .types import Batch, FisherSpec

FORMAT = 1
PIECE = 2**26  # bytes that are on the host at a time while weights are hashed


def folder() -> Path:
    """Return where Fishers are kept."""
    return Path(os.environ.get("HOLDFAST_CACHE") or Path.home() / ".cache" / "holdfast")


def weights(model: nn.Module) -> str:
    """Return a hash of a model without its adapters: settings, parameters and stored buffers, a piece at a time."""
    config = getattr(model, "config", None)
    return _hash([type(config).__name__, _settings(config)], base_weights(model))


def path(weights: str, batches: Sequence[Batch], spec: FisherSpec, layers: Sequence[str], seed: int) -> Path:
    """Return where the Fisher is kept that these would give.

    Args:
        weights: the hash of the model's.
        batches: the rows that the Fisher is of.
        spec: how it is estimated.
        layers: whose it is.
        seed: counts where labels are drawn.
    """
    facts = [FORMAT, weights, str(spec), list(layers), seed if spec.labels == "model" else None]
    return folder() / f"fisher-{_hash(facts, _tensors(batches))}.safetensors"


def _hash(facts: object, tensors: Iterable[tuple[str, Tensor]]) -> str:
    digest = hashlib.sha256(json.dumps(facts, default=str).encode())
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        for piece in _bytes(tensor):
            digest.update(piece)
    return digest.hexdigest()


def _settings(config: object) -> dict[str, object]:
    """Return what a model's configuration says of its forward, in a fixed order."""
    passing = {"transformers_version", "use_cache"}
    settings = config.to_dict() if config is not None and hasattr(config, "to_dict") else {}
    return {key: settings[key] for key in sorted(settings) if key not in passing and not key.startswith("_")}


def _tensors(batches: Sequence[Batch]) -> Iterator[tuple[str, Tensor]]:
    for i, batch in enumerate(batches):
        for key in sorted(batch):
            yield f"batch {i} {key}", batch[key]


def _bytes(tensor: Tensor) -> Iterator[memoryview]:
    flat = tensor.detach().contiguous().flatten().view(torch.uint8)
    for piece in torch.split(flat, PIECE) if tensor.numel() else ():
        host = piece.cpu()
        yield memoryview((ctypes.c_char * len(host)).from_address(host.data_ptr()))


def read(file: Path, device: torch.device) -> dict[str, LayerFisher] | None:
    """Return the Fisher kept in a file; None if there is none, or some process cannot read it. A collective call."""
    from safetensors.torch import load

    fisher: dict[str, LayerFisher] | None = None
    if file.is_file():
        try:
            fisher = unpack({name: tensor.to(device) for name, tensor in load(file.read_bytes()).items()})
        except Exception as fault:  # safetensors' own error is no subclass of anything of use
            warnings.warn(f"{file} cannot be read ({fault}); its Fisher is collected anew.", stacklevel=2)
    everywhere = all(text == "read" for text in gather("read" if fisher is not None else "not"))
    return fisher if everywhere else None


def write(file: Path, fisher: dict[str, LayerFisher]) -> None:
    """Keep a Fisher, by the main process; a folder that cannot be written to costs a warning. A collective call."""
    from safetensors.torch import save

    if rank() == 0:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            replace(file, save({name: tensor.cpu().contiguous() for name, tensor in pack(fisher).items()}))
        except OSError as fault:
            warnings.warn(f"{file} cannot be written ({fault}); the next run collects its Fisher anew.", stacklevel=2)
    barrier()
