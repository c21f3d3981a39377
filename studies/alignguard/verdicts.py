"""The answers in words, as the numbers give them: which terms earn their place, is drift halved? Read `page` next."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import product

from holdfast.analysis.frontier import Comparison, Reading, arms
from holdfast.drift.ledger import Entry

from studies.common_readings import at_start, counted, reading

from .arms import DECAY, FULL, PAPER, PLAIN, PROJECTED, TERMS
from .readings import JUDGED, JUDGED_AT, KINDS, Share, named, pair, share_of_drift

QUESTIONS = (
    ("Does update decay, which knows nothing of alignment, help?", DECAY, PLAIN),
    ("Is the full form better than update decay?", FULL, DECAY),
    ("Is the paper's form better than update decay?", PAPER, DECAY),
    ("Is the full form better than the paper's?", FULL, PAPER),
    ("Does it need the skills and the text in its Fisher?", FULL, f"{FULL}, alignment only"),
    ("Is it this Fisher, or would any of its spectrum do?", FULL, f"{FULL}, rotated"),
    ("The same of the paper's form?", PAPER, f"{PAPER}, rotated"),
    ("Does the paper's form need the Fisher of refusals, or does that of text do?", PAPER, f"{PAPER}, text Fisher"),
    ("Are Kronecker factors better than a diagonal?", FULL, "EWC"),
    ("Does a pull on LoRA's factors do it?", "L2-SP", DECAY),
    ("Does O-LoRA's orthogonality do it?", "O-LoRA", DECAY),
    ("Does SafeLoRA's projection after training do it?", PROJECTED, PLAIN),
)
SHORT = ((FULL, DECAY), (FULL, PAPER), (FULL, "EWC"), (FULL, f"{FULL}, rotated"), (PAPER, DECAY))  # told first


def verdicts(entries: Sequence[Entry], readings: Sequence[Reading], scenario: str) -> list[str]:
    """The answers for one scenario."""
    present = set(arms(entries))
    lines = [drifts(entries, readings, scenario)] if PLAIN in present else []
    lines += [f"- **{line}" for line in halvings(entries, readings, scenario)]
    lines += [f"- **{line}" for line in earned(readings, scenario, present)]
    for question, mine, theirs in QUESTIONS:
        if {mine, theirs} <= present:
            lines.append(f"- **{question}** {answer(against(readings, mine, theirs, scenario))}")
    return lines


def against(readings: Sequence[Reading], mine: str, theirs: str, scenario: str) -> list[Comparison]:
    """One arm against another, on every score that is judged."""
    return [pair(readings, mine, theirs, score, JUDGED_AT[scenario]) for score in JUDGED[scenario]]


def answer(found: Sequence[Comparison]) -> str:
    """On which scores one arm is better than another, on which worse, and on which nothing can be told."""
    first = found[0]
    if not first.seeds:
        return (
            f"It cannot be said: *{first.arm.arm}* learns as much in {first.arm.reached} seeds, "
            f"*{first.baseline.arm}* in {first.baseline.reached}."
        )
    words = {"better": "better in", "worse": "worse in", "within noise": "no difference beyond noise in"}
    told = []
    for verdict, word in words.items():
        each = [f"{named(one.arm.retention)} ({one.numbers})" for one in found if one.verdict == verdict]
        told += [f"{word} {', '.join(each)}"] if each else []
    return f"*{first.arm.arm}* against *{first.baseline.arm}*: {'; '.join(told)}."


def drifts(entries: Sequence[Entry], readings: Sequence[Reading], scenario: str) -> str:
    """What the best plain run and the best update decay lose at the level that is judged."""
    base, told = at_start(entries), []
    for arm in (arm for arm in (PLAIN, DECAY) if arm in arms(entries)):
        own = [reading(readings, arm, score, JUDGED_AT[scenario]) for score in JUDGED[scenario]]
        changes = [
            f"{named(one.retention)} {KINDS[one.retention].show(base[one.retention].value)} to "
            f"{KINDS[one.retention].show(one.mean)}"
            for one in own
            if one.values
        ]
        told.append(f"*{arm}* at its best: {', '.join(changes) or 'does not learn that much'}")
    return f"- **What is lost at task loss {JUDGED_AT[scenario]:g}?** {'; '.join(told)}."


def halvings(entries: Sequence[Entry], readings: Sequence[Reading], scenario: str) -> Iterator[str]:
    """Whether both forms have half the drift of the best plain run, and of the best update decay."""
    present = arms(entries)
    for mine, rival in product((FULL, PAPER), (PLAIN, DECAY)):
        if {mine, rival} <= {*present}:
            told = []
            for score, found in shares(entries, readings, mine, rival, scenario).items():
                number = "" if math.isnan(found.share) else f", {found.share:.2f} of it"
                told.append(f"{named(score)}: {found.verdict}{number}")
            yield f"Does the {mine} halve the drift of the best {rival}?** {'; '.join(told).capitalize()}."


def shares(
    entries: Sequence[Entry], readings: Sequence[Reading], mine: str, rival: str, scenario: str
) -> dict[str, Share]:
    """By score that is judged, an arm's share of its rival's drift."""
    base = at_start(entries)
    found = against(readings, mine, rival, scenario)
    return {one.arm.retention: share_of_drift(one, base[one.arm.retention]) for one in found}


def place(readings: Sequence[Reading], scenario: str, term: str) -> str:
    """In a word, whether a term earns its place: the form without it is worse in a score, and better in none."""
    verdicts = [one.verdict for one in against(readings, f"without {term}", PAPER, scenario)]
    if set(verdicts) == {"not reached"}:
        return "not reached"
    if "better" in verdicts:
        return "mixed" if "worse" in verdicts else "harmful"
    return "yes" if "worse" in verdicts else "no difference"


def earned(readings: Sequence[Reading], scenario: str, present: set[str]) -> Iterator[str]:
    """For each term whether it earns its place: what is lost without it, and what it keeps alone."""
    for term in TERMS:
        without, alone = f"without {term}", f"{term} alone"
        if {PAPER, without, alone, PLAIN, DECAY} <= present:
            yield (
                f"Does the {term} term earn its place? {place(readings, scenario, term).capitalize()}.** "
                f"{answer(against(readings, without, PAPER, scenario))} "
                f"{answer(against(readings, alone, PLAIN, scenario))} "
                f"{answer(against(readings, alone, DECAY, scenario))}"
            )


def in_short(found: Mapping[str, tuple[Sequence[Entry], Sequence[Reading]]]) -> list[str]:
    """What all scenarios say together: how often drift is halved, and the place of each term in each."""
    lines = []
    for mine, rival in product((FULL, PAPER), (PLAIN, DECAY)):
        each = [
            share
            for scenario, (entries, readings) in found.items()
            if {mine, rival} <= {*arms(entries)}
            for share in shares(entries, readings, mine, rival, scenario).values()
        ]
        fair = [share for share in each if not math.isnan(share.share)]
        yes, average = (sum(share.verdict == word for share in fair) for word in ("yes", "on average"))
        lines.append(
            f"- **The {mine} against the best {rival}:** drift is halved beyond noise in {yes} of "
            f"{counted(len(fair), 'score')} in which {rival} drifts beyond noise, on average in {average} more."
        )
    lines += [f"- **{mine.capitalize()} against {theirs}:** {beyond(found, mine, theirs)}." for mine, theirs in SHORT]
    for term in TERMS:
        told = [
            f"{place(readings, scenario, term)} in *{scenario}*"
            for scenario, (entries, readings) in found.items()
            if {PAPER, f"without {term}"} <= {*arms(entries)}
        ]
        lines.append(f"- **Does the {term} term earn its place?** {'; '.join(told) or 'It was not left out'}.")
    return lines


def beyond(found: Mapping[str, tuple[Sequence[Entry], Sequence[Reading]]], mine: str, theirs: str) -> str:
    """In which scores of which scenarios one arm is better than another beyond noise, and in which worse."""
    told: dict[str, list[str]] = {"better": [], "worse": []}
    looks = 0
    for scenario, (entries, readings) in found.items():
        if {mine, theirs} <= {*arms(entries)}:
            pairs = [one for one in against(readings, mine, theirs, scenario) if one.seeds]
            looks += len(pairs)
            for one in pairs:
                if one.verdict in told:
                    told[one.verdict].append(f"{named(one.arm.retention)} in *{scenario}* ({one.numbers})")
    words = [f"{verdict} in {', '.join(each)}" for verdict, each in told.items() if each]
    return f"{'; '.join(words) or 'no difference beyond noise'}, of {counted(looks, 'comparison')}"
