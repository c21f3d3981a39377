"""What a report says of its arms in words and seconds: the verdict on each, and what its runs took.

Read next: `holdfast.analysis.report`, the page.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from holdfast.analysis.frontier import BASE, Comparison, arms
from holdfast.drift.ledger import Entry

__all__ = ["Cost", "Summary", "costs", "summaries"]


@dataclass(frozen=True)
class Cost:
    """What the runs of one arm took: seconds of training per run, and how that compares with the baseline."""

    arm: str
    runs: int
    failed: int
    seconds: tuple[float, float, float] | None
    """Mean, least and most."""
    ratio: float | None


def costs(entries: Sequence[Entry], baseline: str, of: str = "train_seconds") -> list[Cost]:
    """Training cost of every arm; a run counts once, however many splits and scales it was evaluated on.

    >>> from holdfast.drift.ledger import Score
    >>> entries = [Entry("demo", arm, {}, 0, "test", {"skills": Score(0.8)}, cost={"train_seconds": seconds})
    ...            for arm, seconds in (("plain LoRA", 10.0), ("TMKL", 14.0))]
    >>> [cost.ratio for cost in costs(entries, "plain LoRA")]
    [1.0, 1.4]
    """
    found: dict[str, dict[str, float]] = {arm: {} for arm in arms(entries)}
    failed: dict[str, set[str]] = {arm: set() for arm in found}
    for entry in entries:
        if entry.arm != BASE and entry.status == "failed":
            failed[entry.arm].add(entry.run)
        elif entry.arm != BASE and of in entry.cost:
            found[entry.arm][entry.run] = entry.cost[of]
    mean = {arm: sum(runs.values()) / len(runs) for arm, runs in found.items() if runs}
    plain = mean.get(baseline)
    return [
        Cost(
            arm=arm,
            runs=len({entry.run for entry in entries if entry.arm == arm}),
            failed=len(failed[arm]),
            seconds=(mean[arm], min(runs.values()), max(runs.values())) if runs else None,
            ratio=mean[arm] / plain if runs and plain else None,
        )
        for arm, runs in found.items()
    ]


@dataclass(frozen=True)
class Summary:
    """One arm in one sentence, at the head of the page."""

    arm: str
    sentence: str


PHRASES = {
    "better": "is better on ",
    "worse": "is worse on ",
    "mixed": "is better at some levels and worse at others on ",
    "within noise": "is within noise on ",
    "not reached": "did not learn enough to be read on ",
}


def summaries(comparisons: Sequence[Comparison]) -> list[Summary]:
    """On what every arm is better than the baseline, on what worse, and what is within noise, in plain words.

    A score counts as better if it is better at one level at least and worse at none; the sentence says at how many,
    and gives the numbers of that one of them where most is learned.
    """
    found = []
    for arm in dict.fromkeys(one.arm.arm for one in comparisons):
        own = [one for one in comparisons if one.arm.arm == arm]
        told: dict[str, list[str]] = {phrase: [] for phrase in PHRASES}
        for score in dict.fromkeys(one.arm.retention for one in own):
            outcome, words = _outcome([one for one in own if one.arm.retention == score])
            told[outcome].append(words)
        sentence = "; ".join(PHRASES[outcome] + ", ".join(words) for outcome, words in told.items() if words)
        found.append(Summary(arm, f"{sentence}."))
    return found


def _outcome(own: Sequence[Comparison]) -> tuple[str, str]:
    """One arm and score over all levels: the outcome, and the score's title with the numbers behind it."""
    verdicts, title = [one.verdict for one in own], own[0].kind.title
    if "better" in verdicts and "worse" in verdicts:
        return "mixed", title
    for outcome in ("better", "worse"):
        if outcome in verdicts:
            sign = 1 if own[0].arm.learned.higher_is_better else -1  # of a loss the lowest level is the farthest
            clear = max((one for one in own if one.verdict == outcome), key=lambda one: sign * one.arm.level)
            mine, theirs = (clear.kind.show(mean) for mean in clear.means)
            levels = "all" if (n := verdicts.count(outcome)) == len(own) else f"{n} of"
            at = f"{mine} against {theirs} at {clear.arm.place}; at {levels} {len(own)} levels"
            return outcome, f"{title} ({at})"
    return ("not reached" if set(verdicts) == {"not reached"} else "within noise"), title
