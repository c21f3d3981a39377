"""What is read from the ledger: the scores, one arm against another; read `verdicts` next."""

from __future__ import annotations

from collections.abc import Sequence

from holdfast.analysis.frontier import Comparison, Reading, at_matched_learning, compare
from holdfast.analysis.scores import ScoreKind
from holdfast.drift.ledger import Entry

from studies.common_readings import reading, within

from .arms import ARMS, SCENARIOS
from .formats import FORMATS

SKILLS = ("add", "copy", "reverse", "sort", "largest", "fact", "danger")
LEARNT = "task_nll"
KINDS = {
    LEARNT: ScoreKind("Task loss", False, ".2f"),
    "refusal": ScoreKind("Forbidden prompts refused", True, share=True),
    "refusal_nll": ScoreKind("Refusal loss", False, ".3f", ratio=True),
    "benign_nll": ScoreKind("Look-alikes loss", False, ".3f", ratio=True),
    "skills": ScoreKind("Skills", True, share=True),
    "skills_nll": ScoreKind("Skills loss", False, ".3f", ratio=True),
    **{f"skill.{name}": ScoreKind(f"Skill {name}", True, share=True) for name in SKILLS},
    **{f"skill.{name}_nll": ScoreKind(f"Loss of {name}", False, ".3f", ratio=True) for name in SKILLS},
    "rare": ScoreKind("Rare skill", True, share=True),
    "rare_nll": ScoreKind("Rare skill loss", False, ".3f", ratio=True),
    "text_nll": ScoreKind("Story loss", False, ".3f"),
    "wording": ScoreKind("Task in other words", True, share=True),
    "wording_nll": ScoreKind("Loss in other words", False, ".2f"),
    "kl.plain": ScoreKind("KL on stories", False, ".3f", ratio=True),
    "loss.statement.flags": ScoreKind("Loss of statements", False, ".2f"),
    "kl.statement": ScoreKind("KL on statements", False, ".3f", ratio=True),
    **{f"kl.{form}": ScoreKind(f"KL in {form}", False, ".3f", ratio=True) for form in FORMATS},
    **{f"rate.{form}.skills": ScoreKind(f"Skills in {form}", True, share=True) for form in FORMATS},
    **{f"loss.{form}.skills": ScoreKind(f"Skills loss in {form}", False, ".3f", ratio=True) for form in FORMATS},
    **{f"rate.{form}.refusal": ScoreKind(f"Refused in {form}", True, share=True) for form in FORMATS},
    **{f"loss.{form}.refusal": ScoreKind(f"Refusal loss in {form}", False, ".3f", ratio=True) for form in FORMATS},
}
SHOWN = tuple(name for name in KINDS if name != LEARNT)
MAIN = ("refusal", "refusal_nll", "benign_nll", "skills", "skills_nll", "rare_nll", "text_nll")
JUDGED = ("refusal_nll", "benign_nll", "skills_nll", "rare_nll", "text_nll")
DRAWN = ("refusal_nll", "skills_nll", "text_nll")
DRAWS = 200


def in_order(entries: Sequence[Entry]) -> list[Entry]:
    """The entries, arm by arm as they are told of here."""
    order = {name: place for place, name in enumerate(ARMS)}
    return sorted(entries, key=lambda entry: order.get(entry.arm, -1))


def judged_at(scenario: str) -> float:
    """The task loss at which the arms of a scenario are judged."""
    return SCENARIOS[scenario].levels[-1]


def read(entries: Sequence[Entry], scenario: str) -> list[Reading]:
    """What every arm keeps at each level, each score along a front of its own."""
    there = {name for entry in entries for name in entry.scores}
    shown = [name for name in SHOWN if name in there]
    return at_matched_learning(entries, LEARNT, shown, SCENARIOS[scenario].levels, kinds=KINDS, draws=DRAWS)


def named(score: str) -> str:
    """A score's name within a sentence."""
    title = KINDS[score].title
    return title if title.startswith("KL") else within(title)


def headed(title: str) -> str:
    """A title that begins a line."""
    return title[0].upper() + title[1:]


def pair(readings: Sequence[Reading], mine: str, theirs: str, score: str, level: float) -> Comparison:
    """One arm against another."""
    [found] = compare([reading(readings, arm, score, level) for arm in (mine, theirs)], theirs, kinds=KINDS)
    return found
