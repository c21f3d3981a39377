"""The answers in words, as the numbers give them: what does self-replay keep, against whom? Read `page` next."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean

from holdfast.analysis.frontier import Comparison, Reading, arms
from holdfast.drift.ledger import Entry

from studies.common_readings import at_start, counted, reading

from .arms import ARMS, DATA, DATA_SOFT, DECAY, FULL, HARD, MASKED, MASKED_PROMPT, PLAIN, REPLAY, REPLAY_PROMPT
from .readings import JUDGED, JUDGED_AT, KINDS, LEVELS, named, pair
from .speed import steps_to

Found = Mapping[str, tuple[Sequence[Entry], Sequence[Reading]]]  # by scenario
QUESTIONS = (
    ("Does it keep more than the best plain run?", REPLAY, PLAIN),
    ("More than update decay, which needs no data either?", REPLAY, DECAY),
    ("More than the full KL on the task's answers?", REPLAY, FULL),
    ("More than Target-Masked KL on them?", REPLAY, MASKED),
    ("More than Target-Masked KL with the KL on prompts?", REPLAY, MASKED_PROMPT),
    ("Do soft targets matter, or would the same sequences do as ordinary data?", REPLAY, HARD),
    ("Does the KL on the task's prompts add to it?", REPLAY_PROMPT, REPLAY),
    ("Does it fall short of true data, mixed into the batch?", REPLAY, DATA),
    ("Does it fall short of true data with soft targets?", REPLAY, DATA_SOFT),
)


def verdicts(entries: Sequence[Entry], readings: Sequence[Reading], scenario: str) -> list[str]:
    """The answers for one scenario, at the level that is judged."""
    present, lines = set(arms(entries)), [lost(entries, readings, scenario)]
    for question, mine, theirs in QUESTIONS:
        if {mine, theirs} <= present:
            lines.append(f"- **{question}** {answer(against(readings, mine, theirs, scenario))}")
    return lines


def against(readings: Sequence[Reading], mine: str, theirs: str, scenario: str) -> list[Comparison]:
    """One arm against another, on every score that is judged."""
    return [pair(readings, mine, theirs, score, JUDGED_AT[scenario]) for score in JUDGED]


def answer(found: Sequence[Comparison]) -> str:
    """On which scores one arm is better than another, on which worse, and on which nothing can be told."""
    if not any(one.seeds for one in found):
        mine, theirs = found[0].arm, found[0].baseline
        return f"Not reached: *{mine.arm}* learns as much in {mine.reached} seeds, *{theirs.arm}* in {theirs.reached}."
    told = []
    for verdict in ("better", "worse", "within noise", "not reached"):
        each = [f"{named(one.arm.retention)} ({one.numbers})" for one in found if one.verdict == verdict]
        told += [f"{verdict}: {', '.join(each)}"] if each else []
    fewest = min(len(one.seeds) for one in found)
    few = f" Only {counted(fewest, 'seed')} in which both get there." * (fewest < len(found[0].arm.seeds))
    return f"{'; '.join(told).capitalize()}.{few}"


def lost(entries: Sequence[Entry], readings: Sequence[Reading], scenario: str) -> str:
    """What the best plain run and self-replay lose at the level that is judged."""
    base, told = at_start(entries), []
    for arm in (arm for arm in (PLAIN, REPLAY) if arm in arms(entries)):
        own = [reading(readings, arm, score, JUDGED_AT[scenario]) for score in ("refusal", *JUDGED)]
        changes = [
            f"{named(one.retention)} {KINDS[one.retention].show(base[one.retention].value)} to "
            f"{KINDS[one.retention].show(one.mean)}"
            for one in own
            if one.values
        ]
        told.append(f"*{arm}* at its best: {', '.join(changes) or 'does not learn that much'}")
    return f"- **What is lost at task loss {JUDGED_AT[scenario]:g}?** {'; '.join(told)}."


def in_short(found: Found) -> list[str]:
    """What all scenarios say together."""
    lines = [f"- **{question}** {together(found, mine, theirs)}" for question, mine, theirs in QUESTIONS]
    return [headline(found), *lines, most(found), slower(found)]


def headline(found: Found) -> str:
    """How often self-replay is better and worse than rivals that run nothing beside the task, at all levels."""
    pairs = [
        pair(readings, REPLAY, rival, score, level)
        for scenario, (entries, readings) in found.items()
        for rival in (arm for arm in arms(entries) if not ARMS[arm].beside and REPLAY in arms(entries))
        for level in LEVELS[scenario]
        for score in JUDGED
    ]
    return f"- **Against everything that runs nothing beside the task,** at all levels together: {counts(pairs)}."


def counts(pairs: Sequence[Comparison]) -> str:
    """How many comparisons have each verdict, and in how many the first arm's mean is the better one, noise or not."""
    verdicts = [one.verdict for one in pairs]
    told = [f"{verdict} in {verdicts.count(verdict)}" for verdict in ("better", "worse", "within noise")]
    missed = verdicts.count("not reached")
    ahead = sum((one.difference > 0) == one.kind.higher_is_better for one in pairs if one.seeds)
    return (
        f"of {counted(len(pairs), 'comparison')} {', '.join(told)}{f', not reached in {missed}' * bool(missed)}; "
        f"its mean is the better one in {ahead}"
    )


def together(found: Found, mine: str, theirs: str) -> str:
    """In which scores of which scenarios one arm is better than another beyond noise, and in which worse."""
    pairs, told = list[Comparison](), {"better": list[str](), "worse": list[str]()}
    for scenario, (entries, readings) in found.items():
        for one in against(readings, mine, theirs, scenario) if {mine, theirs} <= {*arms(entries)} else ():
            pairs.append(one)
            if one.verdict in told:
                told[one.verdict].append(f"{named(one.arm.retention)} in *{scenario}* {one.numbers}")
    if not any(one.seeds for one in pairs):
        return "Nowhere do both learn as much in one seed." if pairs else "It was not run."
    shown = [f" {verdict.capitalize()}: {'; '.join(each)}." for verdict, each in told.items() if each]
    return f"{counts(pairs).capitalize()}.{''.join(shown)}"


def most(found: Found) -> str:
    """In how many scores self-replay has the best mean of all arms that need no data of what is to be kept."""
    told = []
    for scenario, (entries, readings) in found.items():
        fair = [arm for arm in arms(entries) if arm not in (DATA, DATA_SOFT, REPLAY_PROMPT)]
        places = []
        for score in JUDGED:
            means = {arm: reading(readings, arm, score, JUDGED_AT[scenario]).mean for arm in fair}
            known = {arm: mean for arm, mean in means.items() if not math.isnan(mean)}
            places.append(bool(known) and min(known, key=lambda arm: known[arm]) == REPLAY)
        told.append(f"{sum(places)} of {len(places)} in *{scenario}*")
    return (
        "- **Does it keep most of all arms that need no data?** It has the lowest mean loss, noise aside, in "
        f"{' and in '.join(told)} (its own form with the KL on prompts left out)."
    )


def slower(found: Found) -> str:
    """How many steps self-replay needs to learn as much as the level that is judged, against plain LoRA."""
    told = []
    for scenario, (entries, _) in found.items():
        both = []
        for arm in (arm for arm in (REPLAY, PLAIN) if arm in arms(entries)):
            steps = steps_to(entries, arm, JUDGED_AT[scenario])
            known = [each for each in steps.values() if math.isfinite(each)]
            said = f"{fmean(known):.0f} steps in {len(known)} of {len(steps)} seeds" if known else "not reached"
            both.append(f"*{arm}* {said}")
        told.append(f"in *{scenario}* to task loss {JUDGED_AT[scenario]:g} {', '.join(both)}")
    return f"- **Does it learn more slowly?** Each at its quickest setting, not scaled: {'; '.join(told)}."
