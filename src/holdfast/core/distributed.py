"""What a step needs to know about other processes; all of it is the identity when there is only one.

Replicas (DDP) hold all parameters each, so only sums over data are reduced. Shards (FSDP2's `fully_shard`) hold a part
of every parameter each: methods see the local parts, and sums over parameters are reduced with `reduce_over_shards`.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch.distributed as dist
from torch import Tensor

from ..functional.subspace import Reduce, alone
from .errors import NotYetSupported


def world_size() -> int:
    """Return the number of processes that share the optimizer step."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return this process's place; process 0 writes files."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Return `tensor` summed over all processes; the argument is left alone."""
    if world_size() == 1:
        return tensor
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total


def gather(text: str) -> list[str]:
    """Return every process's text, in the order of their ranks."""
    found = [text] * world_size()
    if world_size() > 1:
        dist.all_gather_object(found, text)
    return found


def barrier() -> None:
    """Wait for all processes."""
    if world_size() > 1:
        dist.barrier()


def is_sharded(tensor: Tensor) -> bool:
    """Return whether this is a DTensor: FSDP2's way to hold a part of a parameter."""
    return hasattr(tensor, "to_local") and hasattr(tensor, "placements")


def local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this process holds: all of it, unless FSDP2 shards it."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def reduce_over_shards(params: Iterable[Tensor]) -> Reduce:
    """Return the function that sums a small tensor over the processes that hold the other parts of `params`.

    `alone`, the identity, where every process holds all of them.

    Raises:
        NotYetSupported: if some are sharded and others not, or over a mesh of several dimensions (HSDP, TP).
    """
    params = list(params)
    sharded = [p for p in params if is_sharded(p)]
    if not sharded:
        return alone
    meshes = [p.device_mesh for p in sharded]  # type: ignore[attr-defined]
    whole = all(p.placements[0].is_shard() for p in sharded)  # type: ignore[attr-defined]
    if len(sharded) < len(params) or not whole or any(m.ndim != 1 or m.size() != world_size() for m in meshes):
        raise NotYetSupported(
            "holdfast knows parameters that are all replicated (DDP) or all sharded over one mesh of all processes "
            "(fully_shard on the whole model); here some are sharded and others not, or the mesh has several "
            "dimensions. Shard the whole model over one mesh, or use DDP."
        )
    return all_reduce_sum
