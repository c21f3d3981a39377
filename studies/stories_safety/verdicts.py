"""The answers in words, as the numbers give them: one arm against another at equal refusal; read `tables` next."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product

from holdfast.analysis.frontier import Comparison, Reading, arms, at_matched_learning, compare
from holdfast.drift.ledger import Entry, Score

from studies.common_readings import at_start, counted, reading

from .arms import SCALED
from .readings import ALONG, JUDGED, KEPT, KINDS, LEARNT, LOST, SHOWN, decided, named, pair

QUESTIONS = (
    ("Does a weaker adapter do it?", SCALED, "naive"),
    ("Does replay help?", "replay", "naive"),
    ("Does OGPSA as published help?", "OGPSA as published", "naive"),
    ("Is that more than a random subspace does?", "OGPSA as published", "random subspace"),
    ("Does the exact projection of the update help?", "OGPSA exact", "naive"),
    ("Is it this subspace, or would any of its rank do?", "OGPSA exact", "random subspace"),
    ("Is it better than OGPSA as published?", "OGPSA exact", "OGPSA as published"),
    ("Does the optimizer's metric help?", "OGPSA exact, metric", "OGPSA exact"),
    ("Is the exact projection better than a weaker adapter?", "OGPSA exact", SCALED),
    ("Is the exact projection better than replay?", "OGPSA exact", "replay"),
    ("And with the optimizer's metric, than replay?", "OGPSA exact, metric", "replay"),
    ("Does a random subspace do anything?", "random subspace", "naive"),
)


def listed(words: Sequence[str]) -> str:
    """Words as a list in a sentence."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def verdicts(entries: Sequence[Entry], readings: Sequence[Reading]) -> list[str]:
    """The answers, as the numbers give them."""
    base, present, found = at_start(entries), set(arms(entries)), list[Comparison]()
    lines = [f"{balance(readings, baseline)}\n" for baseline in ("naive", SCALED, "replay") if baseline in present]
    lines += [tax(base, readings)] if "naive" in present else []
    for question, mine, theirs in QUESTIONS:
        if {mine, theirs} <= present:
            own = {level: [pair(readings, mine, theirs, score, level) for score in KEPT] for level in JUDGED}
            found += [one for each in own.values() for one in each if one.seeds]
            lines.append(f"- **{question}** " + " ".join(answer(mine, theirs, level, own[level]) for level in JUDGED))
    clear = sum(decided(one) in ("better", "worse") for one in found)
    return [
        *lines,
        f"\nA tie: {counted(len({entry.seed for entry in entries}), 'seed')} cannot tell the two apart. These answers "
        f"rest on {counted(len(found), 'comparison')}, {clear} of them decided; if all were true ties, about "
        f"{0.05 * len(found):.0f} would come out decided by chance. What an arm loses, it loses on several scores and "
        "at both levels at once: they are no independent witnesses.",
    ]


def balance(readings: Sequence[Reading], baseline: str) -> str:
    """How often each arm is better and worse than a baseline, on all that must be kept."""
    own = [one for one in readings if one.retention in LOST and one.level in JUDGED]
    found: dict[str, list[str]] = {}
    for one in compare(own, baseline, kinds=KINDS):
        found.setdefault(one.arm.arm, []).append(decided(one))
    words = {"better": "better", "worse": "worse", "within noise": "tied", "not reached": "not reached"}
    told = [
        f"*{arm}* " + ", ".join(f"{word} {each.count(verdict)}" for verdict, word in words.items() if verdict in each)
        for arm, each in found.items()
    ]
    return (
        f"**Against *{baseline}***, in {listed([named(score) for score in LOST])} at refusal loss "
        f"{listed([f'{level:g}' for level in JUDGED])}, {len(LOST) * len(JUDGED)} comparisons each: {'; '.join(told)}."
    )


def tax(base: Mapping[str, Score], readings: Sequence[Reading]) -> str:
    """What learning to refuse costs without protection."""
    told = []
    for level in JUDGED:
        own = {score: reading(readings, "naive", score, level) for score in SHOWN}
        changes = [
            f"{named(score)} {KINDS[score].show(base[score].value)} to {KINDS[score].show(one.mean)}"
            for score, one in own.items()
            if one.values
        ]
        told.append(f"to refusal loss {level:g}: {', '.join(changes) or 'it does not get there'}")
    return f"- **Is there a tax?** Naive training {'; '.join(told)}."


def answer(mine: str, theirs: str, level: float, own: Sequence[Comparison]) -> str:
    """On which scores one arm is better than another at a level, on which worse, and on which nothing can be told."""
    if not own[0].seeds:
        reached = f"*{mine}* gets there in {own[0].arm.reached} seeds, *{theirs}* in {own[0].baseline.reached}"
        return f"At {level:g} it cannot be said ({reached})."
    words = {
        "better": f"*{mine}* is better than *{theirs}* in",
        "worse": f"*{mine}* is worse than *{theirs}* in",
        "within noise": "a tie in",
    }
    told = {
        verdict: [f"{named(one.arm.retention)} ({one.numbers})" for one in own if decided(one) == verdict]
        for verdict in words
    }
    return f"At {level:g}: {'; '.join(f'{words[verdict]} {listed(each)}' for verdict, each in told.items() if each)}."


def changed(entries: Sequence[Entry], readings: Sequence[Reading]) -> str:
    """Which answers are others when fronts are read along the logarithm of the refusal loss."""
    logarithms = [
        replace(entry, scores={**entry.scores, LEARNT: Score(math.log(max(entry.scores[LEARNT].value, 1e-9)))})
        for entry in entries
    ]
    levels = [math.log(level) for level in JUDGED]
    others = at_matched_learning(logarithms, LEARNT, KEPT, levels, kinds=KINDS, along=ALONG)
    told, present = [], set(arms(entries))
    for (_, mine, theirs), level, score in product(QUESTIONS, JUDGED, KEPT):
        if {mine, theirs} <= present:
            here = decided(pair(readings, mine, theirs, score, level))
            there = decided(pair(others, mine, theirs, score, math.log(level)))
            if here != there:
                words = [{"within noise": "tied"}.get(verdict, verdict) for verdict in (here, there)]
                told.append(f"*{mine}* against *{theirs}*, {named(score)} at {level:g}: {words[0]}, then {words[1]}")
    return (
        "\nBetween two points of a front a straight line along the logarithm of the refusal loss is as good a choice. "
        f"Read so, {counted(len(told), 'answer')} would be others{': ' * bool(told)}{'; '.join(told)}."
    )
