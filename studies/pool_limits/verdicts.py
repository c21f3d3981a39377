"""The answers in words, as the numbers give them: what is kept, lost, helps, at what price; read `short`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean

from holdfast.analysis.frontier import Comparison, Reading, arms
from holdfast.drift.ledger import Entry, Score

from studies.common_readings import at_start, reading

from .arms import (
    CHAT,
    DECAY,
    NO_FACTS,
    NO_LISTS,
    NO_REFUSALS,
    NOISE,
    NOT_EVEN_SOFTLY,
    OTHER,
    PLAIN,
    PROMPT_KL,
    ROWS,
    SCENARIOS,
    SHORT,
    SMALL,
    TEXT,
    TINY,
    WHOLE,
)
from .readings import JUDGED, KINDS, headed, judged_at, named, pair

Found = tuple[Sequence[Entry], Sequence[Reading]]
REFUSALS = ("refusal", "refusal_nll", "loss.system.refusal")
REMOVED: Mapping[str, tuple[str, ...]] = {
    NO_REFUSALS: REFUSALS,
    NOT_EVEN_SOFTLY: REFUSALS,
    NO_FACTS: ("skill.fact", "skill.fact_nll"),
    NO_LISTS: ("skill.copy_nll", "skill.reverse_nll", "skill.sort_nll", "rare", "rare_nll"),
    NOISE: ("skills", "skills_nll", "rare_nll", "benign_nll"),
    TEXT: (*REFUSALS, "skills", "skills_nll", "rare_nll"),
    CHAT: ("text_nll", "kl.plain"),
}
"""What each pool never shows, and the scores that tell whether it was kept."""
ADDITIONS = (NOISE, PROMPT_KL, DECAY, ROWS)
SIZES = (TINY, SMALL, SHORT, OTHER)


def have(found: Found, *names: str) -> bool:
    """Whether all of these arms were run."""
    return {*names} <= {*arms(found[0])}


def levels_of(readings: Sequence[Reading], arm: str, score: str, level: float) -> str:
    """The mean of an arm at a level, or a dash."""
    one = reading(readings, arm, score, level)
    return KINDS[score].show(one.mean) if one.values else "–"


def versus(one: Comparison) -> str:
    """One comparison in words."""
    word = {"better": "better than", "worse": "worse than", "within noise": "within noise of"}
    if one.verdict not in word:
        return f"not comparable with *{one.baseline.arm}* (too few seeds get there)"
    return f"{word[one.verdict]} *{one.baseline.arm}* ({one.numbers})"


def told(found: Found, arm: str, score: str, level: float) -> str:
    """One score of one arm, beside those of the base, of no pool and of the whole pool."""
    entries, readings = found
    base = at_start(entries)[score]
    others = f"base {KINDS[score].show(base.value)}, {PLAIN} {levels_of(readings, PLAIN, score, level)}"
    if arm != WHOLE:
        others += f", {WHOLE} {levels_of(readings, WHOLE, score, level)}"
    against = [versus(pair(readings, arm, other, score, level)) for other in (WHOLE, PLAIN) if other != arm]
    further = SCENARIOS["shift"].levels[0]
    against.append(f"at task loss {further:g} {versus(pair(readings, arm, PLAIN, score, further))}")
    return f"{named(score)} {levels_of(readings, arm, score, level)} ({others}): {', '.join(against)}"


def against(readings: Sequence[Reading], mine: str, theirs: str, scores: Sequence[str], level: float) -> str:
    """On which scores one arm is better than another, on which worse, and on which nothing can be told."""
    return sorted_out([pair(readings, mine, theirs, score, level) for score in scores])


def sorted_out(found: Sequence[Comparison]) -> str:
    """Comparisons, put together by their verdict."""
    words = {
        "better": "better in",
        "worse": "worse in",
        "within noise": "no difference beyond noise in",
        "not reached": "not comparable in",
    }
    lines = []
    for verdict, word in words.items():
        some = [one for one in found if one.verdict == verdict]
        numbers = [named(one.arm.retention) + (f" ({one.numbers})" if one.seeds else "") for one in some]
        lines += [f"{word} {', '.join(numbers)}"] if some else []
    return "; ".join(lines)


def fate(readings: Sequence[Reading], arm: str, scores: Sequence[str], levels: Sequence[float]) -> str:
    """Whether what a pool never shows is kept as with the whole pool, at the last level, and better than with none."""
    told: dict[str, list[str]] = {}
    for score in scores:
        verdict = pair(readings, arm, WHOLE, score, levels[-1]).verdict
        word = {"within noise": "as with", "better": "better than with", "worse": "worse than with"}.get(verdict)
        told.setdefault(f"{word} the whole pool", []).extend([named(score)] if word else [])
    for score in scores:
        at = {level: pair(readings, arm, PLAIN, score, level).verdict for level in levels}
        for verdict in ("better", "worse"):
            if where := [f"{level:g}" for level, each in at.items() if each == verdict]:
                told.setdefault(f"{verdict} than with no pool", []).append(f"{named(score)} (at {', '.join(where)})")
        if not {"better", "worse"} & {*at.values()} and "within noise" in at.values():
            told.setdefault("not to be told from no pool", []).append(named(score))
    return (
        "; ".join(f"{word}: {', '.join(some)}" for word, some in told.items() if some) or "too few seeds learn as much"
    )


def closed(readings: Sequence[Reading], arm: str, score: str, level: float) -> float:
    """The share of the gap between plain text and the whole pool that an addition closes; NaN if there is none."""
    text, whole, mine = (reading(readings, name, score, level).values for name in (TEXT, WHOLE, arm))
    seeds = text.keys() & whole.keys() & mine.keys()
    if not seeds or pair(readings, TEXT, WHOLE, score, level).verdict != "worse":
        return math.nan
    a, b, c = (fmean(_scaled(values[seed], score) for seed in seeds) for values in (text, whole, mine))
    return (a - c) / (a - b)


def _scaled(value: float, score: str) -> float:
    return math.log(max(value, 1e-6)) if KINDS[score].ratio else value


def forgone(base: Score, readings: Sequence[Reading], arm: str, score: str, level: float) -> tuple[float, Comparison]:
    """The share of plain LoRA's gain on other text that an arm gives up, and the comparison behind it."""
    one = pair(readings, arm, PLAIN, score, level)
    mine, theirs = one.means
    gain = base.value - theirs
    return ((mine - theirs) / gain if one.seeds and gain > 0 else math.nan), one


def never_shown(found: Found) -> Iterator[str]:
    """The answers to: what was never in the pool?"""
    for arm, scores in REMOVED.items():
        if have(found, arm, WHOLE, PLAIN):
            lines = [told(found, arm, score, judged_at("shift")) for score in scores]
            yield "\n".join([f"- **{headed(arm)}**", *[f"    - {line}" for line in lines]])


def additions(found: Found) -> Iterator[str]:
    """The answers to: which cheap addition to a pool of plain text closes its gap?"""
    readings, level = found[1], judged_at("shift")
    for arm in (arm for arm in ADDITIONS if have(found, arm, TEXT, WHOLE)):
        shares = {score: closed(readings, arm, score, level) for score in JUDGED}
        numbers = [f"{named(score)} {share:.0%}" for score, share in shares.items() if not math.isnan(share)]
        yield (
            f"- **{headed(arm)}.** Gap closed: {', '.join(numbers) or 'there is none to close'}. "
            f"Against *{TEXT}*: {against(readings, arm, TEXT, JUDGED, level)}. Against *{WHOLE}*: "
            f"{against(readings, arm, WHOLE, JUDGED, level)}."
        )


def sizes(found: Found) -> Iterator[str]:
    """The answers to: how large, how long, which?"""
    for arm in (arm for arm in SIZES if have(found, arm, WHOLE)):
        line = against(found[1], arm, WHOLE, JUDGED, judged_at("shift"))
        yield f"- **{headed(arm)}.** Against *{WHOLE}*: {line}."


def price(found: Mapping[str, Found]) -> Iterator[str]:
    """How much of what plain tuning gains on other text is given up, where it gains at all."""
    for scenario, score in (("shift", "wording_nll"), ("second", "wording_nll"), ("second", "loss.statement.flags")):
        if scenario not in found or not have(found[scenario], WHOLE, PLAIN):
            continue
        entries, readings = found[scenario]
        base, level = at_start(entries)[score], judged_at(scenario)
        share, one = forgone(base, readings, WHOLE, score, level)
        if math.isnan(share):
            yield f"{named(score)} in *{scenario}*: plain LoRA gains nothing there, or it cannot be compared."
            continue
        show = KINDS[score].show
        mine, theirs = one.means
        yield (
            f"{named(score)} in *{scenario}*: base {show(base.value)}, {PLAIN} {show(theirs)}, {WHOLE} {show(mine)}; "
            f"{share:.0%} of the gain given up ({one.verdict}, {one.numbers})."
        )
