"""Gradients on disjoint groups of retain rows: what spans a protected subspace, and whether it is more than noise.

A *stream* is a retain set with a loss that is taken of it. Each stream has its share of the rank: so many groups of its
rows, each with the gradient of its own mean loss.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from ...core.errors import WrongSetup
from ...core.gradients import is_preference
from ...core.types import Batch, ReferenceLoss, References, Setup
from ...functional.subspace import split_half_cosine

NOISE = 0.1  # split-half cosine below which a warning is due


def reference_groups(
    setup: Setup,
    sets: Sequence[Sequence[Batch]],
    losses: Sequence[ReferenceLoss],
    rank: int | None,
    beta: float,
) -> tuple[References, Tensor]:
    """Return the gradients of all groups, and the number of the stream that each is of, [k].

    Args:
        setup: takes the gradients.
        sets: batches of each retain set.
        losses: taken of each set; where there are several, preferences only of sets that have them.
        rank: gradients in all; None, or less than two for each stream: two groups each, the halves of one mean.
        beta: of the preference loss.

    Raises:
        WrongSetup: if the rank is less than one gradient for each stream, or no set has the preferences asked for.
    """
    streams = [(each, loss) for each in sets for loss in losses if len(losses) == 1 or _has(each, loss)]
    if not all(any(loss == found for _, found in streams) for loss in losses):
        streams.append((sets[0], "preference"))  # refused where it is taken, with what to do
    if rank is not None and rank < len(streams):
        raise WrongSetup(
            f"rank={rank} is less than one gradient for each of {len(sets)} retain sets and {len(losses)} losses. "
            f"Give rank >= {len(streams)}, or fewer sets."
        )
    share = max(2, (rank or 0) // len(streams))
    found, of = list[References](), list[int]()
    for number, (batches, loss) in enumerate(streams):
        found.append(setup.references(_deal(batches, share), loss, beta))
        of += [number] * len(found[-1].rows)
    rows, values, counts = (torch.cat([getattr(f, name) for f in found]) for name in ("rows", "losses", "counts"))
    return References(rows, values, counts), torch.tensor(of, device=rows.device)


def _has(batches: Sequence[Batch], loss: ReferenceLoss) -> bool:
    return loss == "likelihood" or all(is_preference(batch) for batch in batches)


def _deal(batches: Sequence[Batch], groups: int) -> list[list[Batch]]:
    """Deal batches out to groups; where there are too few batches, their rows (pairs stay together in theirs)."""
    if len(batches) < groups and "labels" in batches[0]:
        batches = [{k: v[i : i + 1] for k, v in b.items()} for b in batches for i in range(len(b["input_ids"]))]
    return [list(batches[i::groups]) for i in range(min(groups, len(batches)))]


def stream_means(counts: Tensor, streams: Tensor) -> Tensor:
    """Return the weights [streams, k] that make each stream's mean of its groups, by their numbers of tokens.

    >>> stream_means(torch.tensor([3.0, 1.0, 5.0]), torch.tensor([0, 0, 1])).tolist()
    [[0.75, 0.25, 0.0], [0.0, 0.0, 1.0]]
    """
    each = torch.stack([counts * (streams == stream) for stream in torch.unique(streams)])
    return each / each.sum(1, keepdim=True).clamp(min=1)


def signal(products: Tensor, counts: Tensor, streams: Tensor) -> Tensor:
    """Return the split-half cosine, the mean over streams; warn where it says that the gradients are noise.

    Args:
        products: of the groups' gradients with each other, [k, k] in float64.
        counts: tokens of each group, [k].
        streams: the number of each group's stream, [k].
    """
    each = []
    for stream in torch.unique(streams):
        own = streams == stream
        each.append(split_half_cosine(products[own][:, own], counts[own]))
    cosine = torch.stack(each).mean()
    if cosine < NOISE:
        warnings.warn(
            "orthogonal_projection: halves of the retain rows give gradients with a cosine below 0.1, so the basis is "
            "mostly noise and the projection protects little. Use more samples. (Gradients on data that the model "
            "already fits are small; this may pass as it drifts.)",
            stacklevel=2,
        )
    return cosine
