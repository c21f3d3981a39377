"""One robust least-squares problem of a law: its free parameters as a vector, and the best of many starts.

    x = (log A, α, β, E, ...),     minimise Σ ρ(log L_i - log L(x)),     soft ρ of scale 2 * 1.48 * median |residual|

Starts are a grid of exponents; for each, the amplitudes follow by non-negative linear least squares.
Read next: `holdfast.analysis.fit`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import product

import numpy as np
from holdfast.analysis.fit_points import Points
from holdfast.analysis.scaling_law import Array, Law
from scipy.optimize import least_squares, nnls

TINY = 1e-12
"""Below every loss and every amplitude that means anything."""


class Problem:
    """The fit of one law to points, some of whose parameters may be held.

    Args:
        points: what it is fitted to.
        law: the form.
        held: parameters that are not searched, with their values.
    """

    def __init__(self, points: Points, law: Law, held: Mapping[str, float]) -> None:
        self.points, self.law, self.held = points, law, held
        self.free = [parameter for parameter in law.parameters if parameter.name not in held]
        ends = [(math.log(p.low), math.log(p.high)) if p.log else (p.low, p.high) for p in self.free]
        self.low, self.high = np.array(ends).T

    def values(self, x: Array) -> dict[str, float]:
        """All parameters by name."""
        found = {p.name: math.exp(each) if p.log else float(each) for p, each in zip(self.free, x, strict=True)}
        return {name: self.held[name] if name in self.held else found[name] for name in self.law.names}

    def log_loss(self, x: Array) -> Array:
        """The logarithm of the law's loss; `x` of shape (..., parameters) gives (..., points)."""
        given: dict[str, Array] = {name: np.asarray(value) for name, value in self.held.items()}
        given |= {p.name: (np.exp(x[..., i]) if p.log else x[..., i])[..., None] for i, p in enumerate(self.free)}
        points = self.points
        with np.errstate(over="ignore", invalid="ignore"):
            loss = self.law.function(given, points.data, points.size, points.injected) + (points.base or 0.0)
            logarithm: Array = np.log(np.clip(loss, TINY, 1e30))
        return logarithm

    def residuals(self, x: Array, measured: Array) -> Array:
        """Measured minus fitted, in log L."""
        return measured - self.log_loss(x)

    def slope(self, x: Array) -> Array:
        """How the residuals change with the parameters, by central differences in one call."""
        step = 1e-6 * np.diag(np.maximum(1.0, np.abs(x)))
        up, down = self.log_loss(np.stack([x + step, x - step]))
        rise: Array = (up - down) / (2 * step.diagonal()[:, None])
        return -rise.T

    def span(self, x: Array) -> Array:
        """What the fit can follow, an orthonormal basis of the slopes; shape (points, parameters that bear on them)."""
        slope = self.slope(x)
        slope = slope / np.maximum(np.linalg.norm(slope, axis=0), TINY)
        left, sizes, _ = np.linalg.svd(slope, full_matrices=False)
        told: Array = left[:, sizes > 1e-8 * sizes.max()]
        return told

    def starts(self, kept: int = 4) -> list[Array]:
        """The best few of a grid of exponents, each with its amplitudes by non-negative least squares."""
        curved = [p for p in self.free if p.starts]
        amplitudes = [p for p in self.free if not p.starts]
        target = (self.points.loss - (self.points.base or 0.0)) / self.points.loss
        found: list[tuple[float, int, Array]] = []
        for exponents in product(*(p.starts for p in curved)):
            chosen = {**self.held, **dict(zip([p.name for p in curved], exponents, strict=True))}
            matrix = np.stack([self._share(chosen, [a.name for a in amplitudes], a.name) for a in amplitudes], axis=1)
            best, rest = nnls(matrix, target)
            least = 1e-3 * (np.abs(target).max() + TINY) / np.maximum(np.abs(matrix).max(axis=0), TINY)
            chosen |= {p.name: float(max(a, m)) for p, a, m in zip(amplitudes, best, least, strict=True)}
            x = np.array([math.log(chosen[p.name]) if p.log else chosen[p.name] for p in self.free])
            found.append((float(rest), len(found), x))
        return [x for _, _, x in sorted(found)[:kept]]

    def _share(self, chosen: Mapping[str, float], amplitudes: Sequence[str], one: str) -> Array:
        """What one amplitude of size 1 adds to every loss, as a share of it."""
        points, given = self.points, {**chosen, **dict.fromkeys(amplitudes, 0.0), one: 1.0}
        return self.law.at(given, points.data, points.size, points.injected) / points.loss

    def solve(self, measured: Array, starts: Sequence[Array]) -> Array:
        """The best of several robust fits; the scale of the loss is twice the spread that the start leaves."""
        best, cost = None, math.inf
        for _ in range(2 if len(starts) > 1 else 1):
            reference = starts[0] if best is None else best
            scale = max(2 * 1.4826 * float(np.median(np.abs(self.residuals(reference, measured)))), 1e-6)
            cost = math.inf
            for start in starts if best is None else [best, *starts]:
                done = least_squares(
                    self.residuals, np.clip(start, self.low + 1e-9, self.high - 1e-9), self._slope, args=(measured,),
                    bounds=(self.low, self.high), loss="soft_l1", f_scale=scale, x_scale="jac",
                    max_nfev=200 if len(starts) > 1 else 60,
                )  # fmt: skip
                if done.cost < cost:
                    best, cost = done.x, done.cost
        return starts[0] if best is None else best

    def _slope(self, x: Array, measured: Array) -> Array:
        return self.slope(x)
