"""What `gpu` times: the one pass with each kernel, and the peers that do the same; each says what package it needs.

QuACK's cross-entropy has the head's gradient in it, and Liger's chunked loss computes it and drops it; ours has a
frozen head. Peers of one objective must agree in value and gradient. Read next: `gpu`.
"""

from __future__ import annotations

import importlib.metadata
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from importlib.util import find_spec
from typing import NamedTuple

import torch
from holdfast.functional.divergence import Divergence
from holdfast.functional.linear_divergence import linear_cross_entropy
from peers import Case, autograd_both, autograd_cross_entropy, one_pass, three_products, torch_linear_cross_entropy
from record import NOT_INSTALLED
from torch import Tensor

OURS, PLAIN = "holdfast: CE + masked KL", "plain torch"


class Peer(NamedTuple):
    """A way to compute an objective, the package it needs, and for ours the kernel."""

    objective: str
    run: Callable[[Case], Tensor]
    package: str = ""
    kernel: str = "plain"


@cache
def compiled() -> Callable[[Case], Tensor]:
    """The plain form through torch.compile."""
    return torch.compile(partial(autograd_both, mask=True))


@cache
def liger_loss() -> Callable[..., Tensor]:
    """Liger's chunked distillation loss at beta = 0, the KL, compiled and with its own height of chunks."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    return LigerFusedLinearJSDLoss(weight_hard_loss=1.0, weight_soft_loss=1.0, beta=0.0, compiled=True)


def liger(case: Case) -> Tensor:
    """Cross-entropy + full KL; it gives the mean."""
    sides = case.hidden, case.head.weight, case.reference_hidden, case.head.weight
    return liger_loss()(*sides, case.targets, None, None) * len(case.targets)


def quack(case: Case) -> Tensor:
    """Cross-entropy in one chunk."""
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    weight = case.head.weight
    return chunked_linear_cross_entropy(
        case.hidden, weight, case.targets, chunk_size=len(case.targets), reduction="sum"
    )


def cross_entropy(case: Case) -> Tensor:
    """Ours alone."""
    return linear_cross_entropy(case.hidden, case.head, case.targets)


MASKED, FULL = partial(one_pass, member=Divergence()), partial(one_pass, member=Divergence("none"))
PEERS: dict[str, Peer] = {  # the first of an objective is what the others must agree with
    PLAIN: Peer("CE + masked KL", partial(autograd_both, mask=True)),
    OURS: Peer("CE + masked KL", MASKED, "triton", "rows"),
    f"{OURS}, tiles": Peer("CE + masked KL", MASKED, "triton", "tiles"),
    f"{OURS}, no kernel": Peer("CE + masked KL", MASKED),
    "plain torch, compiled": Peer("CE + masked KL", lambda case: compiled()(case), "triton"),
    "plain torch: CE + full KL": Peer("CE + full KL", partial(autograd_both, mask=False)),
    "holdfast: CE + full KL": Peer("CE + full KL", FULL, "triton", "rows"),
    "Liger": Peer("CE + full KL", liger, "liger_kernel"),
    "plain torch: CE": Peer("CE", autograd_cross_entropy),
    "holdfast: CE": Peer("CE", cross_entropy, "triton", "rows"),
    "torch F.linear_cross_entropy: CE": Peer("CE", torch_linear_cross_entropy),
    "QuACK": Peer("CE", quack, "quack"),
    "three products, whole": Peer("", three_products),
}
MISSING = [name for name, peer in PEERS.items() if peer.package and find_spec(peer.package) is None]
HERE = [name for name in PEERS if name not in MISSING]
PAIRS = [(OURS, name) for name in PEERS if name != OURS] + [
    ("holdfast: CE + full KL", "Liger"),
    ("holdfast: CE", "QuACK"),
]


@contextmanager
def kernel(name: str) -> Iterator[None]:
    """Ask for a kernel while something runs; a fallback is an error here, for it would be timed under a wrong name."""
    before = os.environ.get("HOLDFAST_KERNEL")
    os.environ["HOLDFAST_KERNEL"] = name
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="HOLDFAST_KERNEL=")
            yield
    finally:
        os.environ.pop("HOLDFAST_KERNEL")
        if before is not None:
            os.environ["HOLDFAST_KERNEL"] = before


def gradient(name: str, case: Case) -> tuple[Tensor, Tensor]:
    """Run a peer forward and backward."""
    peer = PEERS[name]
    with kernel(peer.kernel):
        value = peer.run(case)
        return value.detach(), torch.autograd.grad(value, case.hidden)[0]


def machine() -> Iterator[tuple[str, str]]:
    """The GPU, and the versions of what runs on it."""
    if torch.cuda.is_available():
        yield "GPU", torch.cuda.get_device_name()
    for name in ("triton", "liger-kernel", "quack-kernels"):
        try:
            yield name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield name, NOT_INSTALLED
