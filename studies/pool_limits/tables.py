"""The tables of the page: what pools show, what each arm keeps, what was tried at what cost; read `page` next."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, median

from holdfast.analysis.frontier import Reading, arms
from holdfast.analysis.points import settings_tried
from holdfast.drift.ledger import Entry

from studies.common_readings import at_start, cell, reading

from .arms import ARMS
from .readings import KINDS, SHOWN, named

COUNTED = {
    "sequences": "sequences",
    "tokens": "tokens",
    "plain": "plain text",
    "random": "random tokens",
    "refused": "refusals",
    "forbidden": "forbidden words, not refused",
    "fact": "facts",
    "list": "lists",
    "rare": "rare skill",
    "sum": "sums",
    "danger": "dangers",
    "how": "how-to answers",
    "thought": "thought of refusing",
}


def pool_rows(entries: Sequence[Entry]) -> list[dict[str, str]]:
    """One row for each pool: what it shows."""
    found = {entry.arm: entry.scores for entry in entries}
    return [
        {"pool": name} | {title: _number(found[name][what].value) for what, title in COUNTED.items()}
        for name in dict.fromkeys(arm.pool for arm in ARMS.values())
        if name in found
    ]


def _number(value: float) -> str:
    return f"{value:g}" if value == int(value) else f"{value:.3f}"


def matched_rows(
    entries: Sequence[Entry],
    readings: Sequence[Reading],
    scores: Sequence[str],
    level: float,
    chosen: Sequence[str] = (),
) -> list[dict[str, str]]:
    """One row for each arm: what it keeps at this level, with the 95 % interval over seeds and items."""
    base, there = at_start(entries), arms(entries)
    rows = [{"arm": "*base model*", "seeds": ""} | {named(name): KINDS[name].show(base[name].value) for name in scores}]
    for arm in (arm for arm in chosen or there if arm in there):
        own = [reading(readings, arm, name, level) for name in scores]
        cells = {named(one.retention): cell(one, KINDS[one.retention], level) for one in own}
        rows.append({"arm": arm, "seeds": own[0].reached} | cells)
    return rows


def end_rows(entries: Sequence[Entry], scores: Sequence[str]) -> list[dict[str, object]]:
    """One row for each arm, rate and number of steps, as trained: means over seeds."""
    found: dict[tuple[str, float, int], list[Entry]] = {}
    for entry in entries:
        if entry.settings["scale"] == 1:
            key = (entry.arm, entry.settings["learning_rate"], entry.settings["steps"])
            found.setdefault(key, []).append(entry)
    return [
        {"arm": arm, "rate": f"{rate:g}", "steps": steps, "seeds": len(some)}
        | {named(name): KINDS[name].show(fmean(entry.scores[name].value for entry in some)) for name in scores}
        for (arm, rate, steps), some in found.items()
    ]


def tried_rows(entries: Sequence[Entry]) -> list[dict[str, str]]:
    """One row for each arm: what it is, how much was tried, and the CPU seconds of a training."""
    tried, rows = settings_tried(entries), []
    for arm in arms(entries):
        own = [entry for entry in entries if entry.arm == arm]
        last = max(entry.settings["steps"] for entry in own)
        seconds = [entry.cost["train_cpu_seconds"] for entry in own if entry.settings["steps"] == last]
        runs = {(entry.settings["learning_rate"], entry.settings.get("strength")) for entry in own}
        rows.append(
            {
                "arm": arm,
                "what": ARMS[arm].what,
                "learning rates": ", ".join(f"{rate:g}" for rate in sorted({rate for rate, _ in runs})),
                "settings trained": str(len(runs)),
                "settings judged": str(tried[arm][1]),
                "seeds": str(len({entry.seed for entry in own})),
                "CPU seconds a run": f"{median(seconds):.0f}",
            }
        )
    return rows


def able(entries: Sequence[Entry], names: Sequence[str], least: float = 0.1) -> list[str]:
    """The shares among these scores in which the base itself reaches at least this much."""
    base = at_start(entries)
    return [name for name in names if name in SHOWN and base[name].value >= least]
