"""The law of forgetting, form by form: how much a loss on old text rises with the data D that a model is tuned on.

    base       L = L0 + A D^β / N^α                        Bethune et al. (2025), arXiv 2502.06042, Eq. 7 with p = 0
    drift      L = L0 + A D^β / N^α + E                    AlignGuard-LoRA, arXiv 2508.02079
    injected   L = L0 + A D^β / ((1 + B p) N)^α            Bethune et al. (2025): a share p of old data mixed in
    shifted    L = L0 + S - A / N^α - C / D^β              after Kalajdzievski (2024), arXiv 2401.05605

L0 is the loss before tuning. Each form is linear in its amplitudes (A, C, E, S) once its exponents are given, which is
how a fit finds where to start. Read next: `holdfast.analysis.fit`, which fits them; docs/scaling-law.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[np.float64]
Forgetting: TypeAlias = Callable[[Mapping[str, Array], Array, Array, Array], Array]
"""(parameters by name, data D, size N, injected share p) -> loss above L0; everything broadcasts."""


@dataclass(frozen=True)
class Parameter:
    """One number of a law.

    Args:
        name: as in the equation.
        meaning: in words.
        low: the least that a fit may give it.
        high: the most.
        starts: where fits start from; empty for an amplitude, in which the law is linear.
        log: whether it is searched on a log scale, being positive and of unknown size.
    """

    name: str
    meaning: str
    low: float
    high: float
    starts: tuple[float, ...] = ()
    log: bool = False


@dataclass(frozen=True)
class Law:
    """One form of the law of forgetting.

    Args:
        name: what the command line calls it.
        equation: as text.
        function: the loss above L0.
        parameters: with bounds and meaning, in the order of the equation.
        source: who wrote it down.
    """

    name: str
    equation: str
    function: Forgetting
    parameters: tuple[Parameter, ...]
    source: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the parameters."""
        return tuple(parameter.name for parameter in self.parameters)

    def forgetting(self, parameters: Mapping[str, float], data: float, size: float = 1.0, injected: float = 0) -> float:
        """The loss above L0 at one place.

        >>> LAWS["base"].forgetting({"A": 0.5, "α": 1.0, "β": 0.5}, data=100, size=10)
        0.5
        >>> LAWS["injected"].forgetting({"A": 0.5, "B": 100.0, "α": 1.0, "β": 0.5}, data=100, size=10, injected=0.01)
        0.25
        """
        return float(self.at(parameters, *(np.asarray(part, dtype=float) for part in (data, size, injected))))

    def at(self, parameters: Mapping[str, float], data: Array, size: Array, injected: Array) -> Array:
        """The loss above L0 at many places."""
        return self.function({name: np.asarray(value) for name, value in parameters.items()}, data, size, injected)

    def without_base(self) -> Law:
        """The same law of the loss itself, with L0 as one more amplitude: for a base that was not measured.

        >>> LAWS["base"].without_base().names
        ('A', 'α', 'β', 'L0')
        """
        inner = self.function

        def loss(given: Mapping[str, Array], data: Array, size: Array, injected: Array) -> Array:
            return inner(given, data, size, injected) + given["L0"]

        level = Parameter("L0", "the loss before tuning, fitted because no base was measured", 0.0, np.inf)
        return replace(self, function=loss, parameters=(*self.parameters, level))


def base_form(given: Mapping[str, Array], data: Array, size: Array, injected: Array) -> Array:
    """A D^β / N^α."""
    return given["A"] * data ** given["β"] / size ** given["α"] + 0 * injected


def drift_form(given: Mapping[str, Array], data: Array, size: Array, injected: Array) -> Array:
    """A D^β / N^α + E; E does not vanish as D -> 0, where forgetting must: it describes amounts that were seen."""
    return base_form(given, data, size, injected) + given["E"]


def injected_form(given: Mapping[str, Array], data: Array, size: Array, injected: Array) -> Array:
    """A D^β / ((1 + B p) N)^α: old data, mixed in at the share p, acts as a model that is 1 + B p times as large."""
    return given["A"] * data ** given["β"] / ((1 + given["B"] * injected) * size) ** given["α"]


def shifted_form(given: Mapping[str, Array], data: Array, size: Array, injected: Array) -> Array:
    """S - A / N^α - C / D^β: rises with steps D and with parameters trained N, and levels off at S."""
    return given["S"] - given["A"] / size ** given["α"] - given["C"] / data ** given["β"] + 0 * injected


_A = Parameter("A", "amplitude: forgetting at D = N = 1", 1e-30, 1e30, log=True)
_BETA = Parameter("β", "how fast it grows: with 10 times the data 10^β times as much", 0, 3, (0.2, 0.5, 1))
_ALPHA = Parameter("α", "how fast it falls with size; negative if it rises (adapter rank)", -3, 3, (-0.5, 0.1, 0.6))
_E = Parameter("E", "residual shift: forgetting that does not depend on the amount of data", 0, np.inf)
_B = Parameter("B", "how much a share of injected old data adds to the effective size", 1e-3, 1e8, (10, 300, 1e4), True)
_S = Parameter("S", "where forgetting levels off", 0, np.inf)
_C = Parameter("C", "amplitude of the approach in steps", 1e-30, 1e30, log=True)
_SIZE = Parameter("A", "amplitude of the approach in parameters trained", 1e-30, 1e30, log=True)
_FALL = Parameter("α", "exponent of the approach in parameters trained", 0.01, 3, (0.3, 0.8))
_RISE = Parameter("β", "exponent of the approach in steps", 0.01, 3, (0.2, 0.5, 1))

LAWS: Mapping[str, Law] = {
    law.name: law
    for law in (
        Law("base", "L = L0 + A·D^β/N^α", base_form, (_A, _ALPHA, _BETA), "Bethune et al. (2025), arXiv 2502.06042"),
        Law("drift", "L = L0 + A·D^β/N^α + E", drift_form, (_A, _ALPHA, _BETA, _E), "AlignGuard-LoRA, 2508.02079"),
        Law("injected", "L = L0 + A·D^β/((1+B·p)·N)^α", injected_form, (_A, _B, _ALPHA, _BETA), "Bethune et al."),
        Law("shifted", "L = L0 + S - A/N^α - C/D^β", shifted_form, (_S, _SIZE, _FALL, _C, _RISE), "after 2401.05605"),
    )
}  # fmt: skip
"""The forms by name. `shifted` is the plain sum of two approaches; the paper's own joint form was not at hand."""
