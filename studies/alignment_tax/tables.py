"""The tables of the page: what each arm keeps at one level, where it ends, what it costs; read `page` next."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev

import numpy as np
from holdfast.analysis.frontier import Reading, arms
from holdfast.analysis.scores import ScoreKind
from holdfast.analysis.uncertainty import interval
from holdfast.drift.ledger import Entry

from .cost import seconds_of
from .readings import JUDGED, JUDGED_AT, KINDS, at_level, final


def spread(values: Sequence[float], kind: ScoreKind, half: float | None = None) -> str:
    """A mean over seeds with the half-width of its interval, or with the standard deviation where none is given."""
    if half is None:
        half = stdev(values) if len(values) > 1 else math.inf
    return kind.show(fmean(values)) + (f" ± {kind.show(half)}" if math.isfinite(half) else "")


def matched_rows(entries: Sequence[Entry], readings: Sequence[Reading], level: float) -> list[dict[str, str]]:
    """One row for each arm: what it keeps at this level, with the 95 % interval over seeds and prompts."""
    axis = max(abs(a.level - b.level) for a in readings for b in readings)
    rows = []
    for arm in arms(entries):
        own = [reading for reading in readings if reading.arm == arm and reading.level == level]
        row = {"arm": arm, "seeds": own[0].reached}
        for one in own:
            kind, cell = KINDS[one.retention], "–"
            if one.values:
                _, low, high = interval(np.stack(list(one.samples.values())))
                cell = spread(list(one.values.values()), kind, (high - low) / 2) + " †" * (one.gap > axis)
            row[kind.title.lower()] = cell
        rows.append(row)
    return rows


def final_rows(entries: Sequence[Entry]) -> list[dict[str, str]]:
    """One row for each arm: its setting, and all scores with the standard deviation over seeds."""
    rows = []
    for arm in arms(entries):
        if not (chosen := final(entries, arm)):
            continue
        settings = chosen[0].settings
        scaled = f", scale {settings['scale']:g}" if "scale" in settings else ""
        row = {"arm": arm, "learning rate": f"{settings['learning_rate']:g}{scaled}"}
        for name, kind in KINDS.items():
            row[kind.title.lower()] = spread([entry.scores[name].value for entry in chosen], kind)
        rows.append(row)
    return rows


def cost_rows(entries: Sequence[Entry], timed: Sequence[Entry], readings: Sequence[Reading]) -> list[dict[str, str]]:
    """One row for each arm: settings tried, CPU seconds of a whole run as `cost` timed them, and what they buy."""
    seconds = seconds_of(timed)
    plain = seconds.get("naive", math.nan)
    rows = []
    for arm in arms(entries):
        own, mine = [entry for entry in entries if entry.arm == arm], seconds.get(arm, math.nan)
        row = {
            "arm": arm,
            "learning rates": str(len({entry.settings["learning_rate"] for entry in own})),
            "settings": str(len({entry.key.settings for entry in own})),
            "CPU seconds a run": "–" if math.isnan(mine) else f"{mine:.1f}",
            "against naive": "–" if math.isnan(mine / plain) else f"{mine / plain:.2f}",
        }
        for score in JUDGED:
            one = next(reading for reading in at_level(readings, score) if reading.arm == arm)
            shown = KINDS[score].show(one.mean) if one.values else "–"
            row[f"{KINDS[score].title.lower()} at refusal {JUDGED_AT:g}"] = shown
        rows.append(row)
    return rows
