"""What the drift of a score is counted in: points, per cent, nats, or the score's own unit.

    rate: 100 (tuned - base) · perplexity: 100 (tuned / base - 1) · loss, margin, divergence: tuned - base

Read next: `holdfast.analysis.drift_rows`, the rows that share an axis by unit.
"""

from __future__ import annotations

from dataclasses import dataclass

from holdfast.analysis.changes import link_of
from holdfast.analysis.scores import ScoreKind
from holdfast.drift.score import Score


@dataclass(frozen=True)
class Unit:
    """What a drift is counted in; rows of one unit share an axis.

    Args:
        heading: of the group.
        suffix: after a drift.
        digits: the format of a drift.
        factor: what turns a score's own drift into this unit.
    """

    heading: str
    suffix: str = ""
    digits: str = ".1f"
    factor: float = 100.0

    def show(self, drift: float, *, signed: bool = True, suffix: bool = True) -> str:
        """A drift, already in this unit, as text.

        >>> POINTS.show(-9.52), NATS.show(0.03, suffix=False), POINTS.show(-0.01)
        ('−9.5 points', '+0.030', '0.0 points')
        """
        text = f"{drift:{'+' if signed else ''}{self.digits}}"
        text = text.replace("-", "−") if float(text) else text.lstrip("+-")  # what rounds to nothing has no sign
        return text + (self.suffix if suffix else "")


POINTS = Unit("Rates: drift in percentage points", " points")
SHARE = Unit("Perplexities: drift in per cent of the base", " %")
NATS = Unit("Losses and margins: drift in nats", " nats", ".3f", 1.0)
DISTANCE = Unit("Distance from the base, in nats", " nats", ".4f", 1.0)
"""A divergence is 0 for the base and never below, so whatever was tuned has one: neither harm nor gain by itself."""
ORDER = (POINTS, SHARE, NATS, DISTANCE)


def unit_of(name: str, base: Score, tuned: Score, known: ScoreKind | None) -> Unit:
    """What the drift of a score is counted in; what is not known is counted in the score's own unit.

    >>> unit_of("perplexity.wiki", Score(8.0), Score(9.0), None).suffix
    ' %'
    """
    family = name.partition(".")[0]
    if family.endswith("kl"):
        return DISTANCE
    if family.endswith(("nll", "margin")):
        return NATS
    if family.endswith("perplexity") or (base.items and link_of(base) == "log" and base.value > 0):
        return SHARE
    items = {*(base.items or ()), *(tuned.items or ())}
    if (known and known.share) or (items and items <= {0.0, 0.5, 1.0}):
        return POINTS
    title = known.title.partition(" (")[0] if known else name
    return Unit(f"{title}: drift in its own unit", "", known.format if known else ".3g", 1.0)
