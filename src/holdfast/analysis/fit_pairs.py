"""Two laws against each other at equal data: does one arm forget less? Paired, since both fits drew the same weights.

    d = L_mine(D, N) - L_theirs(D, N),      its interval: the quantiles of d over the draws of both fits, draw by draw

A lower law is no merit by itself: what learns less forgets less. Read next: `holdfast.analysis.frontier`, which
compares arms where they have learned equally much; docs/scaling-law.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from holdfast.analysis.fit import Fit, FitError
from holdfast.analysis.scaling_law import Array

__all__ = ["Difference", "of_forgetting", "of_parameter"]


@dataclass(frozen=True)
class Difference:
    """One law minus another, with its interval; of a parameter on a log scale, of its logarithms."""

    value: float
    low: float
    high: float

    @property
    def verdict(self) -> Literal["less", "more", "within noise"]:
        """In words; "within noise" if the interval covers 0.

        >>> Difference(-0.2, -0.3, -0.1).verdict, Difference(-0.2, -0.3, 0.1).verdict
        ('less', 'within noise')
        """
        if self.low <= 0 <= self.high:
            return "within noise"
        return "less" if self.value < 0 else "more"


def of_forgetting(mine: Fit, theirs: Fit, data: float, size: float, injected: float = 0.0) -> Difference:
    """What one arm forgets more than another at the same data and size, by their laws.

    Args:
        mine: a fit.
        theirs: that of another arm, run with the same sizes and seeds, and fitted with the same draws.
        data: D.
        size: N.
        injected: p.

    Raises:
        FitError: if the draws of the two fits do not belong together.

    >>> from holdfast.analysis.fit import LAWS, Points, fit
    >>> data, wave = np.array([10, 30, 100, 300, 1000.0]), np.array([1, -1, 0, 1, -1]) / 100
    >>> one, other = (fit(Points(data, 2 + a * data**0.5 + wave, base=2.0), LAWS["base"]) for a in (0.01, 0.02))
    >>> told = of_forgetting(one, other, 100, 1)
    >>> round(told.value, 2), told.verdict
    (-0.1, 'less')
    """
    _same_draws(mine, theirs)
    rows = [found.losses(np.array([data]), size, injected)[:, 0] for found in (mine, theirs)]
    return _difference(rows[0] - rows[1], mine.confidence)


def of_parameter(mine: Fit, theirs: Fit, name: str) -> Difference:
    """One parameter of one arm minus that of another; A and C, which have no scale of their own, by their logarithms.

    Raises:
        FitError: if a fit does not tell the parameter, or the draws of the two do not belong together.
    """
    _same_draws(mine, theirs)
    for found in (mine, theirs):
        if name not in found.parameters:
            raise FitError(f"{name} cannot be compared.", [found.refused.get(name, f"{found.law.name} has no {name}")])
    place = mine.law.names.index(name)
    rows = [np.append(found.values[name], found.draws[:, place]) for found in (mine, theirs)]
    if mine.law.parameters[place].log:
        rows = [np.log(row) for row in rows]
    return _difference(rows[0] - rows[1], mine.confidence)


def _difference(values: Array, confidence: float) -> Difference:
    """The first of the values, and the interval of the rest."""
    ends = [0.5 - confidence / 2, 0.5 + confidence / 2]
    low, high = np.quantile(values[1:], ends, method="weibull")
    return Difference(float(values[0]), float(low), float(high))


def _same_draws(mine: Fit, theirs: Fit) -> None:
    """Refuse two fits that were not drawn together."""
    faults = []
    if mine.law.names != theirs.law.names:
        faults.append(f"one is of the form {mine.law.name!r}, the other of {theirs.law.name!r}")
    if mine.groups != theirs.groups:
        odd = sorted(set(mine.groups) ^ set(theirs.groups))
        faults.append(f"they do not have the same runs, seeds and sizes: only one has {'; '.join(odd[:4])}")
    if (mine.seed, len(mine.draws)) != (theirs.seed, len(theirs.draws)):
        faults.append("they were drawn with different `draws` or `seed`")
    if faults:
        raise FitError("The two fits cannot be paired:", faults)
