"""The tables of the page: what each arm keeps, against the best rivals, at what cost; read `page` next."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

from holdfast.analysis.frontier import Reading, arms
from holdfast.analysis.points import BASE, settings_tried
from holdfast.drift.ledger import Entry

from studies.common_readings import at_start, cell, reading

from .arms import DECAY, PLAIN
from .readings import JUDGED, JUDGED_AT, KINDS, SHOWN, named, pair, share_of_drift


def matched_rows(
    entries: Sequence[Entry], readings: Sequence[Reading], scenario: str, level: float
) -> list[dict[str, str]]:
    """One row for each arm: what it keeps at this level, with the 95 % interval over seeds and items."""
    base = at_start(entries)
    first = {"arm": "*base model*", "seeds": ""}
    rows = [first | {named(score): KINDS[score].show(base[score].value) for score in SHOWN[scenario]}]
    for arm in arms(entries):
        own = [reading(readings, arm, score, level) for score in SHOWN[scenario]]
        cells = {named(one.retention): cell(one, KINDS[one.retention], level) for one in own}
        rows.append({"arm": arm, "seeds": own[0].reached} | cells)
    return rows


def drift_rows(entries: Sequence[Entry], readings: Sequence[Reading], scenario: str) -> list[dict[str, str]]:
    """One row for each arm: its share of the drift of the best plain run and of the best update decay."""
    base, level, rows = at_start(entries), JUDGED_AT[scenario], []
    for arm in arms(entries):
        row = {"arm": arm}
        for rival in (rival for rival in (PLAIN, DECAY) if rival in arms(entries)):
            for score in JUDGED[scenario]:
                column = f"{named(score)} / {rival}"
                if arm == rival:
                    row[column] = "1"
                    continue
                one = pair(readings, arm, rival, score, level)
                found = share_of_drift(one, base[score])
                mark = {"better": " ✓", "worse": " ✗"}.get(one.verdict, "")
                strong = "**" if found.verdict == "yes" else ""
                row[column] = "–" if math.isnan(found.share) else f"{strong}{found.share:.2f}{strong}{mark}"
        rows.append(row)
    return rows


def cost_rows(entries: Sequence[Entry], timed: Sequence[Entry]) -> list[dict[str, str]]:
    """One row for each arm: what was tried, and CPU seconds of a training as `cost` timed them."""
    tried, seconds = settings_tried(entries), dict[str, list[float]]()
    for entry in timed:
        seconds.setdefault(entry.arm, []).append(entry.scores["cpu_seconds"].value)
    plain = median(seconds.get(PLAIN, [math.nan]))
    rows = []
    for arm in arms(entries):
        own = [entry for entry in entries if entry.arm == arm and entry.arm != BASE]
        mine = median(seconds.get(arm, [math.nan]))
        rows.append(
            {
                "arm": arm,
                "strengths or rates": str(
                    len({(e.settings["learning_rate"], e.settings.get("strength")) for e in own})
                ),
                "settings": str(tried[arm][1]),
                "CPU seconds a run": "–" if math.isnan(mine) else f"{mine:.1f}",
                "against plain LoRA": "–" if math.isnan(mine / plain) else f"{mine / plain:.2f}",
            }
        )
    return rows
