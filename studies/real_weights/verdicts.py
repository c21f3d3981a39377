"""The answers in words, as the numbers give them: what keeps the stories, the bar, the price; read `tables` next."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from holdfast.analysis.frontier import Comparison, Reading, arms
from holdfast.drift.ledger import Entry

from studies.common_readings import at_start, counted, reading

from .arms import PLAIN, REPLAY, TASKS
from .readings import KEPT, KINDS, OTHERS, Share, around, bounds, named, pair, read, share_of_rise, step_seconds

Found = Mapping[str, tuple[Sequence[Entry], Sequence[Reading]]]  # by task


def in_short(found: Found) -> list[str]:
    """What all tasks say."""
    lines = []
    for task, (entries, readings) in found.items():
        lines += [f"- **{TASKS[task].title}.** {rises(entries, readings, task)}"]
        if {PLAIN, REPLAY} <= {*arms(entries)}:
            lines += [f"- **The bar.** {bar(entries, readings, task)}"] if TASKS[task].bar is not None else []
            name = TASKS[task].title.split(":")[0]
            lines += [f"- **The price, {name}.** {price(entries, task)}", f"- **The cost, {name}.** {cost(entries)}"]
    if any({PLAIN, REPLAY} <= {*arms(entries)} for entries, _ in found.values()):
        lines += [f"- **{REPLAY.capitalize()} against each other arm**, {against(found, REPLAY, mine_first=True)}"]
        lines += [f"- **Each other arm against {PLAIN}**, {against(found, PLAIN, mine_first=False)}"]
    return lines


def rises(entries: Sequence[Entry], readings: Sequence[Reading], task: str) -> str:
    """By how much the story loss of every arm rises at the level that is judged, the least first."""
    base, level = at_start(entries)[KEPT].value, TASKS[task].judged
    own = [reading(readings, arm, KEPT, level) for arm in arms(entries)]
    there = sorted((one for one in own if one.values), key=lambda one: one.mean)
    told = [f"*{one.arm}* {KINDS[KEPT].show(one.mean - base, signed=True)}" for one in there]
    absent = [f"*{one.arm}*" for one in own if not one.values]
    missing = f" Not reached by {', '.join(absent)}." if absent else ""
    return f"At target loss {level:g} the story loss of {base:.3f} rises by: {', '.join(told)}.{missing}"


def bar(entries: Sequence[Entry], readings: Sequence[Reading], task: str) -> str:
    """Whether self-replay's rise of the story loss is at most the bar's share of the best plain run's."""
    level, most = TASKS[task].judged, TASKS[task].bar or 0.0
    one, base = pair(readings, REPLAY, PLAIN, KEPT, level), at_start(entries)[KEPT]
    found, rough = share_of_rise(one, base), bounds(entries, level, base)
    asked = f"at target loss {level:g} at most {most:g} of the rise of the best *{PLAIN}* (rate, steps and scale swept)"
    if math.isnan(found.value):
        return f"Asked: {asked}. It cannot be said: {one.sentence()}"
    mine, theirs = one.means
    without = "" if math.isnan(rough.value) else (
        f" Without a line between points, the next point of {REPLAY} that has learnt more against the next of {PLAIN} "
        f"that has learnt less, the share is {shown(rough)}: {rough.met(most)}."
    )  # fmt: skip
    best = "; ".join(around(entries, PLAIN, level))
    return (
        f"Asked: {asked}. **{found.met(most).capitalize()}**: *{REPLAY}* "
        f"{KINDS[KEPT].show(mine - base.value, signed=True)}, *{PLAIN}* "
        f"{KINDS[KEPT].show(theirs - base.value, signed=True)}; the share is {shown(found)} over "
        f"{counted(len(one.seeds), 'seed')} and the items.{without} *{PLAIN}* is read between these settings, over all "
        f"seeds: {best}."
    )


def shown(share: Share) -> str:
    """A share with its interval."""
    if math.isnan(share.value):
        return "–"
    return f"{share.value:.2f}" + (f" [{share.low:.2f}, {share.high:.2f}]" if share.low > 1e-6 else "")


def price(entries: Sequence[Entry], task: str) -> str:
    """What plain tuning gains on texts that no pool covers, and how much of that self-replay gives up."""
    base, level, readings, told = at_start(entries), TASKS[task].judged, read(entries, task, along=None), []
    for score in OTHERS:
        one, start = pair(readings, REPLAY, PLAIN, score, level), base[score].value
        if not one.seeds:
            continue
        mine, theirs = one.means
        said = f"{named(score)} {start:.3f} before, *{PLAIN}* {theirs:.3f}, *{REPLAY}* {mine:.3f} ({one.numbers}): "
        given, noise = mine - theirs, "" if one.verdict == "worse" else ", within noise"
        if theirs >= start:
            said += "tuning makes it worse, so there is no gain to give up"
        elif given > 0:
            said += f"{given / (start - theirs):.0%} of a gain of {start - theirs:.3f} is given up{noise}"
        else:
            said += f"of a gain of {start - theirs:.3f} nothing is given up"
        told.append(said)
    return f"At target loss {level:g}, for each text the settings that are best for it: {'; '.join(told)}."


def cost(entries: Sequence[Entry]) -> str:
    """What a step costs against plain LoRA's."""
    seconds = step_seconds(entries)
    told = [f"*{arm}* {each / seconds[PLAIN]:.2f}" for arm, each in seconds.items() if arm != PLAIN]
    return f"CPU seconds of a step against *{PLAIN}*'s: {', '.join(told)}. In these runs the base ran in every step."


def against(found: Found, arm: str, *, mine_first: bool) -> str:
    """How one arm compares with every other in story loss, over all levels of all tasks.

    Args:
        found: by task, entries and readings.
        arm: the one.
        mine_first: whether the others are the baselines, or it is theirs.
    """
    names = [name for name in dict.fromkeys(n for entries, _ in found.values() for n in arms(entries)) if name != arm]
    levels = sum(len(TASKS[task].levels) for task in found)
    told = []
    for name in names:
        mine, theirs = (arm, name) if mine_first else (name, arm)
        own = [
            pair(readings, mine, theirs, KEPT, level)
            for task, (entries, readings) in found.items()
            if {mine, theirs} <= {*arms(entries)}
            for level in TASKS[task].levels
        ]
        told.append(f"*{name}*: {tally(own)}")
    return f"story loss at all {levels} levels: {'; '.join(told)}."


def tally(own: Sequence[Comparison]) -> str:
    """How many of these comparisons end in which verdict."""
    words = {"better": "better", "worse": "worse", "within noise": "tied", "not reached": "not reached"}
    verdicts = [one.verdict for one in own]
    return ", ".join(f"{word} {verdicts.count(v)}" for v, word in words.items() if v in verdicts)
