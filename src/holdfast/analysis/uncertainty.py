"""How sure a difference is: the spread over seeds and the sampling of items, joined so as not to claim too much.

Seeds share their test items, so the spread over seeds d_1..d_S does not contain the luck of the items, and both count:

    half-width^2 = (t_{S-1} * sd(d) / sqrt(S))^2 + (z * se_items)^2      (two independent sources, each its quantile)

The items' part comes from a bootstrap over items, the same resampled items for every arm and seed, so that arms
measured on the same items are compared item by item. One seed has no spread: its interval is infinite.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TypeAlias
from zlib import crc32

import numpy as np
from holdfast.drift.ledger import Score
from numpy.typing import NDArray
from scipy.special import ndtri, stdtrit

Array: TypeAlias = NDArray[np.float64]


def resample(score: Score, name: str, who: str, draws: int, share: bool = False) -> Array:
    """The measured value, then `draws` values it could have had with other items; shape (1 + draws,).

    With `items` (whose mean, or the exponential of whose mean, is the value) the items of `name` are resampled, alike
    for all points. Otherwise the standard error, or for a share that of n independent items, is drawn for `who` alone,
    which is cautious: what arms have in common then does not cancel. With none of these, the value is taken as exact.

    >>> values = resample(Score(0.5, items=(0, 1, 1, 0)), "skills", "", draws=500)
    >>> float(values[0]), bool(0.2 < values[1:].std() < 0.3)
    (0.5, True)
    """
    value, values = score.value, np.full(1 + draws, score.value)
    if not draws:
        return values
    if score.items:
        items = np.asarray(score.items)
        means = _item_weights(name, len(items), draws) @ items
        if math.isclose(items.mean(), value, rel_tol=1e-4, abs_tol=1e-6):
            values[1:] = means
            return values
        if math.isclose(math.log(value) if value > 0 else math.inf, items.mean(), rel_tol=1e-4, abs_tol=1e-6):
            values[1:] = np.exp(means)
            return values
    error = score.standard_error
    if error is None and share and score.n:
        middle = (value * score.n + 2) / (score.n + 4)  # Agresti and Coull (1998): 40 of 40 right is not a certainty
        error = math.sqrt(max(middle * (1 - middle), 0.0) / (score.n + 4))
    if error:
        values[1:] += error * np.random.default_rng(crc32(f"{who}|{name}".encode())).standard_normal(draws)
    return values


@lru_cache(maxsize=64)
def _item_weights(name: str, n: int, draws: int) -> Array:
    """How often each of n items is drawn, as shares; shape (draws, n). The same for all who ask for the same items."""
    random = np.random.default_rng(crc32(f"items of {name}".encode()))
    return random.multinomial(n, np.full(n, 1.0 / n), size=draws) / n


def interval(differences: Array, confidence: float = 0.95) -> tuple[float, float, float]:
    """Mean difference and its interval; `differences` has shape (seeds, 1 + draws), the measured ones first.

    >>> mean, low, high = interval(np.array([[0.10], [0.12], [0.14]]))
    >>> f"{mean:.2f} [{low:.2f}, {high:.2f}]"
    '0.12 [0.07, 0.17]'
    """
    seeds, tail = len(differences), 0.5 + confidence / 2
    mean = float(differences[:, 0].mean())
    if seeds < 2:
        return mean, -math.inf, math.inf
    spread = stdtrit(seeds - 1, tail) * differences[:, 0].std(ddof=1) / math.sqrt(seeds)
    sampled = differences[:, 1:].mean(axis=0)
    items = ndtri(tail) * sampled.std(ddof=1) if sampled.size > 1 else 0.0
    half = float(np.hypot(spread, items))
    return mean, mean - half, mean + half
