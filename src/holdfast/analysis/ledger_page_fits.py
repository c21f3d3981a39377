"""The fits of a page: the law of forgetting where an arm was run at several amounts of data, else why there is none.

Runs that differ in another setting than D and N are not put together: of every arm the settings with the most amounts
of data are fitted, and the page says which.

Read next: `holdfast.analysis.fit`.
"""

from __future__ import annotations

import base64
import io
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from holdfast.analysis.fit import LAWS, Fit, FitError, fit
from holdfast.analysis.fit_figure import fit_figure
from holdfast.analysis.fit_points import from_ledger
from holdfast.analysis.ledger_page_read import Experiment
from holdfast.analysis.ledger_page_runs import as_trained, plain
from holdfast.analysis.ledger_page_scores import Asked, lower_by_name
from holdfast.analysis.scores import find
from holdfast.drift.entry import POSTHOC
from holdfast.drift.ledger import JSON, Entry, RunKey

__all__ = ["Fits", "Fitted", "data_of", "fits_of"]

DATA = ("tokens", "train_tokens", "examples", "rows", "samples", "max_steps", "steps")
SIZE = ("parameters", "trainable_parameters", "rank", "r", "adapter.r")
AMOUNTS, DECADES = 3, 1.0
"""Amounts of data at least, as any power law goes through two, and what they must span for a fit unasked."""
TEXT = ("perplexity", "story_perplexity", "text", "output_kl")
FACTOR = 10.0


@dataclass(frozen=True)
class Fitted:
    """The law of one arm in words: the settings of its runs, parameters, expectation and doubts."""

    arm: str
    settings: str
    points: int
    parameters: str
    expected: str
    doubts: tuple[str, ...]  # that not all arms share


@dataclass(frozen=True)
class Fits:
    """The laws of one experiment: those that could be fitted, a picture, and by reason the arms that could not."""

    experiment: Experiment
    equation: str
    score: str
    data: str
    size: str
    fitted: tuple[Fitted, ...]
    doubts: tuple[str, ...]
    picture: str
    refused: tuple[tuple[str, str], ...]


def data_of(entries: Sequence[Entry], names: Sequence[str] = DATA) -> str:
    """The first of the names that has the most values among settings and costs; empty if none has two.

    >>> data_of([Entry("demo", "a", {"steps": n}, 0, "test", {}, status="failed", error="why") for n in (1, 2)])
    'steps'
    """
    counts = {
        name: len({value for entry in entries if isinstance(value := _value(entry, name), int | float)})
        for name in names
    }
    best = max(counts, key=lambda name: counts[name])
    return best if counts[best] > 1 else ""


def fits_of(experiment: Experiment, asked: Asked, draws: int = 100) -> Fits | str:
    """The laws of an experiment, or why it has none."""
    entries = [entry for entry in experiment.reported() if as_trained(entry)]
    data = data_of([entry for entry in entries if entry.arm in experiment.arms])
    if not data:
        return f"every run has one amount of data, or none that is called {', '.join(DATA)}"
    score = _score(experiment, asked)
    if not score:
        return "no score is known to be a loss of what is kept; name one with --keep"
    size = data_of(entries, SIZE)
    fits, settings, refused = dict[str, Fit](), dict[str, str](), dict[str, list[str]]()
    for arm in experiment.arms:
        where, amounts = _most_amounts([e for e in entries if e.arm == arm and score in e.scores], data, size)
        try:
            _enough(amounts)
            points = from_ledger(entries, score, data, size or None, arm=arm, split=experiment.split, where=where)
            fits[arm], settings[arm] = fit(points, LAWS["drift"], draws=draws), plain(where)
        except FitError as error:
            for fault in error.faults or (str(error),):
                refused.setdefault(fault, []).append(arm)
    picture = io.BytesIO()
    if fits:
        fit_figure(fits, score, data, size, FACTOR).savefig(picture)
    shared = [
        doubt for doubt in next((f.said for f in fits.values()), ()) if all(doubt in f.said for f in fits.values())
    ]
    return Fits(
        experiment, LAWS["drift"].equation, score, data, size,
        tuple(_told(arm, found, settings[arm], shared) for arm, found in fits.items()), tuple(shared),
        base64.b64encode(picture.getvalue()).decode(),
        tuple((reason, " · ".join(arms)) for reason, arms in refused.items()),
    )  # fmt: skip


def _enough(amounts: set[float]) -> None:
    """Refuse what a law would go through whatever is true."""
    many = ", ".join(f"{amount:g}" for amount in sorted(amounts)) or "none"
    if len(amounts) < AMOUNTS:
        raise FitError(f"{AMOUNTS} amounts of data are needed with all else equal, and there are: {many}")
    if min(amounts) > 0 and (span := math.log10(max(amounts) / min(amounts))) < DECADES:
        raise FitError(
            f"The amounts of data ({many}) span {span:.1f} decades: under {DECADES:g} none is fitted here; "
            "`holdfast fit` does it if asked"
        )


def _told(arm: str, found: Fit, settings: str, shared: Sequence[str]) -> Fitted:
    told = [
        f"{name} {value:.3g} [{found.intervals[name][0]:.3g}, {found.intervals[name][1]:.3g}]"
        for name, value in found.parameters.items()
    ]
    expected = found.predict(FACTOR * float(found.points.data.max())).sentence()
    own = tuple(doubt for doubt in found.said if doubt not in shared)
    return Fitted(arm, settings, len(found.points), ", ".join(told), expected, own)


def _score(experiment: Experiment, asked: Asked) -> str:
    """The loss of what is kept: of text by its name, the user's first, else any loss that the user keeps."""
    losses = [name for name in experiment.scores if lower_by_name(name) and name not in asked.learn]
    losses = [name for name in losses if not ((known := find(name, asked.kinds)) and known.higher_is_better)]
    named = [name for name in asked.keep if name in losses]
    text = [name for name in losses if name.partition(".")[0].startswith(TEXT)]
    return ([name for name in named if name in text] or text or named or [""])[0]


def _most_amounts(entries: Sequence[Entry], data: str, size: str) -> tuple[dict[str, JSON], set[float]]:
    """The other settings that were run at the most amounts of data, and these amounts."""
    amounts, groups = defaultdict(set), dict[str, dict[str, JSON]]()
    for entry in entries:
        value = _value(entry, data)
        if isinstance(value, int | float):
            others = {n: v for n, v in entry.settings.items() if n not in (data, size, *POSTHOC)}
            key = RunKey.of("", "", others, 0).settings
            groups[key] = others
            amounts[key].add(float(value))
    if not groups:
        return {}, set()
    best = max(groups, key=lambda key: len(amounts[key]))
    return groups[best], amounts[best]


def _value(entry: Entry, name: str) -> JSON:
    return {**entry.cost, **entry.settings}.get(name)
