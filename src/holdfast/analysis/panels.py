"""What a frontier figure shows, before any drawing: per retention score, every arm's points, fronts and mean front.

Both figures, the still one and the one for the browser, draw exactly these numbers. Read next:
`holdfast.analysis.figure`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from holdfast.analysis.frontier import BASE, Point, arms, front, points, read_front
from holdfast.analysis.scores import ScoreKind, kind
from holdfast.analysis.uncertainty import Array
from holdfast.drift.ledger import Entry

COLOURS = ("#5f6368", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Okabe and Ito (2008), told apart by readers with any colour vision; the first arm, usually the plain one, is grey."""

Line = tuple[list[float], list[float]]


@dataclass(frozen=True)
class Dot:
    """One setting at one seed, where the test split puts it; `chosen` if it is on its front on validation."""

    x: float
    y: float
    label: str
    chosen: bool


@dataclass(frozen=True)
class Trace:
    """One arm in one panel: its points, its front at every seed, and the mean front where all seeds have one."""

    arm: str
    colour: str
    number: int
    dots: list[Dot]
    fronts: list[Line]
    mean: Line


@dataclass(frozen=True)
class Panel:
    """One retention score against adaptation; `base` is the model before tuning, if it was measured."""

    score: str
    kind: ScoreKind
    adaptation: ScoreKind
    traces: list[Trace]
    base: tuple[float, float] | None


def panels(
    entries: Sequence[Entry],
    retention: Sequence[str],
    adaptation: str = "adaptation",
    *,
    reported: str = "test",
    chosen_on: str = "validation",
    kinds: Mapping[str, ScoreKind] | None = None,
    scaled: bool = True,
) -> list[Panel]:
    """One panel for each retention score; arms keep their colour and order across panels.

    >>> from holdfast.drift.ledger import Score
    >>> entries = [Entry("demo", arm, {}, 0, split, {"adaptation": Score(a), "skills": Score(s)})
    ...            for arm, a, s in (("base", 0.0, 0.9), ("plain LoRA", 0.8, 0.5)) for split in ("validation", "test")]
    >>> panel = panels(entries, ["skills"])[0]
    >>> panel.base, panel.traces[0].fronts
    ((0.0, 0.9), [([0.0, 0.8], [0.9, 0.5])])
    """
    found = points(entries, chosen_on=chosen_on, reported=reported, scaled=scaled)
    return [_panel(found, arms(entries), adaptation, score, kinds) for score in retention]


def _panel(
    found: Sequence[Point], names: Sequence[str], adaptation: str, score: str, kinds: Mapping[str, ScoreKind] | None
) -> Panel:
    traces = []
    for number, arm in enumerate(names):
        own = [point for point in found if point.arm == arm and point.has(adaptation, score)]
        fronts = [front(found, arm, seed, [adaptation, score], kinds) for seed in dict.fromkeys(p.seed for p in own)]
        chosen = {id(point) for members in fronts for point in members}
        dots = [Dot(*_place(point, adaptation, score), _label(point), id(point) in chosen) for point in own]
        places = [np.array([_place(point, adaptation, score) for point in members]) for members in fronts]
        lines = [(line[:, 0].tolist(), line[:, 1].tolist()) for line in places]
        traces.append(Trace(arm, COLOURS[number % len(COLOURS)], number, dots, lines, _mean_front(places)))
    base = next((_place(p, adaptation, score) for p in found if p.arm == BASE and p.has(adaptation, score)), None)
    return Panel(score, kind(score, kinds), kind(adaptation, kinds), traces, base)


def _place(point: Point, adaptation: str, score: str) -> tuple[float, float]:
    return point.reported[adaptation].value, point.reported[score].value


def _label(point: Point) -> str:
    """The settings and seed of a point, in words."""
    settings = [f"{name.replace('_', ' ')} {value}" for name, value in point.settings.items()]
    return ", ".join([*settings, f"seed {point.seed}"])


def _mean_front(places: Sequence[Array], steps: int = 60) -> Line:
    """The mean over seeds at equal adaptation, from where all seeds have begun to where the first of them ends."""
    if not places:
        return [], []
    low, high = max(line[:, 0].min() for line in places), min(line[:, 0].max() for line in places)
    grid = np.unique(np.concatenate([np.linspace(low, high, steps), *(line[:, 0] for line in places)]))
    levels = [float(level) for level in grid if low <= level <= high]
    read = [[float(read_front(line[None, :, 0], line[None, :, 1], level)[0][0]) for line in places] for level in levels]
    means = [sum(values) / len(values) for values in read]
    return [x for x, y in zip(levels, means, strict=True) if not math.isnan(y)], [y for y in means if not math.isnan(y)]
