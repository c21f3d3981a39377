"""What `divergence` times: the one-pass losses, and the peers that do the same on whole logits or in other packages.

Every variant takes a `Case`, hidden states and a frozen head, and returns a loss summed over tokens. The peers widen
logits to float32 before every softmax, the usual practice. Read next: `divergence`.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import NamedTuple

import torch
import torch.nn.functional as F
from holdfast.functional.cached_divergence import ReferenceStatistics, cached_kl, reference_statistics
from holdfast.functional.divergence import FLOOR, Divergence
from holdfast.functional.head import Head
from holdfast.functional.linear_divergence import (
    linear_cross_entropy,
    linear_cross_entropy_with_divergence,
    linear_full_kl,
    linear_target_masked_kl,
)
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Case(NamedTuple):
    """What every variant is given; the first four are what the linear losses take."""

    hidden: Tensor
    reference_hidden: Tensor
    head: Head
    targets: Tensor
    statistics: ReferenceStatistics | None = None  # of the base, without the target

    def first(self, tokens: int) -> Case:
        """Return the case of the first few tokens."""
        kept = None if self.statistics is None else ReferenceStatistics(*(x[:tokens] for x in self.statistics))
        return Case(self.hidden[:tokens], self.reference_hidden[:tokens], self.head, self.targets[:tokens], kept)


def make(shape: str, tokens: int, dtype: str, *, drift: float = 0.0145, cached: bool = False) -> Case:
    """Return hidden states and a head of `width/vocabulary`; logits have standard deviation 3.2."""
    width, vocab = map(int, shape.split("/"))
    generator = torch.Generator().manual_seed(0)
    weight = torch.empty(vocab, width, dtype=DTYPES[dtype])
    for rows in weight.split(8192):
        rows.copy_(torch.randn(rows.shape, generator=generator) * 3.2 / width**0.5)
    base = torch.randn(tokens, width, generator=generator)
    hidden = (base + drift * torch.randn(tokens, width, generator=generator)).to(DTYPES[dtype]).requires_grad_()
    targets = torch.randint(vocab, (tokens,), generator=generator)
    head, base = Head(weight), base.to(DTYPES[dtype])
    kept = reference_statistics(base, head, targets, mask="target") if cached else None
    return Case(hidden, base, head, targets, kept)


def whole_logits(case: Case, *, widen_head: bool = False) -> tuple[Tensor, Tensor]:
    """Return both sides' logits, tokens x vocabulary, multiplied in the head's dtype (or in float32) and widened."""
    weight = case.head.weight.float() if widen_head else case.head.weight
    student = case.hidden.to(weight.dtype) @ weight.t()
    with torch.no_grad():
        reference = case.reference_hidden.to(weight.dtype) @ weight.t()
    return student.float(), reference.float()


def kl(z: Tensor, b: Tensor) -> Tensor:
    """Return KL(base ‖ student), summed."""
    return F.kl_div(z.log_softmax(-1), b.log_softmax(-1), reduction="sum", log_target=True)


def masked_kl(z: Tensor, b: Tensor, targets: Tensor) -> Tensor:
    """Return the KL without the target on both sides, summed."""
    return kl(*(logits.scatter(-1, targets[:, None], FLOOR) for logits in (z, b)))


def autograd_both(case: Case, *, mask: bool, widen_head: bool = False) -> Tensor:
    """Cross-entropy and KL on whole logits, gradients by autograd: what all others are measured against."""
    z, b = whole_logits(case, widen_head=widen_head)
    return F.cross_entropy(z, case.targets, reduction="sum") + (masked_kl(z, b, case.targets) if mask else kl(z, b))


def autograd_cross_entropy(case: Case) -> Tensor:
    """Cross-entropy alone on whole logits."""
    return F.cross_entropy((case.hidden @ case.head.weight.t()).float(), case.targets, reduction="sum")


def torch_linear_cross_entropy(case: Case) -> Tensor:
    """The chunked cross-entropy of torch 2.13, with its own choice of chunks."""
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(case.hidden, case.head.weight, case.targets, reduction="sum", options=options).float()


def trl_full(case: Case) -> Tensor:
    """The chunked divergence behind TRL's distillation trainer, in plain torch as on any CPU."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    weight = case.head.weight
    values, _ = ChunkedDivergenceFunction.apply(case.hidden, weight, None, case.reference_hidden, weight, None, 0.0)
    return values.sum()


def liger_both(case: Case) -> Tensor:
    """Liger's chunked distillation loss at beta = 0, the KL, with its own height of chunks; not compiled."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    weight = case.head.weight
    loss = LigerFusedLinearJSDLoss(weight_hard_loss=1.0, weight_soft_loss=1.0, beta=0.0, compiled=False)
    sides = case.hidden, weight, case.reference_hidden, weight
    return loss(*sides, case.targets, None, None) * len(case.targets)  # it gives the mean


def torchtune_both(case: Case) -> Tensor:
    """The chunked losses of torchtune on whole logits; its KL leaves out the base's entropy, a constant."""
    from torchtune.modules.loss import CEWithChunkedOutputLoss, ForwardKLWithChunkedOutputLoss

    z = (case.hidden @ case.head.weight.t())[None].chunk(8, dim=1)
    with torch.no_grad():
        b = (case.reference_hidden @ case.head.weight.t())[None].chunk(8, dim=1)
    targets = case.targets[None]
    both = ForwardKLWithChunkedOutputLoss()(list(z), list(b), targets) + CEWithChunkedOutputLoss()(list(z), targets)
    return both * len(case.targets)  # they give means


def three_products(case: Case) -> Tensor:
    """The bound: the three matrix products on whole logits, in the head's dtype, and nothing else."""
    with torch.no_grad():
        z = case.hidden @ case.head.weight.t()
        case.reference_hidden @ case.head.weight.t()
        dh = z @ case.head.weight
    return (case.hidden * dh.detach()).sum()


def one_pass(case: Case, member: Divergence, chunk_rows: int | None = None) -> Tensor:
    """Both losses, each chunk's logits used once."""
    return linear_cross_entropy_with_divergence(*case[:4], member, chunk_rows=chunk_rows).loss


def two_calls(case: Case) -> Tensor:
    """What a host pays that computes a chunked cross-entropy of its own."""
    return linear_cross_entropy(case.hidden, case.head, case.targets) + linear_target_masked_kl(*case[:4])


def base_cached(case: Case) -> Tensor:
    """The masked KL from the base's statistics: two products."""
    assert case.statistics is not None  # `make(cached=True)`
    return cached_kl(case.hidden, case.head, *case.statistics, case.targets, mask="target")


class Variant(NamedTuple):
    """A way to compute an objective; all ways to one objective must agree."""

    objective: str
    run: Callable[[Case], Tensor]


PLAIN, BEST, FULL = (
    "autograd: CE + masked KL",
    "holdfast: CE + masked KL, one pass",
    "holdfast: CE + full KL, one pass",
)
BOUND, CE, CACHED = "three products, whole", "holdfast: CE", "holdfast: masked KL, base cached"
WIDENED, TORCH_CE = "autograd, head widened: CE + masked KL", "torch F.linear_cross_entropy: CE"
LIGER, TORCHTUNE = "Liger chunked JSD: CE + full KL", "torchtune chunked: CE + full KL"
TRL = "TRL ChunkedDivergence: full KL"
VARIANTS: dict[str, Variant] = {  # the first of an objective is the plain one
    PLAIN: Variant("CE + masked KL", lambda case: autograd_both(case, mask=True)),
    BEST: Variant("CE + masked KL", lambda case: one_pass(case, Divergence())),
    "holdfast: CE + masked KL, two calls": Variant("CE + masked KL", two_calls),
    WIDENED: Variant("CE + masked KL", lambda case: autograd_both(case, mask=True, widen_head=True)),
    "autograd: CE + full KL": Variant("CE + full KL", lambda case: autograd_both(case, mask=False)),
    FULL: Variant("CE + full KL", lambda case: one_pass(case, Divergence("none"))),
    LIGER: Variant("CE + full KL", liger_both),
    TORCHTUNE: Variant("CE + full KL", torchtune_both),
    "autograd: CE": Variant("CE", autograd_cross_entropy),
    CE: Variant("CE", lambda case: linear_cross_entropy(case.hidden, case.head, case.targets)),
    TORCH_CE: Variant("CE", torch_linear_cross_entropy),
    "autograd: masked KL": Variant("masked KL", lambda case: masked_kl(*whole_logits(case), case.targets)),
    "holdfast: masked KL": Variant("masked KL", lambda case: linear_target_masked_kl(*case[:4])),
    CACHED: Variant("masked KL", base_cached),
    "autograd: full KL": Variant("full KL", lambda case: kl(*whole_logits(case))),
    "holdfast: full KL": Variant("full KL", lambda case: linear_full_kl(*case[:4])),
    TRL: Variant("full KL", trl_full),
    BOUND: Variant("", three_products),
}
MISSING = [name for name, package in ((LIGER, "liger_kernel"), (TORCHTUNE, "torchtune")) if find_spec(package) is None]
