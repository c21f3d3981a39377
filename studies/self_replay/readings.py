"""What is read from the ledger: the scores, the levels, one arm against another; read `verdicts` next."""

from __future__ import annotations

from collections.abc import Sequence

from holdfast.analysis.frontier import Comparison, Reading, at_matched_learning, compare
from holdfast.analysis.scores import ScoreKind
from holdfast.drift.ledger import Entry

from studies.alignguard.readings import KINDS as LAB_KINDS
from studies.common_readings import reading, within

from .arms import ARMS

LEARNT = "task_nll"
KINDS = {
    **{name: kind for name, kind in LAB_KINDS.items() if name not in ("target_loss", "story_loss")},
    "rare": ScoreKind("Rare skill", True, share=True),
    "rare_nll": ScoreKind("Rare skill loss", False, ".3f", ratio=True),
}
JUDGED = ("refusal_nll", "benign_nll", "skills_nll", "rare_nll", "text_nll")
SHOWN = ("refusal", "refusal_nll", "over_refusal", "benign", "benign_nll", "skills", "skills_nll", "rare", "rare_nll",
         "text_nll")  # fmt: skip
DRAWN = ("refusal", *JUDGED)
LEVELS = {"shift": (0.4, 0.3, 0.2), "second": (0.5, 0.4, 0.3)}  # of task loss
JUDGED_AT = {"shift": 0.3, "second": 0.4}
DRAWS = 200


def in_order(entries: Sequence[Entry]) -> list[Entry]:
    """The entries, arm by arm as they are told of here."""
    order = {name: place for place, name in enumerate(ARMS)}
    return sorted(entries, key=lambda entry: order.get(entry.arm, -1))


def read(entries: Sequence[Entry], scenario: str) -> list[Reading]:
    """What every arm keeps at each level, each score along a front of its own."""
    return at_matched_learning(entries, LEARNT, SHOWN, LEVELS[scenario], kinds=KINDS, draws=DRAWS)


def named(score: str) -> str:
    """A score's name within a sentence."""
    return within(KINDS[score].title)


def pair(readings: Sequence[Reading], mine: str, theirs: str, score: str, level: float) -> Comparison:
    """One arm against another."""
    [found] = compare([reading(readings, arm, score, level) for arm in (mine, theirs)], theirs, kinds=KINDS)
    return found
