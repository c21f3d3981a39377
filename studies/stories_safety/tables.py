"""The tables of the page: what each arm keeps at one level, against naive, what it costs; read `page` next."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from holdfast.analysis.frontier import Reading, arms, compare
from holdfast.analysis.points import BASE, settings_tried
from holdfast.drift.ledger import Entry

from studies.common_readings import cell, reading

from .readings import KINDS, LOST, SHOWN, WIDE, decided, named


def matched_rows(entries: Sequence[Entry], readings: Sequence[Reading], level: float) -> list[dict[str, str]]:
    """One row for each arm: what it keeps at this level, with the 95 % interval over seeds and rows."""
    rows = []
    for arm in arms(entries):
        own = [reading(readings, arm, score, level) for score in SHOWN]
        row = {"arm": arm, "seeds": own[0].reached}
        row |= {named(one.retention): cell(one, KINDS[one.retention], WIDE * level) for one in own}
        rows.append(row)
    return rows


def compared_rows(readings: Sequence[Reading]) -> list[dict[str, str]]:
    """Every arm against naive, at every level, on all that must be kept."""
    found = [one for one in compare(readings, "naive", kinds=KINDS) if one.arm.retention in LOST]
    return [
        {
            "score": one.kind.title,
            "refusal loss": f"{one.arm.level:g}",
            "arm": one.arm.arm,
            "difference [95 %]": one.numbers,
            "seeds": str(len(one.seeds)),
            "verdict": "a tie" if decided(one) == "within noise" else decided(one),
        }
        for one in found
    ]


def cost_rows(entries: Sequence[Entry]) -> list[dict[str, str]]:
    """One row for each arm: settings tried, and CPU seconds of a step against naive."""
    last = max(entry.cost.get("steps", 0) for entry in entries)
    each: dict[str, dict[str, float]] = {}
    for entry in entries:
        if entry.arm != BASE and entry.cost["steps"] == last:
            each.setdefault(entry.arm, {})[entry.run] = entry.cost["train_cpu_seconds"] / entry.cost["steps"]
    plain, tried = fmean(each["naive"].values()), settings_tried(entries)
    return [
        {
            "arm": arm,
            "learning rates": str(len({entry.settings["learning_rate"] for entry in entries if entry.arm == arm})),
            "settings (rates x steps or scales)": str(tried[arm][1]),
            "CPU seconds a step": f"{fmean(seconds.values()):.3f}",
            "against naive": f"{fmean(seconds.values()) / plain:.2f}",
        }
        for arm, seconds in ((arm, each[arm]) for arm in arms(entries))
    ]
