"""What is kept of the base at some positions, how it is made there, and the divergence that it gives a student.

    statistics      w (c0 − s h·e0 + logsumexp(z))        e0 [H], c0, and w where gamma or exclusion ask for a weight
    hidden states   D(softmax(W0 h0), softmax(W h))       h0 [H], as the base makes them

With statistics z = W h is one product and its gradient another; hidden states take one more, and give any divergence.
w = (1 − p_base(y))^gamma is a constant of the base: 1 − p_base(y) = sigmoid(L0 − z0_y), with L0 = s h0·e0 − c0 the
log-sum-exp without the target. The cache of a pool (`cache`) and that of the task (`task_cache`) both keep such rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.errors import NotYetSupported
from ..core.kept_task import CachedRows
from ..functional.cached_divergence import cached_kl, reference_statistics
from ..functional.divergence import Divergence, position_weight
from ..functional.head import Head
from ..functional.linear_divergence import linear_divergence
from ..functional.softmax_blocks import dot, working_dtype
from .cache_facts import same

__all__ = ["BaseHead", "divergence_from", "hidden_rows", "statistics_rows", "weighted"]


def weighted(divergence: Divergence) -> bool:
    """Return whether positions have weights of their own."""
    return bool(divergence.gamma) or divergence.exclusion is not None


def statistics_rows(
    hidden: Tensor, head: Head, targets: Tensor, divergence: Divergence, storage: torch.dtype
) -> CachedRows:
    """Return the statistics of the base at positions, ready to be kept.

    What float16 cannot hold (a head with entries that small or large) comes in float32: see the dtype of `values`.

    Args:
        hidden: the base's last hidden states, [N, H].
        head: the base's, without a soft cap.
        targets: the tokens that follow, [N].
        divergence: forward; with gamma or exclusion only where the target is masked (`cache_facts.inexact`).
        storage: float16, float32 or float64.

    >>> head = Head(torch.tensor([[1.0, 3.0], [1.0, 5.0]]))
    >>> of = torch.tensor([[2.0, 0.0]]), head, torch.tensor([0])
    >>> statistics_rows(*of, Divergence("none"), torch.float32).values
    tensor([[1., 4.]])
    """
    try:
        kept = reference_statistics(hidden, head, targets, mask=divergence.mask, storage=storage)
    except ValueError:
        if storage is not torch.float16:
            raise
        kept = reference_statistics(hidden, head, targets, mask=divergence.mask, storage=torch.float32)
    weights = _weights(hidden, head, targets, divergence, *kept) if weighted(divergence) else None
    return CachedRows(kept.mean_weight, kept.constant, targets, weights)


def _weights(
    hidden: Tensor, head: Head, targets: Tensor, divergence: Divergence, mean_weight: Tensor, constant: Tensor
) -> Tensor:
    x = head.scale * hidden.to(working_dtype(hidden, head))
    others = dot(x, mean_weight) - constant
    of_target = dot(x, head.weight[targets])
    if head.bias is not None:
        of_target = of_target + head.scale * head.bias[targets].to(of_target.dtype)
    return position_weight(F.logsigmoid(others - of_target), divergence)[0]


def hidden_rows(hidden: Tensor, targets: Tensor) -> CachedRows:
    """Return the base's hidden states at positions, as they are."""
    return CachedRows(hidden, None, targets)


class BaseHead:
    """The base's frozen head, by which a student's is known; one that was compared is known by its memory.

    Args:
        head: the base's.
    """

    def __init__(self, head: Head) -> None:
        self.head = head
        self._equal_at: tuple[int, ...] = ()

    def is_that_of(self, head: Head) -> bool:
        """Return whether a student's head is this one, and frozen."""
        parts = (head.weight, *(() if head.bias is None else (head.bias,)))
        if any(part.requires_grad for part in parts):
            return False
        place = tuple(part.data_ptr() for part in parts)
        if place != self._equal_at and same(head, self.head):
            self._equal_at = place
        return place == self._equal_at

    def refuse_other(self, head: Head, of: object) -> None:
        """Raise unless a student's head is this one, and frozen, as statistics need it.

        Args:
            head: the student's.
            of: where the statistics come from.

        Raises:
            NotYetSupported: if it is another.
        """
        if not self.is_that_of(head):
            raise NotYetSupported(
                f"The student's head is trained, or is not the base's, and the statistics of {of} hold for one frozen "
                "head. Keep hidden states: make the cache anew with the head as it is now (of a pool: "
                "ReferenceCache.of(..., store='hidden'))."
            )


def divergence_from(
    own: Tensor,
    head: Head,
    rows: CachedRows,
    base: BaseHead,
    divergence: Divergence,
    *,
    of: object,
    chunk_rows: int | None = None,
) -> Tensor:
    """Return the divergence of a student from the base, summed over positions.

    Args:
        own: the student's last hidden states there, [N, H].
        head: the student's.
        rows: what is kept of the base there.
        base: the base's head.
        divergence: forward, and the one that the rows are of, if they are statistics.
        of: where the rows come from, for the message.
        chunk_rows: rows of logits that exist at once, as in `linear_divergence`.

    Raises:
        NotYetSupported: if the rows are statistics, and the student's head is trained or is not the base's.
    """
    if rows.constants is None:
        other = None if base.is_that_of(head) else base.head
        return linear_divergence(
            own, rows.values, head, rows.targets, divergence, reference_head=other, chunk_rows=chunk_rows
        )
    base.refuse_other(head, of)
    return cached_kl(
        own,
        head,
        rows.values,
        rows.constants,
        rows.targets,
        weight=rows.weights,
        mask=divergence.mask,
        chunk_rows=chunk_rows,
    )
