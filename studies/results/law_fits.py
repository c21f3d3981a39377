"""The laws of one comparison: every arm's fit, and what it forgets more than plain LoRA at equal data; read `law_page`.

    forgetting of a score = its loss - its loss before tuning;     the middle: D between the least and the most, N too

All arms are fitted with the same draws, so that their differences are paired.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
from holdfast.analysis import extrapolation, fit_pairs
from holdfast.analysis.extrapolation import Extrapolation
from holdfast.analysis.fit import LAWS, Fit, FitError, Together, fit
from holdfast.analysis.fit_pairs import Difference
from holdfast.analysis.fit_points import from_ledger
from holdfast.analysis.scaling_law import Law
from holdfast.analysis.uncertainty import interval
from holdfast.drift.ledger import Entry

from .columns import Column
from .comparisons import PLAIN

DATA, SIZE = "steps", "lora.r"
FORMS = tuple(LAWS[name] for name in ("base", "drift", "shifted"))  # nothing old is mixed in: none with a share of it
FACTOR = 10.0  # times the most data that was seen: what is foretold


@dataclass(frozen=True)
class Laws:
    """One score of one comparison.

    Attributes:
        score: its name.
        fits: by arm.
        forms: by arm, how every form foretells; or why that cannot be known.
        refused: by arm without a fit, why.
    """

    score: str
    fits: dict[str, Fit]
    forms: dict[str, Sequence[Extrapolation] | str]
    refused: dict[str, str]

    def against(self, arm: str) -> Difference | None:
        """What an arm forgets more than plain LoRA in the middle of the data; None where one has no law."""
        if not {arm, PLAIN} <= {*self.fits}:
            return None
        theirs = self.fits[PLAIN]
        return fit_pairs.of_forgetting(self.fits[arm], theirs, *middle(theirs))

    def parameter(self, arm: str, name: str) -> Difference | None:
        """An arm's parameter minus plain LoRA's (A: of logarithms); None where one of the two is not told."""
        if not all(name in self.fits[one].parameters if one in self.fits else False for one in (arm, PLAIN)):
            return None
        return fit_pairs.of_parameter(self.fits[arm], self.fits[PLAIN], name)


def laws(
    each: Column, score: str, together: Together = "seeds", draws: int = 200, forms: Sequence[Law] = FORMS
) -> Laws:
    """Fit every arm.

    Args:
        each: the comparison.
        score: a loss of what should be kept.
        together: what counts as one independent draw.
        draws: of the bootstrap.
        forms: that are compared by what they foretell.
    """
    found = Laws(score, {}, {}, {})
    for arm in each.arms:
        try:
            points = from_ledger(each.entries, score, DATA, SIZE, arm=arm)
            found.fits[arm] = fit(points, LAWS["drift"], together=together, draws=draws)
        except FitError as error:
            found.refused[arm] = "; ".join(error.faults) or str(error)
            continue
        try:
            found.forms[arm] = extrapolation.compare(points, forms) if forms else "not compared"
        except FitError as error:
            found.forms[arm] = str(error)
    return found


def middle(found: Fit) -> tuple[float, float]:
    """D and N in the middle of what was measured, on a log scale."""
    points = found.points
    ends = points.data.min() * points.data.max(), points.size.min() * points.size.max()
    return math.sqrt(ends[0]), math.sqrt(ends[1])


def amounts(each: Column) -> list[float]:
    """The amounts of data at which runs were measured."""
    return sorted({entry.cost[DATA] for entry in each.entries if DATA in entry.cost and entry.arm in each.arms})


def measured(entries: Sequence[Entry], arm: str, score: str, data: float) -> float:
    """The mean of a test score over sizes and seeds at one amount of data; NaN where there is none."""
    values = [
        entry.scores[score].value
        for entry in entries
        if (entry.arm, entry.split, entry.cost.get(DATA)) == (arm, "test", data) and entry.settings.get("scale", 1) == 1
    ]
    return fmean(values) if values else math.nan


def seen(each: Column, arm: str, score: str, data: float) -> Difference | None:
    """What an arm loses more than plain LoRA at one amount of data, measured: the mean over sizes, paired by seed."""
    pairs = []
    for seed in each.seeds:
        own = [entry for entry in each.entries if entry.seed == seed]
        pairs.append(measured(own, arm, score, data) - measured(own, PLAIN, score, data))
    known = np.array([[pair] for pair in pairs if not math.isnan(pair)])
    return Difference(*interval(known)) if len(known) > 1 else None


def nearest(each: Column, data: float) -> float:
    """The amount of data that was measured nearest to this one, on a log scale."""
    return min(amounts(each), key=lambda one: abs(np.log(one / data)))
