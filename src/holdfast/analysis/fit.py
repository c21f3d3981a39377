"""Fit a law of forgetting, say how sure each number is, and what the points cannot tell.

    minimise  Σ_i ρ(log L_i - log L(D_i, N_i, p_i; θ)),     ρ soft (large residuals count linearly), from many starts

Intervals come from a wild bootstrap: the log residuals of every run, widened for its leverage and by Student's t, are
given one random weight, and the law is fitted again (`holdfast.analysis.fit_bootstrap`). Runs count as independent, or
only seeds do; checkpoints of a run never. What no fitting can tell apart is refused with the reason: α from one size, E
from less than two decades of data (`holdfast.analysis.fit_limits`).

Read next: `holdfast.analysis.extrapolation` (which form foretells best), docs/scaling-law.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from holdfast.analysis.fit_bootstrap import Together, groups, weights, widened
from holdfast.analysis.fit_limits import DECADES, Interval, doubts, unidentified
from holdfast.analysis.fit_points import FitError, Points
from holdfast.analysis.fit_solver import Problem
from holdfast.analysis.scaling_law import LAWS, Array, Law

__all__ = ["DECADES", "LAWS", "Fit", "FitError", "Points", "Prediction", "Together", "estimate", "fit"]


@dataclass(frozen=True)
class Prediction:
    """What a law expects at one place: the mean with its interval, and where one new run will fall.

    `forgetting` and its interval are above L0; None if L0 was not measured. `beyond` counts the decades past the
    largest amount of data that was seen.
    """

    data: float
    size: float
    injected: float
    loss: float
    interval: Interval
    run: Interval
    base: float | None
    beyond: float
    spanned: float

    @property
    def forgetting(self) -> float | None:
        """The loss above L0."""
        return None if self.base is None else self.loss - self.base

    def sentence(self) -> str:
        """The expectation in words."""
        above = self.base or 0.0
        what = "loss" if self.base is None else "forgetting"
        low, high, one, other = (end - above for end in (*self.interval, *self.run))
        told = f"at D = {self.data:g}, N = {self.size:g}: expect {what} {self.loss - above:.4f} [{low:.4f}, {high:.4f}]"
        told += f"; one run in [{one:.4f}, {other:.4f}]"
        if self.beyond > self.spanned:
            told += f"; {self.beyond:.1f} decades past data that span {self.spanned:.1f}: a guess about the form"
        return told


@dataclass(frozen=True)
class Fit:
    """A fitted law.

    Args:
        law: the form.
        points: what it was fitted to.
        parameters: by name, those that the points can tell.
        intervals: of these.
        refused: by name, why a parameter is not told.
        residual: root mean square of log L, corrected for the number of parameters.
        said: what a reader must know, in words.
        draws: everything again from resampled points; shape (draws, parameters of the law).
        values: all parameters, those held included.
        residuals: log L measured minus log L fitted.
        groups: what was drawn as a whole: runs, or seeds.
        seed: of the draws.
    """

    law: Law
    points: Points
    parameters: Mapping[str, float]
    intervals: Mapping[str, Interval]
    refused: Mapping[str, str]
    residual: float
    said: tuple[str, ...]
    confidence: float
    draws: Array = field(repr=False)
    values: Mapping[str, float] = field(repr=False)
    residuals: Array = field(repr=False)
    groups: tuple[str, ...] = field(repr=False)
    seed: int = 0

    def curve(self, data: Sequence[float] | Array, size: float = 1.0, injected: float = 0.0) -> Array:
        """The loss and its interval over amounts of data; shape (3, data): mean, low, high."""
        every = self.losses(np.asarray(data, dtype=float), size, injected)
        return np.stack([every[0], *_ends(every[1:], self.confidence)])

    def predict(self, data: float, size: float | None = None, injected: float = 0.0) -> Prediction:
        """What is expected at D, N (the middle of those measured if left out) and p.

        Raises:
            FitError: for a size other than the only one measured, about which nothing is known.

        >>> points = Points([10, 30, 100, 300, 1000], [2.1, 2.173, 2.316, 2.548, 3.0], base=2.0)
        >>> fit(points, LAWS["base"], draws=20).predict(10_000).sentence()[:45]
        'at D = 10000, N = 1: expect forgetting 3.1638'
        """
        sizes = np.unique(self.points.size)
        size = float(np.exp(np.log(sizes).mean())) if size is None else size
        if len(sizes) == 1 and not math.isclose(size, sizes[0]):
            raise FitError(f"Only N = {sizes[0]:g} was measured: nothing is known of N = {size:g}. Add a second size.")
        every = self.losses(np.array([float(data)]), size, injected)[:, 0]
        low, high = _ends(every[1:], self.confidence)
        widened = self.residuals * math.sqrt(len(self.points) / max(len(self.points) - len(self.parameters), 1))
        single = every[1:, None] * np.exp(widened)
        beyond = max(0.0, math.log10(data / self.points.data.max()))
        return Prediction(
            float(data), float(size), injected, float(every[0]), (float(low), float(high)),
            tuple(map(float, _ends(single.ravel(), self.confidence))),  # type: ignore[arg-type]  # two ends
            self.points.base, beyond, self.points.decades,
        )  # fmt: skip

    def losses(self, data: Array, size: float, injected: float) -> Array:
        """The fitted loss over amounts of data, then that of every draw; shape (1 + draws, data)."""
        rows = np.vstack([[self.values[name] for name in self.law.names], self.draws])
        given = {name: rows[:, [place]] for place, name in enumerate(self.law.names)}
        return self.law.function(given, data, np.asarray(size), np.asarray(injected)) + (self.points.base or 0.0)

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return {
            "law": self.law.name, "equation": self.law.equation, "parameters": dict(self.parameters),
            "intervals": {name: list(ends) for name, ends in self.intervals.items()}, "refused": dict(self.refused),
            "residual": self.residual, "confidence": self.confidence, "points": len(self.points),
            "base": self.points.base, "decades": self.points.decades, "groups": len(self.groups),
            "said": list(self.said),
        }  # fmt: skip


def fit(
    points: Points, law: Law, *, together: Together = "runs", draws: int = 200, confidence: float = 0.95, seed: int = 0
) -> Fit:
    """Fit one law, with intervals and with what cannot be told.

    Fits of several arms with the same runs, sizes and seeds draw alike: the difference of their `draws` is paired.

    Args:
        points: at least as many places as parameters.
        law: one of `LAWS`, or your own.
        together: what counts as one independent draw: a run with its checkpoints, or all runs of a seed.
        draws: of the bootstrap.
        confidence: of the intervals.
        seed: of the bootstrap.

    Raises:
        FitError: lists everything that forbids the fit.

    >>> data = np.array([10.0, 30, 100, 300, 1000] * 2)
    >>> size = np.repeat([1.0, 4.0], 5)
    >>> told = fit(Points(data, 2 + 0.01 * data**0.5 / size**0.3, size, base=2.0), LAWS["base"], draws=10)
    >>> {name: round(value, 3) for name, value in told.parameters.items()}
    {'A': 0.01, 'α': 0.3, 'β': 0.5}
    """
    law = law if points.base is not None else law.without_base()
    held, refused, faults = unidentified(points, law)
    free = [name for name in law.names if name not in held]
    places = len(np.unique(np.stack([points.data, points.size, points.injected]), axis=1).T)
    if places < len(free) or len(points) <= len(free):
        faults.append(
            f"{len(points)} points at {places} places cannot fit {len(free)} parameters ({', '.join(free)}): it takes "
            f"{len(free) + 1} points at {len(free)} places"
        )
    if faults:
        raise FitError(f"The law {law.name!r} cannot be fitted to these points:", faults)
    problem = Problem(points, law, held)
    best = problem.solve(np.log(points.loss), problem.starts())
    residuals = problem.residuals(best, np.log(points.loss))
    names = groups(points, together)
    wide = widened(residuals, problem.span(best), names, confidence)
    fitted = np.log(points.loss) - residuals
    again = [problem.solve(fitted + wide * each, [best]) for each in weights(names, draws, seed)]
    rows = np.array([[problem.values(x)[name] for name in law.names] for x in again])
    values, low_high = problem.values(best), _ends(rows, confidence)
    intervals = {n: (float(low), float(high)) for n, low, high in zip(law.names, *low_high, strict=True) if n in free}
    told = (*points.said, *refused.values(), *doubts(points, law, values, intervals, residuals, names))
    residual = math.sqrt(float(residuals @ residuals) / (len(points) - len(free)))
    parameters = {name: values[name] for name in free}
    drawn = tuple(sorted(set(names)))
    return Fit(
        law, points, parameters, intervals, refused, residual, told, confidence, rows, values, residuals, drawn, seed
    )


def estimate(points: Points, law: Law) -> Mapping[str, float]:
    """The best parameters alone, none refused but those without any bearing: for foretelling, which needs no names."""
    law = law if points.base is not None else law.without_base()
    held, _, faults = unidentified(points, law, decades=0.0)
    if len(points) <= len(law.names) - len(held):
        faults.append(f"{len(points)} points are too few for {len(law.names) - len(held)} parameters")
    if faults:
        raise FitError(f"The law {law.name!r} cannot be fitted to these points:", faults)
    problem = Problem(points, law, held)
    return problem.values(problem.solve(np.log(points.loss), problem.starts()))


def _ends(draws: Array, confidence: float) -> Array:
    """Both ends of the interval over the first axis, not narrower when there are few draws."""
    return np.quantile(draws, [0.5 - confidence / 2, 0.5 + confidence / 2], axis=0, method="weibull")
