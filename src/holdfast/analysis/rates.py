"""One rate and its interval, and whether flips go one way more often than the other: counts are all it takes.

    wilson: (p + z²/2n ± z √(p (1 - p)/n + z²/4n²)) / (1 + z²/n)        mcnemar: 2 P(X <= fewer), X ~ Binomial(flips, ½)

Read next: `holdfast.analysis.evidence`, how sure a change from base to tuned is.
"""

from __future__ import annotations

import math
from typing import TypeAlias

from scipy.special import ndtri
from scipy.stats import binom

Interval: TypeAlias = tuple[float, float]


def wilson(hits: int, n: int, confidence: float = 0.95) -> Interval:
    """The interval of a rate, `hits` of `n` items (Wilson, 1927); of no items, [0, 1].

    Raises:
        ValueError: if `hits` is not between 0 and `n`.

    >>> [round(bound, 3) for bound in wilson(9, 10)]
    [0.596, 0.982]
    """
    if not 0 <= hits <= n:
        raise ValueError(f"{hits} hits of {n} items cannot be: pass 0 <= hits <= n.")
    if n == 0:
        return 0.0, 1.0
    z, rate = float(ndtri(0.5 + confidence / 2)), hits / n
    middle = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return (middle - half if hits else 0.0), (middle + half if hits < n else 1.0)


def mcnemar(lost: int, gained: int, *, mid: bool = False) -> float:
    """Two-sided p-value that flips both ways are equally likely (McNemar, 1947), exact: binomial over all flips.

    Args:
        lost: items right for the base and wrong for the tuned model.
        gained: the other way round.
        mid: count half of the probability of what was seen (Fagerland et al., 2013): less cautious, still sound.

    >>> round(mcnemar(1, 7), 4), round(mcnemar(1, 7, mid=True), 4)
    (0.0703, 0.0391)
    """
    fewer, flips = min(lost, gained), lost + gained
    tail = binom.cdf(fewer, flips, 0.5) - (0.5 * binom.pmf(fewer, flips, 0.5) if mid else 0.0)
    return min(1.0, 2 * float(tail))
