"""One comparison read back from the ledger: a base, what was tuned from it with each seed, and what became of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from holdfast.analysis.budgets import Gate
from holdfast.analysis.gate import Judgement, judge
from holdfast.analysis.paired import Drift, drifts
from holdfast.analysis.scores import ScoreKind, find
from holdfast.drift.ledger import Entry

from .adapters import Tuning
from .measuring import BASE

LEVEL = 0.05
KL = ("first_tokens_kl", "output_kl")


def is_kl(name: str) -> bool:
    """Whether a score is a divergence from the base, of which the base's own is 0.

    >>> is_kl("output_kl.stories"), is_kl("refusal")
    (True, False)
    """
    return name.partition(".")[0] in KL


@dataclass(frozen=True)
class Comparison:
    """The entries of one experiment.

    Args:
        tuning: how it was tuned.
        entries: the base once, and one of each seed.
        gate: what judges it, if its base has a gate.
    """

    tuning: Tuning
    entries: Sequence[Entry]
    gate: Gate | None = None

    @cached_property
    def base(self) -> Entry:
        """Before tuning."""
        return next(entry for entry in self.entries if entry.arm == BASE)

    @cached_property
    def tuned(self) -> list[Entry]:
        """After it, by seed."""
        return sorted((entry for entry in self.entries if entry.arm != BASE), key=lambda entry: entry.seed)

    @cached_property
    def kinds(self) -> Mapping[str, ScoreKind]:
        """How scores are read; those of the study's own are left out."""
        return {name: known for name in self.base.scores if (known := find(name))}

    @cached_property
    def moves(self) -> list[dict[str, Drift]]:
        """Of each seed every score's drift, corrected for their number (Holm)."""
        base = {name: self.base.scores[name] for name in self.kinds}
        return [{one.score: one for one in drifts(base, entry.scores, self.kinds)} for entry in self.tuned]

    @cached_property
    def judged(self) -> list[Judgement]:
        """What the gate says of each seed."""
        gate = self.gate
        return [judge(gate, self.base.scores, entry.scores) for entry in self.tuned] if gate else []

    def beyond(self, worse: bool) -> list[list[str]]:
        """Of each seed, the scores beyond noise for the worse, or for the better; no KL, which nothing leaves at 0."""
        return [
            [n for n, one in found.items() if not is_kl(n) and one.adjusted < LEVEL and (one.forgetting > 0) == worse]
            for found in self.moves
        ]
