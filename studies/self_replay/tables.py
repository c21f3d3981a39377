"""The tables of the page: what each arm keeps, self-replay against each rival, speed, cost; read `page` next."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, median

from holdfast.analysis.frontier import Comparison, Reading, arms
from holdfast.analysis.points import settings_tried
from holdfast.drift.ledger import Entry

from studies.common_readings import at_start, cell, counted, reading

from .arms import ARMS, PLAIN, REPLAY
from .readings import JUDGED, KINDS, LEVELS, SHOWN, named, pair
from .speed import steps_to

MARKS = {"better": "✓ ", "worse": "✗ ", "within noise": "", "not reached": ""}


def matched_rows(entries: Sequence[Entry], readings: Sequence[Reading], level: float) -> list[dict[str, str]]:
    """One row for each arm: what it keeps at this level, with the 95 % interval over seeds and items."""
    base = at_start(entries)
    first = {"arm": "*base model*", "seeds": ""}
    rows = [first | {named(score): KINDS[score].show(base[score].value) for score in SHOWN}]
    for arm in arms(entries):
        own = [reading(readings, arm, score, level) for score in SHOWN]
        cells = {named(one.retention): cell(one, KINDS[one.retention], level) for one in own}
        rows.append({"arm": arm, "seeds": own[0].reached} | cells)
    return rows


def rival_rows(entries: Sequence[Entry], readings: Sequence[Reading], level: float) -> list[dict[str, str]]:
    """One row for each rival: self-replay against it in every score that is judged, at this level."""
    rows = []
    for rival in arms(entries):
        if rival != REPLAY:
            pairs = [pair(readings, REPLAY, rival, score, level) for score in JUDGED]
            cells = {named(one.arm.retention): MARKS[one.verdict] + one.numbers for one in pairs}
            rows.append({"self-replay against": rival, "seeds": str(len(pairs[0].seeds))} | cells)
    return rows


def overview_rows(found: Mapping[str, tuple[Sequence[Entry], Sequence[Reading]]]) -> list[dict[str, str]]:
    """One row for each rival: in how many scores self-replay is better and worse, for every scenario and level."""
    present = dict.fromkeys(arm for entries, _ in found.values() for arm in arms(entries) if arm != REPLAY)
    rows = []
    for rival in present:
        row = {"self-replay against": rival}
        for scenario, (entries, readings) in found.items():
            both = {rival, REPLAY} <= {*arms(entries)}
            for level in LEVELS[scenario]:
                pairs = [pair(readings, REPLAY, rival, score, level) for score in JUDGED] if both else []
                row[f"{scenario} at {level:g}"] = tally(pairs)
        rows.append(row)
    return rows


def tally(pairs: Sequence[Comparison]) -> str:
    """How many comparisons are better, worse and neither; with how few seeds, if not with all."""
    verdicts = [one.verdict for one in pairs if one.seeds]
    if not verdicts:
        return "–"
    seeds, most = min(len(one.seeds) for one in pairs), max(len(one.arm.seeds) for one in pairs)
    ties = verdicts.count("within noise")
    few = f" ({counted(seeds, 'seed')})" * (seeds < most)
    return f"{verdicts.count('better')} ✓ {verdicts.count('worse')} ✗ {ties} ={few}"


def speed_rows(entries: Sequence[Entry], scenario: str) -> list[dict[str, str]]:
    """One row for each arm: steps until it has learnt as much, and the task sequences that it has seen by then."""
    rows = []
    for arm in arms(entries):
        row = {"arm": arm}
        for level in LEVELS[scenario]:
            found = steps_to(entries, arm, level)
            known = [steps for steps in found.values() if math.isfinite(steps)]
            said = f"{fmean(known):.0f} ({min(known):.0f} to {max(known):.0f})" if known else "–"
            row[f"steps to {level:g}"] = said + f", {len(known)} of {len(found)} seeds" * (len(known) < len(found))
            if level == LEVELS[scenario][-1]:
                row[f"task sequences to {level:g}"] = f"{fmean(known) * ARMS[arm].task_rows:.0f}" if known else "–"
        rows.append(row)
    return rows


def cost_rows(entries: Sequence[Entry], timed: Sequence[Entry]) -> list[dict[str, str]]:
    """One row for each arm: what was tried, and CPU seconds of a training as `cost` timed them."""
    tried = settings_tried(entries)

    def seconds(arm: str, score: str) -> float:
        return median([entry.scores[score].value for entry in timed if entry.arm == arm] or [math.nan])

    def shown(value: float, how: str) -> str:
        return "–" if math.isnan(value) else format(value, how)

    rows = []
    for arm in arms(entries):
        own = {(e.settings["learning_rate"], e.settings.get("strength")) for e in entries if e.arm == arm}
        mine = seconds(arm, "cpu_seconds")
        rows.append(
            {
                "arm": arm,
                "rates and strengths": str(len(own)),
                "settings": str(tried[arm][1]),
                "CPU seconds a run": shown(mine, ".1f"),
                "against plain LoRA": shown(mine / seconds(PLAIN, "cpu_seconds"), ".2f"),
                "CPU seconds before it": shown(seconds(arm, "before_cpu_seconds"), ".1f"),
            }
        )
    return rows
