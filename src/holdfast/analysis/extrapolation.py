"""Which form foretells best? Fit on small, predict large: the error on amounts of data that the fit did not see.

    error = mean |L_predicted / L_measured - 1|     over the held-out points

beside two marks: `last seen`, the mean loss at the largest amount fitted, which a law must beat to be of use, and
`noise`, how far the held-out runs lie from their own mean, below which no form can be told from another.

Read next: `holdfast.analysis.fit`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from holdfast.analysis.fit import LAWS, FitError, Points, estimate
from holdfast.analysis.scaling_law import Array, Law

__all__ = ["Extrapolation", "compare"]

LAST_SEEN = "last seen"


@dataclass(frozen=True)
class Extrapolation:
    """How one form did on what it had not seen; `error` is NaN with a reason `why` if it could not be fitted.

    `bias` is the mean of L_predicted / L_measured - 1: below 0, it foretold too little forgetting.
    """

    law: str
    error: float
    bias: float
    noise: float
    fitted: int
    held_out: int
    cut: float
    why: str = ""


def compare(points: Points, laws: Iterable[Law] = (), share: float = 1 / 3) -> list[Extrapolation]:
    """Every form's error on the largest amounts of data, fitted on the smaller; the best first, then `last seen`.

    Args:
        points: with at least three amounts of data.
        laws: the forms; all of them that the points can tell if left out.
        share: of the amounts of data that is held out, from the largest down; at least one.

    Raises:
        FitError: if there are fewer than three amounts of data.

    >>> data = np.array([10.0, 30, 100, 300, 1000, 3000])
    >>> best, *_ = compare(Points(data, 2 + 0.01 * data**0.5, base=2.0), [LAWS["base"]])
    >>> best.law, best.cut, best.held_out, round(best.error, 4)
    ('base', 300.0, 2, 0.0)
    """
    amounts = np.unique(points.data)
    if len(amounts) < 3:
        raise FitError(f"Holding out the largest amount of data takes three amounts, got {len(amounts)}.")
    cut = float(amounts[-1 - max(1, min(round(share * len(amounts)), len(amounts) - 2))])
    small, large = points.where(points.data <= cut), points.where(points.data > cut)
    noise = _noise(large)

    def scored(name: str, predicted: Array) -> Extrapolation:
        off = predicted / large.loss - 1
        return Extrapolation(name, float(np.abs(off).mean()), float(off.mean()), noise, len(small), len(large), cut)

    found = []
    for law in laws or LAWS.values():
        try:
            values = estimate(small, law)
        except FitError as error:
            why = "; ".join(error.faults) or str(error)
            found.append(Extrapolation(law.name, math.nan, math.nan, noise, len(small), len(large), cut, why))
            continue
        form = law if points.base is not None else law.without_base()
        predicted = form.at(values, large.data, large.size, large.injected) + (points.base or 0.0)
        found.append(scored(law.name, predicted))
    found.sort(key=lambda one: (math.isnan(one.error), one.error))
    return [*found, scored(LAST_SEEN, _last_seen(small, large))]


def _noise(points: Points) -> float:
    """Mean relative distance of runs from the mean of their place; NaN if no place has two."""
    places = np.stack([points.data, points.size, points.injected])
    _, group, counts = np.unique(places, axis=1, return_inverse=True, return_counts=True)
    group = group.ravel()
    if not (counts > 1).any():
        return math.nan
    means = np.bincount(group, points.loss) / counts
    return float((np.abs(points.loss / means[group] - 1))[counts[group] > 1].mean())


def _last_seen(small: Points, large: Points) -> Array:
    """For every held-out point the mean loss at the largest amount fitted, of its own size where there is one."""
    found = []
    for size in large.size:
        alike = small.size == size if (small.size == size).any() else np.ones(len(small), dtype=bool)
        found.append(small.loss[alike & (small.data == small.data[alike].max())].mean())
    return np.array(found)
