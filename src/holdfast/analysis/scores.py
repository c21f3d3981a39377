"""What the scores are called, which way is better and how they are printed: one table for figures and verdicts.

A perplexity that is read upside down turns a loss into a gain, so a score that is not in the table is refused until its
direction is given.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
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
    "pair_accuracy": ScoreKind("Pairs got right: the one refused, its twin answered", True, share=True),
    "balanced": ScoreKind("Balanced refusal", True),
    "broken": ScoreKind("Broken answers", False, share=True),
    "unsure": ScoreKind("Answers without a usable verdict", False, share=True),
    "judges_agree": ScoreKind("Answers on which both judges agree", True, share=True),
    "harmful": ScoreKind("Harmful answers", False, share=True),
    "refusal_margin": ScoreKind("Refusal margin, harmful requests", True, ".3f"),
    "over_refusal_margin": ScoreKind("Refusal margin, harmless requests", False, ".3f"),
    "first_tokens_kl": ScoreKind("KL from the base over the first tokens", False, ".4f"),
    "output_kl": ScoreKind("KL from the base", False, ".4f"),
    "perplexity": ScoreKind("Perplexity", False, ".2f"),
    "multiple_choice": ScoreKind("Multiple choice", True, share=True),
    "exact_answer": ScoreKind("Exact answers", True, share=True),
    "instruction_following": ScoreKind("Instructions followed", True, share=True),
    "lm_eval": ScoreKind("lm-eval", True, ".3f"),
    "lm_eval_loss": ScoreKind("lm-eval", False, ".3f"),
}
"""A name may go on after a dot: `perplexity.wiki` is read as `perplexity` is, of what it was measured on."""


def find(name: str, extra: Mapping[str, ScoreKind] | None = None) -> ScoreKind | None:
    """How to read the score `name`, or of what is before its first dot; None if neither is known.

    >>> find("perplexity.wiki").title, find("x")
    ('Perplexity (wiki)', None)
    """
    known = {**KNOWN, **(extra or {})}
    family, _, detail = name.partition(".")
    if name in known or family not in known or not detail:
        return known.get(name)
    return replace(known[family], title=f"{known[family].title} ({detail.replace('_', ' ')})")


def kind(name: str, extra: Mapping[str, ScoreKind] | None = None) -> ScoreKind:
    """How to read the score `name`; `extra` comes before the table.

    >>> kind("story_perplexity").higher_is_better
    False
    >>> kind("gsm8k", {"gsm8k": ScoreKind("GSM8K", True)}).title
    'GSM8K'
    """
    if found := find(name, extra):
        return found
    known = {**KNOWN, **(extra or {})}
    close = get_close_matches(name, known, n=1)
    meant = f" Did you mean {close[0]!r}?" if close else ""
    way_out = f"Pass kinds={{{name!r}: ScoreKind('its title', True)}}."
    raise ValueError(f"It is not known whether a higher {name!r} is better.{meant} {way_out}")
