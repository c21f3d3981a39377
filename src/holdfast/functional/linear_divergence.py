"""The divergences of `divergence` from hidden states, without ever holding a tokens x vocabulary tensor.

    Σ_t D(softmax(W h0_t), softmax(W h_t)),    dD/dh = Wᵀ g,    g in closed form

Rows are taken `chunk_rows` at a time, as Liger does (arXiv 2410.10989); three products per chunk, as many as autograd
on whole logits needs. In low precision the two sides' logits are never rounded apart: z = b + d with d = W (h − h0),
h − h0 subtracted in float32, for rounding z and b separately loses most of the gradient of a small KL (measured in
tests/functional/test_low_precision.py). On a CUDA device a Triton kernel does a chunk's pointwise work where it can
(docs/gpu.md; `HOLDFAST_KERNEL=plain` keeps it out). Read `divergence` first (what is computed), then `closed_form`
(how), then `chunked` (the engine), then `triton.dispatch` (who computes).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

from holdfast.functional.chunked import Objective, Statistics
from holdfast.functional.divergence import Direction, Divergence, reduce_sum
from holdfast.functional.triton.dispatch import linear_sums

if TYPE_CHECKING:
    from holdfast.functional.head import Head
    from jaxtyping import Float, Int
    from torch import Tensor

LinearReduction = Literal["sum", "mean", "mean_kept"]


class CrossEntropyWithDivergence(NamedTuple):
    """`loss` = cross-entropy + strength * divergence carries the gradient; the parts and statistics are for the log."""

    loss: Float[Tensor, ""]
    cross_entropy: Float[Tensor, ""]
    divergence: Float[Tensor, ""]
    statistics: Statistics | None = None


def linear_divergence(
    hidden: Float[Tensor, "... hidden"],
    reference_hidden: Float[Tensor, "... reference_hidden"],
    head: Head,
    targets: Int[Tensor, ...],
    divergence: Divergence,
    *,
    reference_head: Head | None = None,
    ignore_index: int = -100,
    chunk_rows: int | None = None,
    reduction: LinearReduction = "sum",
) -> Float[Tensor, ""]:
    """Compute any member of the family from final hidden states, in memory that does not grow with tokens x vocabulary.

    Args:
        hidden: The student's final hidden states, `[..., hidden]`: what enters the head.
        reference_hidden: The base's, `[..., hidden]`; no gradient flows into them.
        head: The student's head. Its weight and bias get their gradients if they require them, else cost nothing.
        targets: Target tokens `[...]`, aligned with `hidden` (nothing is shifted here); `ignore_index` leaves out.
        divergence: The member of the family.
        reference_head: The base's head, where it is another one (a trained `lm_head` needs a frozen copy of the
            original). Default `None`: the student's, without gradient.
        ignore_index: Label of unsupervised positions. Default -100, as in `torch.nn.functional.cross_entropy`.
        chunk_rows: Rows whose logits exist at a time; two float32 buffers of `[chunk_rows, vocab]` are the workspace.
            Default `None`: on a CPU as many as two buffers of 64 MiB hold, at least 128 (benchmarks/); 1024 elsewhere
            (as Liger; not measured).
        reduction: `"sum"` (default), `"mean"` over supervised positions, or `"mean_kept"` over those `exclusion` keeps.

    Returns:
        A scalar in float32 (float64 for float64 inputs), also under autocast. An empty batch gives 0, still connected
        to the graph. Gradients of gradients are refused with an error.

    Raises:
        ValueError: If shapes, targets, `chunk_rows` or `reduction` do not fit.

    >>> import torch; from holdfast.functional.head import Head
    >>> h0 = torch.tensor([[1.0, 2.0]]); h = torch.tensor([[1.0, 2.5]], requires_grad=True)
    >>> head = Head(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]))
    >>> loss = linear_divergence(h, h0, head, torch.tensor([2]), Divergence()); loss.backward(); loss, h.grad
    (tensor(0.0226, grad_fn=<_ChunkedLossBackward>), tensor([[-0.0865,  0.0865]]))
    """
    sums = linear_sums(
        hidden,
        reference_hidden,
        head,
        targets,
        Objective(divergence),
        reference_head=reference_head,
        ignore_index=ignore_index,
        chunk_rows=chunk_rows,
    )
    return reduce_sum(sums.total, sums.supervised, sums.kept, reduction)


def linear_target_masked_kl(
    hidden: Float[Tensor, "... hidden"],
    reference_hidden: Float[Tensor, "... reference_hidden"],
    head: Head,
    targets: Int[Tensor, ...],
    *,
    gamma: float = 0.0,
    direction: Direction = "forward",
    exclusion: float | None = None,
    reference_head: Head | None = None,
    ignore_index: int = -100,
    chunk_rows: int | None = None,
    reduction: LinearReduction = "sum",
) -> Float[Tensor, ""]:
    """Compute `target_masked_kl` from hidden states; arguments as in `Divergence` and `linear_divergence`.

    >>> import torch; from holdfast.functional.head import Head
    >>> h = torch.tensor([[1.0, 2.0]])
    >>> linear_target_masked_kl(h, h, Head(torch.eye(3, 2)), torch.tensor([2]))
    tensor(0.)
    """
    member = Divergence("target", gamma, direction, exclusion)
    return linear_divergence(
        hidden,
        reference_hidden,
        head,
        targets,
        member,
        reference_head=reference_head,
        ignore_index=ignore_index,
        chunk_rows=chunk_rows,
        reduction=reduction,
    )


def linear_full_kl(
    hidden: Float[Tensor, "... hidden"],
    reference_hidden: Float[Tensor, "... reference_hidden"],
    head: Head,
    targets: Int[Tensor, ...],
    *,
    gamma: float = 0.0,
    direction: Direction = "forward",
    exclusion: float | None = None,
    reference_head: Head | None = None,
    ignore_index: int = -100,
    chunk_rows: int | None = None,
    reduction: LinearReduction = "sum",
) -> Float[Tensor, ""]:
    """Compute `full_kl` from hidden states; arguments as in `Divergence` and `linear_divergence`.

    >>> import torch; from holdfast.functional.head import Head
    >>> h = torch.tensor([[1.0, 2.0]])
    >>> linear_full_kl(h, h, Head(torch.eye(3, 2)), torch.tensor([2]))
    tensor(0.)
    """
    member = Divergence("none", gamma, direction, exclusion)
    return linear_divergence(
        hidden,
        reference_hidden,
        head,
        targets,
        member,
        reference_head=reference_head,
        ignore_index=ignore_index,
        chunk_rows=chunk_rows,
        reduction=reduction,
    )


def linear_cross_entropy(
    hidden: Float[Tensor, "... hidden"],
    head: Head,
    targets: Int[Tensor, ...],
    *,
    ignore_index: int = -100,
    chunk_rows: int | None = None,
    reduction: Literal["sum", "mean"] = "sum",
) -> Float[Tensor, ""]:
    """Compute the cross-entropy −Σ_t log p(targets[t]) from hidden states, chunked like `linear_divergence`.

    Arguments, dtype and errors as there. Two products per chunk.

    >>> import torch; from holdfast.functional.head import Head
    >>> linear_cross_entropy(torch.zeros(1, 2), Head(torch.eye(4, 2)), torch.tensor([3]))
    tensor(1.3863)
    """
    sums = linear_sums(
        hidden,
        None,
        head,
        targets,
        Objective(None, cross_entropy=1.0),
        reference_head=None,
        ignore_index=ignore_index,
        chunk_rows=chunk_rows,
    )
    return reduce_sum(sums.total, sums.supervised, sums.kept, reduction)


def linear_cross_entropy_with_divergence(
    hidden: Float[Tensor, "... hidden"],
    reference_hidden: Float[Tensor, "... reference_hidden"] | None,
    head: Head,
    targets: Int[Tensor, ...],
    divergence: Divergence | None,
    strength: float = 1.0,
    *,
    reference_head: Head | None = None,
    ignore_index: int = -100,
    chunk_rows: int | None = None,
    reduction: Literal["sum", "mean"] = "sum",
    statistics: bool = False,
) -> CrossEntropyWithDivergence:
    """Compute cross-entropy + strength * divergence in one pass: three products per chunk where two calls take five.

    For loops that own their task loss; under a host that computes the cross-entropy itself, use `linear_divergence`
    (`holdfast.integrations.one_pass` hands a host its cross-entropy from here). With `statistics` the same chunks also
    give, per position, what hosts log: cross-entropy, entropy, and whether the target is the likeliest token. Without
    a divergence, `None` twice, it is the cross-entropy alone. Other arguments, dtype and errors as there.

    >>> import torch; from holdfast.functional.head import Head
    >>> h = torch.zeros(1, 2)
    >>> case = (h, h, Head(torch.eye(4, 2)), torch.tensor([3]), Divergence())
    >>> linear_cross_entropy_with_divergence(*case).loss
    tensor(1.3863)
    >>> linear_cross_entropy_with_divergence(*case, statistics=True).statistics.entropy
    tensor([1.3863])
    """
    if (reference_hidden is None) != (divergence is None):
        raise ValueError(
            "A divergence needs the base's hidden states, and they need a divergence, but one of the two is None. Pass "
            "both, or neither for the cross-entropy alone."
        )
    sums = linear_sums(
        hidden,
        reference_hidden,
        head,
        targets,
        Objective(divergence, strength, cross_entropy=1.0),
        reference_head=reference_head,
        ignore_index=ignore_index,
        chunk_rows=chunk_rows,
        statistics=statistics,
    )
    parts = (reduce_sum(part, sums.supervised, sums.kept, reduction) for part in sums[:3])
    total, kl, nll = parts
    return CrossEntropyWithDivergence(total, nll, kl, sums.statistics)
