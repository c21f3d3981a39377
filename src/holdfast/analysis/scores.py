"""What the scores are called, which way is better and how they are printed: one table for figures and verdicts.

A perplexity that is read upside down turns a loss into a gain, so a score that is not in the table is refused until its
direction is given.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches


@dataclass(frozen=True)
class ScoreKind:
    """How to read one score.

    Args:
        title: in words, as on an axis.
        higher_is_better: its direction.
        format: how a value is printed.
        share: whether it is a share of items between 0 and 1; its sampling error can then be estimated from n alone.
        ratio: whether arms are compared by their ratio instead of their difference: of a loss that spans decades the
            largest of a few seeds would decide everything.
    """

    title: str
    higher_is_better: bool
    format: str = ".2f"
    share: bool = False
    ratio: bool = False

    def show(self, value: float, signed: bool = False) -> str:
        """The value as text."""
        return f"{value:{'+' if signed else ''}{self.format}}"


KNOWN: Mapping[str, ScoreKind] = {
    "adaptation": ScoreKind("New task learned", True, share=True),
    "adaptation_nll": ScoreKind("New task loss", False, ".3f"),
    "skills": ScoreKind("Old skills kept", True, share=True),
    "skills_nll": ScoreKind("Old skills loss", False, ".3f"),
    "rare": ScoreKind("Rare skills kept", True, share=True),
    "refusal": ScoreKind("Harmful requests refused", True, share=True),
    "refusal_nll": ScoreKind("Refusal loss", False, ".3f"),
    "over_refusal": ScoreKind("Harmless requests refused", False, share=True),
    "story_perplexity": ScoreKind("Story perplexity", False, ".1f"),
}


def kind(name: str, extra: Mapping[str, ScoreKind] | None = None) -> ScoreKind:
    """How to read the score `name`; `extra` comes before the table.

    >>> kind("story_perplexity").higher_is_better
    False
    >>> kind("gsm8k", {"gsm8k": ScoreKind("GSM8K", True)}).title
    'GSM8K'
    """
    known = {**KNOWN, **(extra or {})}
    if name in known:
        return known[name]
    close = get_close_matches(name, known, n=1)
    meant = f" Did you mean {close[0]!r}?" if close else ""
    way_out = f"Pass kinds={{{name!r}: ScoreKind('its title', True)}}."
    raise ValueError(f"It is not known whether a higher {name!r} is better.{meant} {way_out}")
