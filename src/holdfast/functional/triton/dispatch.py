"""Who computes a linear loss: a GPU kernel where one can, else `chunked`; `HOLDFAST_KERNEL` says otherwise.

    auto (default)   `rows` on a CUDA device of compute capability 8.0 or more, else plain
    plain            `chunked`, everywhere
    rows, tiles      that kernel; where it cannot be had, plain with a warning that says why

`choose` answers without computing anything. The first call on a device compares the kernel with its twin on a few
rows; a kernel that disagrees, or that this Triton does not compile, is left alone with a warning. On a CPU the kernels
run in Triton's interpreter where `TRITON_INTERPRET=1` was set before triton was imported and a kernel is asked for:
that is how they are tested. `linear_divergence` is the one caller; read `row_state` next.
"""

from __future__ import annotations

import os
import warnings
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import torch
from holdfast.functional.chunked import Objective, Statistics, Sums, check_hidden, chunked_sums
from holdfast.functional.divergence import Divergence, check_targets
from holdfast.functional.head import Head

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

Kernel = Literal["plain", "rows", "tiles"]
Asked = Literal["auto", "plain", "rows", "tiles"]
VARIABLE = "HOLDFAST_KERNEL"
CHUNK_ROWS = 1024  # fewer leave a GPU's product units idle


class Choice(NamedTuple):
    """Which kernel computes, and, where it is `"plain"`, why no other does."""

    kernel: Kernel
    reason: str = ""


def linear_sums(
    hidden: Float[Tensor, "... hidden"],
    reference_hidden: Float[Tensor, "... reference_hidden"] | None,
    head: Head,
    targets: Int[Tensor, ...],
    objective: Objective,
    *,
    reference_head: Head | None,
    ignore_index: int,
    chunk_rows: int | None,
    statistics: bool = False,
) -> Sums:
    """Compute what `chunked_sums` does, arguments and errors as there, with the kernel that `choose` names.

    On a GPU nothing returns to the host: `supervised` is a tensor, and a target out of range stops the device with an
    assertion, as in torch's own cross-entropy, instead of a ValueError.
    """
    choice = choose(hidden, head, objective, reference_head=reference_head)
    if choice.kernel == "plain":
        return chunked_sums(
            hidden,
            reference_hidden,
            head,
            targets,
            objective,
            reference_head=reference_head,
            ignore_index=ignore_index,
            chunk_rows=chunk_rows,
            statistics=statistics,
        )
    chunk_rows = CHUNK_ROWS if chunk_rows is None else chunk_rows
    return kernel_sums(
        choice.kernel, hidden, reference_hidden, head, targets, objective, ignore_index, chunk_rows, statistics
    )


def choose(hidden: Tensor, head: Head, objective: Objective, *, reference_head: Head | None = None) -> Choice:
    """Say which kernel computes an objective of these hidden states, warning where one is asked for and cannot be had.

    Raises:
        ValueError: If `HOLDFAST_KERNEL` names no kernel.

    >>> choose(torch.zeros(1, 2, dtype=torch.float64), Head(torch.eye(3, 2)), Objective(Divergence())).kernel
    'plain'
    """
    asked = os.environ.get(VARIABLE) or "auto"
    if asked not in get_args(Asked):
        raise ValueError(f"{VARIABLE} must be one of {', '.join(get_args(Asked))}, got {asked!r}.")
    if asked == "plain":
        return Choice("plain", f"{VARIABLE}=plain")
    wanted: Kernel = "tiles" if asked == "tiles" else "rows"
    obstacles = [
        *device_obstacles(hidden.device, interpreter=asked != "auto"),
        *work_obstacles(hidden, head, objective, reference_head),
    ]
    if not obstacles and hidden.is_cuda and (fault := fault_on(hidden.device, wanted, head.weight.dtype)):
        obstacles.append(fault)
    if not obstacles:
        return Choice(wanted)
    reason = "; ".join(obstacles)
    if asked != "auto":
        warnings.warn(f"{VARIABLE}={asked}, but the plain path computes: {reason}.", RuntimeWarning, stacklevel=4)
    return Choice("plain", reason)


def device_obstacles(device: torch.device, *, interpreter: bool) -> list[str]:
    """Say what keeps kernels from running on a device at all."""
    obstacles = []
    if find_spec("triton") is None:
        obstacles.append("triton is not installed (Linux: pip install 'holdfast[triton]')")
    if device.type != "cuda":
        if not (interpreter and device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
            obstacles.append(f"the tensors are on {device.type}, and kernels need a CUDA device")
    elif torch.version.hip is not None:
        obstacles.append("the kernels were never run on ROCm")
    elif torch.cuda.get_device_capability(device) < (8, 0):
        obstacles.append("the GPU's compute capability is below 8.0 (Ampere)")
    return obstacles


def work_obstacles(hidden: Tensor, head: Head, objective: Objective, reference_head: Head | None) -> list[str]:
    """Say what in a piece of work the kernels do not do."""
    weight, obstacles = head.weight, []
    if type(weight) not in (torch.Tensor, torch.nn.Parameter) or not weight.is_contiguous():
        obstacles.append("the head's weight is sharded, wrapped or not contiguous")
    if weight.dtype not in (torch.bfloat16, torch.float32) or hidden.dtype is torch.float64:
        obstacles.append(f"head and hidden states are {weight.dtype} and {hidden.dtype}, not bfloat16 or float32")
    if weight.device != hidden.device:
        obstacles.append(f"the head is on {weight.device} and the hidden states on {hidden.device}")
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (weight, head.bias)):
        obstacles.append("the head is trained")
    if reference_head is not None and not head.same_as(reference_head):
        obstacles.append("the base has a head of its own")
    if objective.divergence is not None and objective.divergence.direction != "forward":
        obstacles.append(f"the direction is {objective.divergence.direction}, not forward")
    if hidden.numel() == 0:
        obstacles.append("there are no rows")
    return obstacles


def kernel_sums(
    kernel: Kernel,
    hidden: Tensor,
    reference_hidden: Tensor | None,
    head: Head,
    targets: Tensor,
    objective: Objective,
    ignore_index: int,
    chunk_rows: int,
    statistics: bool = False,
) -> Sums:
    """Check shapes, flatten and run a kernel; no row is dropped, and nothing is read back.

    Raises:
        ValueError: If shapes or `chunk_rows` do not fit.
    """
    from holdfast.functional.triton.rows import RowLoss, Work
    from holdfast.functional.triton.tiles import TileLoss

    check_hidden("hidden", hidden, head, targets)
    if reference_hidden is not None:
        check_hidden("reference_hidden", reference_hidden, head, targets)
        reference_hidden = reference_hidden.detach().flatten(0, -2)
    if chunk_rows < 1:
        raise ValueError(f"chunk_rows must be at least 1, got {chunk_rows}.")
    vocab = head.weight.shape[0]
    check_targets(targets.new_empty(0), vocab, ignore_index)  # the vocabulary alone: the targets stay on the device
    flat = targets.flatten().long()
    counts = flat != ignore_index
    fits = ((flat >= 0) & (flat < vocab) | ~counts).all()
    torch._assert_async(fits, f"Targets must be token numbers below {vocab}; mark others with ignore_index.")
    work = Work(head, flat, objective, ignore_index, chunk_rows, statistics, torch.is_grad_enabled())
    loss = TileLoss if kernel == "tiles" else RowLoss
    with torch.cuda.device_of(hidden):
        total, divergence, nll, kept, *of_rows = loss.apply(hidden.flatten(0, -2), reference_hidden, work)
    logged = Statistics(*(each.view(targets.shape) for each in of_rows)) if statistics else None
    return Sums(total, divergence, nll, kept, counts.sum(), logged)


@cache
def fault_on(device: torch.device, kernel: Kernel, dtype: torch.dtype) -> str | None:
    """Compare a kernel with its twin on a few rows of a device, once, with a warning if they differ; return how."""
    generator = torch.Generator().manual_seed(0)
    base, moved = torch.randn(2, 6, 64, generator=generator).to(device)
    head = Head(0.2 * torch.randn(300, 64, generator=generator).to(device, dtype))
    targets = torch.tensor([3, 299, -100, 0, 7, 150], device=device)
    found = []
    try:
        for weight, run in ((head.weight, kernel), (head.weight.float(), None)):
            goal, h = Objective(Divergence(), 5.0, 1.0), (base + 0.5 * moved).requires_grad_()
            case = (h, base, Head(weight), targets, goal)
            with torch.enable_grad():
                sums = (
                    kernel_sums(run, *case, ignore_index=-100, chunk_rows=4)
                    if run
                    else chunked_sums(*case, reference_head=None, ignore_index=-100, chunk_rows=None)
                )
                found.append((sums.total.item(), torch.autograd.grad(sums.total, h)[0]))
        (value, ours), (wanted, theirs) = found
        error = max(abs(value / wanted - 1), ((ours - theirs).norm() / theirs.norm()).item())
        if error < 0.05:
            return None
        fault = f"the {kernel} kernel is off by {error:.0%} on {device}"
    except Exception as exception:  # whatever a compiler raises: the plain path is right beside it
        fault = f"the {kernel} kernel does not run on {device} ({type(exception).__name__}: {exception})"
    warnings.warn(f"{fault}. The plain path computes instead; {VARIABLE}=plain says so at once.", RuntimeWarning, 2)
    return fault
