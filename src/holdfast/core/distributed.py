"""What a step needs to know about other processes; all of it is the identity when there is only one.

Replicas (DDP) hold all parameters each, so only sums over data are reduced. Shards (FSDP2's `fully_shard`) hold a part
of every parameter each: methods see the local parts, and sums over parameters are reduced with `reduce_over_shards`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch.distributed as dist
from torch import Tensor

from ..functional.subspace import Reduce, alone
from .errors import NeverSupported, NotYetSupported, WrongSetup


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


def from_main(make: Callable[[], str]) -> str:
    """Return what the main process makes, on every process; where it fails all of them do.

    Raises:
        WrongSetup: on the other processes, with the main one's error, which is raised there as it is.
    """
    if world_size() == 1:
        return make()
    found: list[str] = ["", ""]
    failed: Exception | None = None
    if rank() == 0:
        try:
            found[0] = make()
        except Exception as error:  # the others wait, and must not wait for ever
            failed, found[1] = error, f"{type(error).__name__}: {error}"
    dist.broadcast_object_list(found)
    if failed is not None:
        raise failed
    if found[1]:
        raise WrongSetup(f"The main process failed: {found[1]}")
    return found[0]


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


def refuse_reentrant(hidden: Tensor) -> None:
    """Look for reentrant checkpointing in the graph of a forward.

    Each checkpointed part runs a backward of its own, so a weight of two forwards gets its gradient in two portions, of
    which DDP averages the first alone (seen with torch 2.13: no error, gradients off by 42 %, processes that part).

    Raises:
        NeverSupported: if there is any.
    """
    seen, nodes = set[object](), [hidden.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [parent for parent, _ in node.next_functions]
        if "checkpoint" in type(node).__name__.lower():
            raise NeverSupported(
                "The retain stream runs the student a second time in the step, and under reentrant gradient "
                "checkpointing with several processes DDP would average a part of each gradient only. Use "
                'gradient_checkpointing_kwargs={"use_reentrant": False}.'
            )
