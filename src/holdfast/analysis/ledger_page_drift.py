"""The drift of a page: what `holdfast drift` and `holdfast.watch` recorded, a verdict and a row for every score.

Rows and verdicts are those of the drift report; of a run that was watched the last look counts.

Read next: `holdfast.analysis.drift_report`, the page that shows one run in full.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from holdfast.analysis.drift_rows import Row, rows_of
from holdfast.analysis.drift_words import Headline, headline
from holdfast.analysis.ledger_page_frontiers import why_none
from holdfast.analysis.ledger_page_read import Experiment
from holdfast.analysis.points import BASE
from holdfast.analysis.scores import ScoreKind
from holdfast.drift.ledger import Entry

__all__ = ["Drifted", "drift_of", "is_drift"]


@dataclass(frozen=True)
class Drifted:
    """One tuned model against its base.

    Args:
        name: arm and seed.
        verdict: in words.
        rows: by score.
        apart: why a score is not compared.
        left_out: by probe, what was not measured and why.
        look: which look it is, of a run that was watched; else empty.
        split: what it was measured on.
    """

    name: str
    verdict: Headline
    rows: Mapping[str, Row]
    apart: Mapping[str, str]
    left_out: Mapping[str, str]
    look: str
    split: str


def is_drift(experiment: Experiment) -> bool:
    """Whether its entries say which base they are held against, as those of `holdfast drift` and `watch` do.

    Those of a sweep may say so too, but are on two splits and compared at equal learning.
    """
    tuned = [entry for entry in experiment.entries if entry.arm != BASE]
    return any(BASE in entry.models for entry in tuned or experiment.entries) and bool(why_none(experiment.entries))


def drift_of(
    experiment: Experiment, kinds: Mapping[str, ScoreKind]
) -> tuple[list[Drifted], list[str]]:  # fmt: skip
    """What drifted, by tuned model, and what could not be held against a base."""
    done = [entry for entry in experiment.entries if entry.status == "done" and BASE in entry.models]
    bases = [entry for entry in done if entry.arm == BASE]
    looks: dict[tuple[str, str], list[Entry]] = {}
    for entry in done:
        if entry.arm != BASE:
            looks.setdefault((_name(entry, experiment), entry.split), []).append(entry)
    found, without = [], []
    for (name, split), own in looks.items():
        last = max(own, key=_step)
        base = _base_of(last, bases)
        if base is None:
            without.append(f"{name}: its base was not measured on split {split}")
            continue
        rows, apart = rows_of(base.scores, last.scores, kinds)
        look = f"step {_step(last):g}, the last of {len(own)} looks" if "step" in last.settings else ""
        found.append(Drifted(name, headline(rows), rows, apart, last.not_measured, look, split))
    return found, without


def _name(entry: Entry, experiment: Experiment) -> str:
    """Arm and seed, with the settings where one arm has several."""
    own = [e for e in experiment.entries if e.arm == entry.arm and e.split == entry.split]
    every = [{n: v for n, v in e.settings.items() if n != "step"} for e in own]
    mine = {name: value for name, value in entry.settings.items() if name != "step"}
    differs = [name for name in mine if any(other.get(name) != mine[name] for other in every)]
    seed = [f"seed {entry.seed}"] if len({e.seed for e in own}) > 1 else []
    return ", ".join([entry.arm, *(f"{name} {mine[name]}" for name in differs), *seed])


def _step(entry: Entry) -> float:
    step = entry.settings.get("step", 0)
    return float(step) if isinstance(step, int | float) else 0.0


def _base_of(entry: Entry, bases: Sequence[Entry]) -> Entry | None:
    """The latest base of the same weights and split, with the same settings if there is such a one."""
    same = [base for base in bases if base.split == entry.split and base.models[BASE] == entry.models[BASE]]
    alike = [
        base for base in same
        if all(entry.settings.get(name) == value for name, value in base.settings.items() if name != "step")
    ]  # fmt: skip
    found = alike or same
    return found[-1] if found else None
