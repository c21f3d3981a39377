"""Where the marks of a chart stand: one axis for all rows of a unit, and its ticks at round numbers.

    place of x = WIDTH (x - low) / (high - low)

Read next: `holdfast.analysis.drift_rows`, what is drawn on it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from holdfast.analysis.drift_rows import Row

WIDTH = 320.0
"""Of an axis, in the units of its drawing."""


@dataclass(frozen=True)
class Axis:
    """From where to where an axis goes, and its ticks with their places."""

    low: float
    high: float
    ticks: tuple[tuple[float, str], ...] = ()

    def at(self, value: float) -> float:
        """The place of a value.

        >>> Axis(-1.0, 1.0).at(0.0)
        160.0
        """
        return round(WIDTH * (value - self.low) / (self.high - self.low), 2)


def axis_of(rows: Iterable[Row]) -> Axis:
    """An axis that holds zero and all drifts, intervals and budgets of these rows, with three to five ticks."""
    places = [0.0]
    for row in rows:
        places += [x for x in (row.value, *row.interval, *(at for at, _ in row.budgets)) if math.isfinite(x)]
    low, high = min(places), max(places)
    if low == high:
        low, high = -1.0, 1.0
    room = 0.06 * (high - low)
    axis = Axis(low - room, high + room)
    size = 10 ** math.floor(math.log10((high - low) / 4))
    step = size * min(times for times in (1, 2, 5, 10) if times * size >= (high - low) / 4)
    ticks = [count * step for count in range(math.ceil(low / step), math.floor(high / step) + 1)]
    words = [f"{tick:+.6g}".replace("-", "−") if tick else "0" for tick in ticks]
    return replace(axis, ticks=tuple(zip(map(axis.at, ticks), words, strict=True)))
