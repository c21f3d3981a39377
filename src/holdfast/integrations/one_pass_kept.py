"""The host's token loss together with a divergence from what is kept of the base: no base forward, no product more.

    Σ_t CE_t + ρ Σ_t KL_t    in two products with the head from statistics, in three from the base's hidden states

Where the rows are that the host supervises, so are what is kept of them: both are the tokens with a label. Read
`one_pass` first, which has the rest; `functional.cached_cross_entropy` is what is computed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.kept_task import CachedRows
from ..core.types import IGNORED
from ..functional.cached_cross_entropy import cross_entropy_with_cached_kl
from ..functional.chunked import Statistics
from ..functional.divergence import Divergence
from ..functional.head import Head
from ..functional.linear_divergence import CrossEntropyWithDivergence, linear_cross_entropy_with_divergence


def pass_with_kept(
    hidden: Tensor,
    labels: Tensor,
    head: Head,
    kept: CachedRows,
    base_head: Head,
    divergence: Divergence,
    ratio: float,
    chunk_rows: int | None,
    *,
    statistics: bool = False,
) -> CrossEntropyWithDivergence:
    """Return cross-entropy + ratio · divergence over all positions that predict another, [B, T-1].

    Args:
        hidden: of the student, [B, T, H].
        labels: [B, T], `IGNORED` where a token is not asked for.
        head: the student's.
        kept: of the base, at the positions that have a label.
        base_head: the base's.
        divergence: the member of the family.
        ratio: as in `one_pass.over_positions`.
        chunk_rows: as in `linear_divergence`.
        statistics: whether those of every position are asked for too.
    """
    mask = labels[:, 1:] != IGNORED
    own, targets = hidden[:, :-1][mask], labels[:, 1:][mask]
    if kept.constants is None:
        found = linear_cross_entropy_with_divergence(
            own, kept.values, head, targets, divergence, ratio,
            reference_head=base_head, chunk_rows=chunk_rows, statistics=statistics,
        )  # fmt: skip
    else:
        found = cross_entropy_with_cached_kl(
            own, head, kept.values, kept.constants, targets, ratio,
            weight=kept.weights, mask=divergence.mask, chunk_rows=chunk_rows,
        )  # fmt: skip
    if not statistics or found.statistics is None:
        return found._replace(statistics=None)
    spread = (torch.zeros(mask.shape, dtype=each.dtype, device=each.device) for each in found.statistics)
    placed = (whole.masked_scatter(mask, each) for whole, each in zip(spread, found.statistics, strict=True))
    return found._replace(statistics=Statistics(*placed))
