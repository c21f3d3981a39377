"""What was run: for every experiment a row for each arm, what failed and why, and every run's settings to do it again.

    score of an arm: its mean over seeds at every setting as trained, from the least to the most over the settings

No setting is picked: what a chosen one keeps is for the frontiers, where all arms have learned equally much.

Read next: `holdfast.analysis.ledger_page`, the page.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from holdfast.analysis.ledger_page_read import Experiment
from holdfast.analysis.points import BASE, settings_tried
from holdfast.analysis.scores import ScoreKind, find
from holdfast.drift.entry import POSTHOC
from holdfast.drift.ledger import JSON, Entry

__all__ = ["Failure", "Row", "Run", "Table", "as_trained", "plain", "runs_of", "shown", "table_of"]

Kinds = Mapping[str, ScoreKind]


@dataclass(frozen=True)
class Failure:
    """One message, and what it was said of."""

    arm: str
    error: str
    of: tuple[str, ...]


@dataclass(frozen=True)
class Row:
    """One arm: how much was tried, what it took, and its scores as (text, middle)."""

    arm: str
    settings: int
    points: int
    seeds: tuple[int, ...]
    runs: int
    failed: int
    seconds: tuple[str, float] | None
    scores: Mapping[str, tuple[str, float]]


@dataclass(frozen=True)
class Table:
    """The arms of one experiment; `cost` names what `seconds` are."""

    experiment: Experiment
    rows: tuple[Row, ...]
    failures: tuple[Failure, ...]
    scores: tuple[str, ...]
    cost: str


@dataclass(frozen=True)
class Run:
    """One training run, or the base: what to set to do it again."""

    arm: str
    seed: int
    run: str
    settings: str
    posthoc: str
    splits: str
    time: str
    machine: str
    command: str
    models: Mapping[str, JSON]
    failed: bool


def as_trained(entry: Entry) -> bool:
    """Whether nothing was done to the adapter after training; the base is what it is.

    >>> as_trained(Entry("demo", "plain LoRA", {"scale": 0.5}, 0, "test", {}, status="failed", error="why"))
    False
    """
    changed = any(name in entry.settings for name in POSTHOC if name != "scale") or entry.settings.get("scale", 1) != 1
    return entry.arm == BASE or not changed


def table_of(experiment: Experiment, kinds: Kinds) -> Table:
    """The runs of one experiment, an arm to a row, the base first."""
    entries = experiment.entries
    arms = [arm for arm in (BASE, *experiment.arms) if any(entry.arm == arm for entry in entries)]
    costs = dict.fromkeys(name for entry in entries for name in entry.cost if name.startswith("train_"))
    cost = next(iter(costs), next((n for entry in entries for n in entry.cost if n.endswith("seconds")), ""))
    tried, scores = settings_tried(entries), tuple(experiment.scores)
    rows = []
    for arm in arms:
        own = [entry for entry in entries if entry.arm == arm]
        told = [entry for entry in experiment.reported() if entry.arm == arm and as_trained(entry)]
        spent = list({entry.run: entry.cost[cost] for entry in own if cost in entry.cost}.values())
        row = Row(
            arm, *tried[arm], tuple(dict.fromkeys(entry.seed for entry in own)),
            runs=len({entry.run for entry in own}),
            failed=len({entry.run for entry in own if entry.status == "failed"}),
            seconds=(f"{fmean(spent):.1f}", fmean(spent)) if spent else None,
            scores=_scores(told, scores, kinds),
        )  # fmt: skip
        rows.append(row)
    return Table(experiment, tuple(rows), _failures(entries), scores, cost)


def _scores(entries: Sequence[Entry], names: Sequence[str], kinds: Kinds) -> dict[str, tuple[str, float]]:
    """Of every score the mean over seeds, from the least to the most of the settings, and the mean of all."""
    found = {}
    for name in names:
        by_setting = defaultdict(list)
        for entry in entries:
            if name in entry.scores:
                by_setting[entry.key.settings].append(entry.scores[name].value)
        if by_setting:
            means = [fmean(values) for values in by_setting.values()]
            low, high = shown(name, min(means), kinds), shown(name, max(means), kinds)
            found[name] = (low if low == high else f"{low} to {high}"), fmean(means)
    return found


def shown(name: str, value: float, kinds: Kinds, signed: bool = False) -> str:
    """A value of a score as text, also of one that is not known.

    >>> shown("skills", 0.5, {}), shown("other", 1234.5678, {}), shown("skills", -0.5, {}, signed=True)
    ('0.50', '1.23e+03', '−0.50')
    """
    kind = find(name, kinds)
    text = kind.show(value, signed) if kind else f"{value:{'+' if signed else ''}.3g}"
    return text.replace("-", "−") if text.startswith("-") else text


def _failures(entries: Sequence[Entry]) -> tuple[Failure, ...]:
    """The failed runs, those with one message together."""
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for entry in entries:
        if entry.status == "failed":
            found[entry.arm, entry.error or ""].append(f"{plain(entry.settings)}, seed {entry.seed}".lstrip(", "))
    return tuple(Failure(arm, error, tuple(dict.fromkeys(of))) for (arm, error), of in found.items())


def plain(settings: Mapping[str, JSON]) -> str:
    """Settings in words.

    >>> plain({"learning_rate": 0.001, "data": {"name": "x"}})
    'learning_rate 0.001, data {"name": "x"}'
    """
    texts = {name: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for name, v in settings.items()}
    return ", ".join(f"{name} {text}" for name, text in texts.items())


def runs_of(experiment: Experiment, machines: Mapping[str, str]) -> list[Run]:
    """Every training run; `machines` names environments by their JSON."""
    grouped: dict[tuple[str, str], list[Entry]] = defaultdict(list)
    for entry in experiment.entries:
        grouped[entry.arm, entry.run].append(entry)
    return [_run(own, machines) for own in grouped.values()]


def _run(own: Sequence[Entry], machines: Mapping[str, str]) -> Run:
    first, last = own[0], own[-1]
    after = {name: [e.settings[name] for e in own if name in e.settings] for name in POSTHOC}
    return Run(
        first.arm, first.seed, first.run,
        settings=plain({name: value for name, value in first.settings.items() if name not in POSTHOC}),
        posthoc="; ".join(
            f"{name} {', '.join(dict.fromkeys(map(str, values)))}" for name, values in after.items() if values
        ),
        splits=", ".join(dict.fromkeys(entry.split for entry in own)),
        time=last.time[:16].replace("T", " "),
        machine=", ".join(dict.fromkeys(machines[json.dumps(entry.environment, sort_keys=True)] for entry in own)),
        command=next((entry.command for entry in own if entry.command), ""),
        models=last.models,
        failed=any(entry.status == "failed" for entry in own),
    )  # fmt: skip
