"""Which residuals of a fit move together in its bootstrap, and how far: one weight for every run, or for every seed.

    r_g -> w_g · c · (I - H_gg)⁻¹ r_g,     c = √((G - 1) / G) · t / z,     w_g ∈ ±{√½, 1, √(3/2)}, each as likely

H_gg is the part of the fit's hat matrix that belongs to group g: a group that draws the curve to itself leaves too
small residuals. c is that of the jackknife over G groups, with the quantile of Student's t over that of the normal.
What the points of a run share, its noise over data included, is kept as it is, since all of them get one weight. The
six weights (Webb 2014) leave more draws than a sign does when groups are few. A weight belongs to the name of its
group (seed, size, share, most data), not to its place: fits of two arms with the same runs draw the same weights, so
that the difference of their draws is paired, run by run.

Read next: `holdfast.analysis.fit`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Literal, TypeAlias
from zlib import crc32

import numpy as np
from holdfast.analysis.fit_points import FitError, Points
from holdfast.analysis.scaling_law import Array
from scipy.special import ndtri, stdtrit

__all__ = ["Together", "groups", "weights", "widened"]

Together: TypeAlias = Literal["runs", "seeds"]
WEIGHTS = tuple(sign * math.sqrt(square) for sign in (-1, 1) for square in (0.5, 1.0, 1.5))
MOST = 0.9
"""Of a leverage: what one group alone decides cannot be judged by that group."""


def groups(points: Points, together: Together) -> list[str]:
    """For every point the name of its group; points of a single run count one by one, since nothing else is there.

    Args:
        points: whose runs and seeds.
        together: whole runs, or all runs of a seed.

    Raises:
        FitError: if there is one seed, and whole seeds are to be drawn.

    >>> points = Points([10, 100, 10, 100], [2.1, 2.2, 2.1, 2.3], [4, 4, 8, 8], seed=[1, 1, 2, 2], run=[0, 0, 1, 1])
    >>> groups(points, "runs")[1:3]
    ['seed 1, N 4, p 0, up to D 100', 'seed 2, N 8, p 0, up to D 100']
    >>> groups(points, "seeds")
    ['seed 1', 'seed 1', 'seed 2', 'seed 2']
    """
    if together == "seeds":
        if len(np.unique(points.seed)) == 1:
            raise FitError("All points have one seed: how much another would differ cannot be known. Add seeds.")
        return [f"seed {seed:g}" for seed in points.seed]
    if len(np.unique(points.run)) == 1:
        return [f"point {place}" for place in range(len(points))]
    last = {run: points.data[points.run == run].max() for run in np.unique(points.run)}
    alike: dict[str, dict[float, int]] = defaultdict(dict)  # runs that differ in nothing are counted
    names = []
    for size, share, seed, run in zip(points.size, points.injected, points.seed, points.run, strict=True):
        name = f"seed {seed:g}, N {size:g}, p {share:g}, up to D {last[run]:g}"
        count = alike[name].setdefault(run, len(alike[name]))
        names.append(f"{name}, {count}" if count else name)
    return names


def widened(residuals: Array, span: Array, names: Sequence[str], confidence: float) -> Array:
    """The residuals, made as large as those of runs that the fit has not seen.

    Args:
        residuals: of log L.
        span: an orthonormal basis of what the fit can follow; shape (points, parameters).
        names: of every point's group.
        confidence: of the intervals.

    >>> told = widened(np.array([-1.0, 1.0]), np.full((2, 1), 0.5**0.5), ["a", "b"], 0.95)
    >>> [round(float(value / 12.706 * 1.960 * 0.5**0.5), 3) for value in told]  # t and z, √(1/2) is the deviation
    [-1.0, 1.0]
    """
    label, members = np.asarray(names), dict.fromkeys(names)
    spare, tail = min(len(residuals) - span.shape[1], len(members) - 1), 0.5 + confidence / 2
    factor = math.sqrt(1 - 1 / len(members)) * stdtrit(spare, tail) / ndtri(tail)
    found = np.empty_like(residuals)
    for name in members:
        own = label == name
        sizes, turned = np.linalg.eigh(span[own] @ span[own].T)
        found[own] = factor * turned @ ((turned.T @ residuals[own]) / (1 - np.clip(sizes, 0, MOST)))
    return found


def weights(names: Sequence[str], draws: int, seed: int) -> Array:
    """What each point's residual is multiplied by; shape (draws, points)."""
    drawn = {
        name: np.random.default_rng([seed, crc32(name.encode())]).choice(WEIGHTS, draws)
        for name in dict.fromkeys(names)
    }
    return np.stack([drawn[name] for name in names], axis=1)
