"""What points cannot tell about a law: parameters that are refused, with the reason, and doubts to be said in words.

    one N: A / N^α is one number;   under two decades of D: E and A D^β look alike;   no base: L0 + E is one number

Read next: `holdfast.analysis.fit`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from holdfast.analysis.fit_points import Points
from holdfast.analysis.fit_solver import TINY
from holdfast.analysis.scaling_law import LAWS, Array, Law
from scipy.special import fdtrc

__all__ = ["DECADES", "LAWS", "Interval", "doubts", "unidentified"]

Interval = tuple[float, float]
DECADES = 2.0
"""The span of data under which E and A·D^β look alike; a little rounding is forgiven."""

BEYOND = 2.0
"""Times the noise of runs by which a law may miss their means: that of a law that is true does so by less than once."""
FEW = 5
"""Independent groups, under which their spread itself is hardly known."""


def unidentified(
    points: Points, law: Law, decades: float = DECADES
) -> tuple[dict[str, float], dict[str, str], list[str]]:
    """Which parameters are held at which value, why, and what forbids a fit altogether.

    >>> held, why, faults = unidentified(Points([10, 1000], [2.1, 2.2], base=2.0), LAWS["base"])
    >>> held, faults
    ({'α': 0.0}, [])
    >>> why["α"]
    'All points have N = 1: α cannot be known, and A stands for A/N^α; a second size (parameters or rank) would tell.'
    """
    held: dict[str, float] = {}
    refused: dict[str, str] = {}
    faults: list[str] = []
    if len(np.unique(points.data)) < 2 and "β" in law.names:
        faults.append(f"all points have D = {points.data[0]:g}: growth with data needs at least two amounts")
    if "B" in law.names and len(np.unique(points.injected)) < 2:
        faults.append(f"all points have p = {points.injected[0]:g}: B needs at least two shares of injected data")
    if len(np.unique(points.size)) < 2 and "α" in law.names:
        size, what = points.size[0], "a second size (parameters or rank) would tell"
        if "B" in law.names:
            faults.append(f"all points have N = {size:g}: (1 + B·p)^α tells α and B apart only with two sizes")
        elif "S" in law.names:
            held |= {"A": 0.0, "α": 1.0}
            refused |= {"α": f"All points have N = {size:g}: A and α are part of S; {what}.", "A": ""}
        else:
            held["α"] = 0.0
            refused["α"] = f"All points have N = {size:g}: α cannot be known, and A stands for A/N^α; {what}."
    if "E" in law.names:
        if "L0" in law.names:
            held["E"], refused["E"] = 0.0, "No base was measured, so L0 + E is one number: E is held at 0."
        elif points.decades < decades - 0.01:
            held["E"] = 0.0
            refused["E"] = (
                f"The data span {points.decades:.1f} decades: under {decades:g}, E and A·D^β look alike. E is held at "
                "0, and A and β hold only under that assumption."
            )
    return held, {name: why for name, why in refused.items() if why or name in held}, faults


def doubts(
    points: Points,
    law: Law,
    values: Mapping[str, float],
    intervals: Mapping[str, Interval],
    residuals: Array,
    names: Sequence[str],
) -> list[str]:
    """What makes the numbers of a fit less sure than their intervals say.

    Args:
        points: what was fitted.
        law: the form.
        values: of all parameters.
        intervals: of those that are told.
        residuals: of log L.
        names: of the group that each point moved with in the bootstrap.
    """
    told = []
    if len(sizes := np.unique(points.size)) == 2 and "α" in intervals:
        told.append(f"α rests on two sizes (N = {sizes[0]:g} and {sizes[1]:g}), which any power law fits.")
    if points.decades < DECADES - 0.01 and "E" not in law.names:
        told.append(f"The data span {points.decades:.1f} decades: a shift E would look like a smaller β.")
    if "E" in intervals and intervals["E"][0] <= 1e-3 * values["E"] + TINY:
        told.append("E is not told from 0: the base form says as much with one number less.")
    if "L0" in values:
        told.append("L0 was fitted, not measured: measure the base to know what was forgotten.")
    for p in law.parameters:
        if p.starts and p.name in intervals and min(values[p.name] - p.low, p.high - values[p.name]) < 1e-3:
            told.append(f"{p.name} is at the end of its range ({p.low:g} to {p.high:g}): another form may fit better.")
    miss, noise = misfit(points, residuals)
    if miss > BEYOND * noise and miss > 1e-3:
        told.append(
            f"The law misses the means of its places by {100 * miss:.0f} %, where runs of one place differ by "
            f"{100 * noise:.0f} %: it does not describe these points, and its parameters mean little."
        )
    if len(np.unique(points.seed)) == 1:
        told.append("All points have one seed: what another seed would change is not in the intervals.")
    elif _seeds_move(points.seed, residuals, names):
        told.append(
            "Runs of one seed go up and down together: the intervals are too narrow; draw whole seeds (together)."
        )
    if len(np.unique(points.run)) == 1:
        told.append("All points are of one run: what another run would change is not in the intervals.")
    if (count := len(set(names))) < FEW:
        told.append(f"The intervals rest on {count} independent groups of points: they are wide, and rough.")
    return told


def misfit(points: Points, residuals: Array) -> tuple[float, float]:
    """How far the law is from the mean of each place, and runs from theirs, in log L; (0, 0) where no place has two.

    >>> points = Points([10, 10, 100, 100], [2.1, 2.2, 2.3, 2.4])
    >>> [round(each, 3) for each in misfit(points, np.array([0.1, 0.3, -0.3, -0.1]))]
    [0.2, 0.141]
    """
    places = np.stack([points.data, points.size, points.injected])
    _, of, counts = np.unique(places, axis=1, return_inverse=True, return_counts=True)
    of = of.ravel()
    if len(counts) == len(residuals):
        return 0.0, 0.0
    means = np.bincount(of, residuals) / counts
    within = float(((residuals - means[of]) ** 2).sum()) / (len(residuals) - len(counts))
    return float(np.sqrt((means**2).mean())), float(np.sqrt(within))


def _seeds_move(seed: Array, residuals: Array, names: Sequence[str]) -> bool:
    """Whether groups of one seed differ less than groups of different seeds: an F test of the groups' means."""
    label = np.asarray(names)
    of = {name: label == name for name in dict.fromkeys(names)}
    means, seeds = (np.array([values[own].mean() for own in of.values()]) for values in (residuals, seed))
    groups = [means[seeds == each] for each in np.unique(seeds)]
    if len(means) <= len(groups) or residuals.std() <= 1e-9:
        return False
    between = sum(len(g) * float(g.mean() - means.mean()) ** 2 for g in groups) / (len(groups) - 1)
    within = sum(float(((g - g.mean()) ** 2).sum()) for g in groups) / (len(means) - len(groups))
    return bool(fdtrc(len(groups) - 1, len(means) - len(groups), between / max(within, TINY)) < 0.05)
