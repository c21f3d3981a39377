"""The tables of the page: what each arm keeps at equal target loss, against whom, at what cost; read `page` next."""

from __future__ import annotations

from collections.abc import Sequence

from holdfast.analysis.frontier import Comparison, Reading, arms
from holdfast.analysis.points import settings_tried
from holdfast.drift.ledger import Entry

from studies.common_readings import at_start, cell, reading

from .arms import PLAIN, REPLAY, TASKS
from .readings import KEPT, KINDS, LEARNT, SHOWN, named, pair, share_of_rise, step_seconds
from .verdicts import shown

WIDE = 0.25  # a line between two points of a front that bridges more than this share of the level is marked


def matched_rows(entries: Sequence[Entry], readings: Sequence[Reading], level: float) -> list[dict[str, str]]:
    """One row for each arm: what it keeps at this level, with the 95 % interval over seeds and items."""
    base = at_start(entries)
    first = {"arm": "*base model*", "seeds": "", "share of plain's rise": ""}
    rows = [first | {named(score): KINDS[score].show(base[score].value) for score in SHOWN}]
    for arm in arms(entries):
        own = [reading(readings, arm, score, level) for score in SHOWN]
        share = "1" if arm == PLAIN else shown(share_of_rise(pair(readings, arm, PLAIN, KEPT, level), base[KEPT]))
        share = share if own[0].values else "–"
        cells = {named(one.retention): cell(one, KINDS[one.retention], WIDE * level) for one in own}
        rows.append({"arm": arm, "seeds": own[0].reached, "share of plain's rise": share} | cells)
    return rows


def verdict_rows(entries: Sequence[Entry], readings: Sequence[Reading], task: str) -> list[dict[str, str]]:
    """Every arm against plain LoRA and self-replay against every arm, story loss at every level."""
    present, rows = arms(entries), list[dict[str, str]]()
    pairs = [(arm, PLAIN) for arm in present if arm != PLAIN]
    pairs += [(REPLAY, arm) for arm in present if arm not in (PLAIN, REPLAY)]
    for mine, theirs in (each for each in pairs if {*each} <= {*present}):
        levels = {f"at {level:g}": pair(readings, mine, theirs, KEPT, level) for level in TASKS[task].levels}
        rows.append({"arm": mine, "against": theirs} | {name: verdict(one) for name, one in levels.items()})
    return rows


def verdict(one: Comparison) -> str:
    """A verdict with its numbers; a dash where a side does not get there."""
    word = {"better": "**better**", "worse": "**worse**", "within noise": "a tie"}.get(one.verdict, "–")
    return f"{word} {one.numbers}" if one.seeds else word


def cost_rows(entries: Sequence[Entry]) -> list[dict[str, str]]:
    """One row for each arm: what was tried, how much it learnt at most, and CPU seconds of a step."""
    tried, seconds, rows = settings_tried(entries), step_seconds(entries), list[dict[str, str]]()
    for arm in arms(entries):
        own = [entry for entry in entries if entry.arm == arm]
        settings = {(e.settings["learning_rate"], e.settings.get("strength")) for e in own}
        least = min(entry.scores[LEARNT].value for entry in own if entry.split == "validation")
        rows.append(
            {
                "arm": arm,
                "rates and strengths": ", ".join(sorted(map(written, settings))),
                "with steps and scales": str(tried[arm][1]),
                "least target loss (validation)": KINDS[LEARNT].show(least),
                "CPU seconds a step": f"{seconds[arm]:.3f}",
                "against plain LoRA": f"{seconds[arm] / seconds[PLAIN]:.2f}" if PLAIN in seconds else "–",
            }
        )
    return rows


def written(setting: tuple[object, object]) -> str:
    """A rate, with its strength if there is one."""
    rate, strength = setting
    return f"{rate:g}" if strength is None else f"{rate:g} × {strength:g}"
