"""All of it in a few lines: what is kept though never shown, what is lost, what helps, at what price; read `page`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean

from holdfast.analysis.frontier import Reading
from holdfast.drift.ledger import Entry

from studies.common_readings import at_start, counted, reading

from .arms import NO_LISTS, NO_REFUSALS, NOISE, NOT_EVEN_SOFTLY, PLAIN, SCENARIOS, SLOWER, TEXT, WHOLE
from .formats import FORMATS
from .readings import JUDGED, KINDS, headed, judged_at, named, pair
from .verdicts import (
    ADDITIONS,
    REMOVED,
    SIZES,
    Found,
    against,
    closed,
    fate,
    have,
    levels_of,
    price,
    sorted_out,
    versus,
)

UNSEEN = tuple(form for form in FORMATS if form != "chat")


def in_short(found: Mapping[str, Found], pools: Sequence[Entry]) -> list[str]:
    """What all of it says together."""
    lines = [*named_in_full(found["shift"], pools), *of_the_pool(found["shift"])] if "shift" in found else []
    for scenario in ("long", "rank", "dense"):
        if scenario in found and have(found[scenario], WHOLE, PLAIN):
            line = against(found[scenario][1], WHOLE, PLAIN, JUDGED, judged_at(scenario))
            lines.append(f"- **{SCENARIOS[scenario].title}:** the whole pool against plain LoRA: {line}.")
    return lines + [f"- **The price:** {line}" for line in price(found)]


def named_in_full(found: Found, pools: Sequence[Entry]) -> Iterator[str]:
    """The two that matter most, in numbers: refusals, and a skill that the base hardly ever shows."""
    level, base = judged_at("shift"), at_start(found[0])
    start = {score: KINDS[score].show(base[score].value) for score in ("refusal", "refusal_nll", "rare_nll")}
    there = [arm for arm in (PLAIN, WHOLE, SLOWER, NO_REFUSALS, NOT_EVEN_SOFTLY, NOISE, TEXT) if have(found, arm)]
    for place in sorted(SCENARIOS["shift"].levels, reverse=True):
        told = [f"*{arm}* {of(found, arm, 'refusal', place)} ({of(found, arm, 'refusal_nll', place)})" for arm in there]
        yield (
            f"- **Unseen forbidden prompts refused** (refusal loss) at task loss {place:g}: base {start['refusal']} "
            f"({start['refusal_nll']}), {', '.join(told)}."
        )
    shown = {entry.arm: entry.scores["rare"].value for entry in pools}
    if WHOLE in shown and have(found, WHOLE, PLAIN, NO_LISTS):
        numbers = [
            f"*{arm}* {of(found, arm, 'rare_nll', level)}"
            for arm in (PLAIN, WHOLE, SLOWER, NO_LISTS)
            if have(found, arm)
        ]
        yield (
            f"- **The lab's rare skill** is shown in {shown[WHOLE]:g} of the sequences of the whole pool, in "
            f"{shown.get(NO_LISTS, 0):g} of *{NO_LISTS}*. Its loss: base {start['rare_nll']}, {', '.join(numbers)}; "
            f"the whole pool is {versus(pair(found[1], WHOLE, PLAIN, 'rare_nll', level))}, *{NO_LISTS}* is "
            f"{versus(pair(found[1], NO_LISTS, WHOLE, 'rare_nll', level))}."
        )


def of(found: Found, arm: str, score: str, level: float) -> str:
    """The mean of an arm at a level, and how many seeds reach it, where not all do."""
    one = reading(found[1], arm, score, level)
    missed = f", {one.reached}" if len(one.values) < len(one.seeds) else ""
    return levels_of(found[1], arm, score, level) + missed


def of_the_pool(found: Found) -> Iterator[str]:
    """What is kept though never shown, what is lost, which addition helps, and whether size matters."""
    readings, level = found[1], judged_at("shift")
    if have(found, SLOWER, WHOLE, PLAIN):
        lines = [f"against *{rival}*: {against(readings, SLOWER, rival, JUDGED, level)}" for rival in (PLAIN, WHOLE)]
        yield f"- **{headed(SLOWER)}:** {'; '.join(lines)}."
    for arm in (arm for arm in REMOVED if have(found, arm, WHOLE, PLAIN)):
        yield f"- **What *{arm}* never shows:** {fate(readings, arm, REMOVED[arm], SCENARIOS['shift'].levels)}."
    for arm in (arm for arm in ADDITIONS if have(found, arm, TEXT, WHOLE)):
        yield f"- **{headed(arm)}** {in_a_word(readings, arm, level)}."
    if have(found, WHOLE, PLAIN):
        forms = [pair(readings, WHOLE, PLAIN, f"kl.{form}", level) for form in UNSEEN]
        yield f"- **Formats that no data has**, the whole pool against plain LoRA: {sorted_out(forms)}."
    for arm in (arm for arm in SIZES if have(found, arm, WHOLE)):
        verdicts = [pair(readings, arm, WHOLE, score, level).verdict for score in JUDGED]
        yield (
            f"- **{headed(arm)}** against the whole pool: worse beyond noise in {verdicts.count('worse')}, "
            f"better in {verdicts.count('better')} of {counted(len(verdicts), 'score')}."
        )


def in_a_word(readings: Sequence[Reading], arm: str, level: float) -> str:
    """How much of the gap an addition closes, and what is left of it."""
    shares = {score: closed(readings, arm, score, level) for score in JUDGED}
    shares = {score: share for score, share in shares.items() if not math.isnan(share)}
    if not shares:
        return "has no gap beyond noise to close"
    left = [named(score) for score in shares if pair(readings, arm, WHOLE, score, level).verdict == "worse"]
    return (
        f"closes {fmean(shares.values()):.0%} of the gap between plain text and the whole pool (mean over "
        f"{counted(len(shares), 'score')} with a gap beyond noise); of these still worse than the whole pool: "
        f"{', '.join(left) or 'none'}"
    )
