"""What is read from the ledger: the scores, the levels, one arm against another; read `verdicts` next."""

from __future__ import annotations

from collections.abc import Sequence

from holdfast.analysis.frontier import Comparison, Reading, Verdict, compare
from holdfast.analysis.scores import ScoreKind

from studies.common_readings import reading, within

LEARNT, ALONG = "target_loss", "story_loss"  # the front that settings are chosen by
KINDS = {
    "target_loss": ScoreKind("Refusal loss on unseen harmful prompts", False, ".3f"),
    "target_rate": ScoreKind("Harmful prompts refused", True, share=True),
    "story_loss": ScoreKind("Loss on stories", False, ".3f"),
    "oz_loss": ScoreKind("Loss on Oz", False, ".3f"),
    "benign_loss": ScoreKind("Loss on benign answers", False, ".3f"),
    "refused_loss": ScoreKind("Refusal loss on benign prompts", True, ".3f"),
    "refused_rate": ScoreKind("Benign prompts refused", False, share=True),
}
LOST = ("story_loss", "oz_loss", "benign_loss")
KEPT = (*LOST, "refused_loss")
SHOWN = ("target_rate", *KEPT, "refused_rate")
LEVELS, JUDGED = (0.5, 0.1, 0.03), (0.1, 0.03)  # of refusal loss; the levels that the sentences speak of
WIDE = 2.0  # a line between two points of a front that bridges more than this multiple of the level is marked


def named(score: str) -> str:
    """A score's name within a sentence."""
    return within(KINDS[score].title)


def pair(readings: Sequence[Reading], mine: str, theirs: str, score: str, level: float) -> Comparison:
    """One arm against another."""
    [found] = compare([reading(readings, arm, score, level) for arm in (mine, theirs)], theirs, kinds=KINDS)
    return found


def decided(one: Comparison) -> Verdict:
    """The verdict; a difference that vanishes in the digits shown is a tie, however narrow its interval is."""
    vanishes = one.seeds and float(one.kind.show(one.difference)) == 0
    return "within noise" if vanishes else one.verdict
