"""What is read from the ledger: the scores, one arm against another, the share of a rise; read `verdicts` next."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
from holdfast.analysis.frontier import Comparison, Reading, at_matched_learning, compare
from holdfast.analysis.points import BASE, Point, front, points
from holdfast.analysis.scores import ScoreKind
from holdfast.analysis.uncertainty import interval, resample
from holdfast.drift.ledger import Entry, Score

from studies.common_readings import reading, within

from .arms import ARMS, PLAIN, REPLAY, TASKS

LEARNT, KEPT = "target_loss", "story_loss"  # the front that settings are chosen by
KINDS = {
    "target_loss": ScoreKind("Target loss", False, ".2f"),
    "story_loss": ScoreKind("Story loss", False, ".3f"),
    "oz_loss": ScoreKind("Loss on Oz", False, ".3f"),
    "wiki_loss": ScoreKind("Loss on WikiText", False, ".3f"),
}
OTHERS = ("oz_loss", "wiki_loss")  # texts that no pool covers
SHOWN = (KEPT, *OTHERS)
DRAWS, SMALLEST = 200, 1e-4


def in_order(entries: Sequence[Entry]) -> list[Entry]:
    """The entries, arm by arm as they are told of here."""
    order = {name: place for place, name in enumerate(ARMS)}
    return sorted(entries, key=lambda entry: order.get(entry.arm, -1))


def read(entries: Sequence[Entry], task: str, along: str | None = KEPT) -> list[Reading]:
    """What every arm keeps at each level: settings are chosen by their stories; None: by each score for itself."""
    return at_matched_learning(entries, LEARNT, SHOWN, TASKS[task].levels, kinds=KINDS, along=along, draws=DRAWS)


def named(score: str) -> str:
    """A score's name within a sentence."""
    title = KINDS[score].title
    return within(title) if title.startswith(("Target", "Story", "Loss")) else title


def pair(readings: Sequence[Reading], mine: str, theirs: str, score: str, level: float) -> Comparison:
    """One arm against another."""
    [found] = compare([reading(readings, arm, score, level) for arm in (mine, theirs)], theirs, kinds=KINDS)
    return found


def step_seconds(entries: Sequence[Entry]) -> dict[str, float]:
    """By arm, CPU seconds of a step of training: the mean over whole runs."""
    each: dict[str, dict[str, float]] = {}
    for entry in entries:
        if entry.arm != BASE:  # of a run the last entry counts
            each.setdefault(entry.arm, {})[entry.run] = entry.cost["train_cpu_seconds"] / entry.cost["steps"]
    return {arm: fmean(seconds.values()) for arm, seconds in each.items()}


@dataclass(frozen=True)
class Share:
    """How much of a rival's rise of the story loss an arm has: the mean over seeds of its logarithm, and its interval.

    Attributes:
        value: (mine - base) / (theirs - base); NaN where no seed has both, or where the rival's own rise is within
            noise.
        low: where the interval begins; zero with one seed.
        high: where it ends.
    """

    value: float
    low: float
    high: float

    def met(self, bar: float) -> str:
        """Whether the share is at most the bar."""
        if math.isnan(self.value):
            return "not reached"
        return "missed" if self.value > bar else "met" if self.high <= bar else "met on average, not beyond noise"


def share_of_rise(one: Comparison, base: Score) -> Share:
    """An arm's share of its rival's rise, paired by seed, over resamplings of the same items."""
    if not one.seeds:
        return Share(math.nan, math.nan, math.nan)
    start = resample(base, KEPT, BASE, DRAWS)
    mine, theirs = (np.stack([each.samples[seed] for seed in one.seeds]) - start for each in (one.arm, one.baseline))
    if len(one.seeds) > 1 and interval(theirs)[1] <= 0:
        return Share(math.nan, math.nan, math.nan)
    logs = np.log(np.maximum(mine, SMALLEST)) - np.log(np.maximum(theirs, SMALLEST))
    value, low, high = map(math.exp, np.clip(interval(logs), -99, 99))
    return Share(value, low, high)


def neighbours(found: Sequence[Point], arm: str, seed: int, level: float) -> tuple[Point | None, Point | None]:
    """The points of an arm's front next to a level: the one that has learnt no more, and the one that has no less."""
    members = [point for point in front(found, arm, seed, [LEARNT, KEPT], KINDS) if point.arm == arm]
    less = [point for point in members if point.reported[LEARNT].value >= level]
    more = [point for point in members if point.reported[LEARNT].value <= level]
    return (less or [None])[0], (more or [None])[-1]  # members go from low to high loss


def around(entries: Sequence[Entry], arm: str, level: float) -> list[str]:
    """The settings of the points between which an arm is read at a level, those of most seeds first."""
    found, told = points(entries), Counter[str]()
    for seed in sorted({point.seed for point in found if point.arm == arm}):
        for point in filter(None, neighbours(found, arm, seed, level)):
            settings = point.settings
            told[f"rate {settings['learning_rate']:g}, {settings['steps']} steps, scale {settings['scale']:g}"] += 1
    return [name for name, _ in told.most_common()]


def bounds(entries: Sequence[Entry], level: float, base: Score) -> Share:
    """Self-replay's share of plain LoRA's rise without a line between points, which wrongs whoever has fewer of them.

    Of self-replay's front the next point that has learnt at least as much is read, of plain LoRA's the next that has
    learnt no more: the true share is below, if fronts fall without turning back.
    """
    found = points(entries)
    logs = []
    for seed in sorted({point.seed for point in found if point.arm == PLAIN}):
        _, mine = neighbours(found, REPLAY, seed, level)
        theirs, _ = neighbours(found, PLAIN, seed, level)
        if mine is None or theirs is None:
            return Share(math.nan, math.nan, math.nan)
        rises = [max(point.reported[KEPT].value - base.value, SMALLEST) for point in (mine, theirs)]
        logs.append([math.log(rises[0] / rises[1])])
    value, low, high = map(math.exp, np.clip(interval(np.array(logs)), -99, 99))
    return Share(value, low, high)
