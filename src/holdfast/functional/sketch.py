"""Is a reference gradient signal or noise, and is an old one still good? Read off Gram matrices, without another pass.

k gradients on disjoint groups of retain rows are k noisy looks at one mean gradient. Two halves of them that point the
same way (split-half cosine near 1) show signal; halves that do not (near 0) show that a projection would remove a
random direction. How far half of them predicts the other half is also the most that an *old* basis can be asked for.
"""

from __future__ import annotations

import torch
from torch import Tensor


def halves(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weights [k] that make means of the even and of the odd groups, by their numbers of tokens.

    >>> halves(torch.tensor([1.0, 2.0, 3.0]))[0]
    tensor([0.2500, 0.0000, 0.7500])
    """
    even = counts * (torch.arange(len(counts), device=counts.device) % 2 == 0)
    odd = counts - even
    return even / even.sum().clamp(min=1e-300), odd / odd.sum().clamp(min=1e-300)


def split_half_cosine(products: Tensor, counts: Tensor) -> Tensor:
    """Return the cosine between the means of the two halves, a scalar; 0 where there is but one group.

    Args:
        products: Gram matrix of the groups' gradients, [k, k] in float64.
        counts: tokens of each group, [k].

    >>> split_half_cosine(torch.ones(4, 4, dtype=torch.float64), torch.ones(4))
    tensor(1., dtype=torch.float64)
    """
    even, odd = (half.to(products) for half in halves(counts))
    sizes = (even @ products @ even) * (odd @ products @ odd)
    cosine: Tensor = (even @ products @ odd) / sizes.sqrt().clamp(min=1e-300)
    return cosine


def predicted_share(products: Tensor, counts: Tensor) -> Tensor:
    """Return |P g| / |g|, P the projector on the span of the even groups and g the mean of the odd ones.

    The most that any basis of this many rows can hold of a gradient on fresh rows: the noise ceiling.
    """
    even, odd = (half.to(products) for half in halves(counts))
    chosen = even > 0
    inner, across = products[chosen][:, chosen], products[chosen] @ odd
    inside: Tensor = across @ torch.linalg.pinv(inner, hermitian=True) @ across
    share: Tensor = inside.clamp(min=0) / (odd @ products @ odd).clamp(min=1e-300)
    return share.sqrt().clamp(max=1)
