"""The parts of the study, what the ledger lacks of them, and what of it is published; read `page` next."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from holdfast.drift.ledger import Entry, Ledger, Score

from . import false_alarms, null_run
from .adapters import LAB, TUNINGS, adapter, bases
from .measuring import BASE, compare, experiment

SEEDS = (0, 1, 2)
NULL, ALARMS, SPEED = "drift found: null run", "drift found: false alarms", "drift found: speed"
NULL_OF = ("lab-mild", "lab-harsh")
BATCH, ORDER, REPEATS = 7, 1, 3


def parts(data: Path, work: Path, seeds: Sequence[int] = SEEDS) -> dict[str, Callable[[], Iterable[Entry]]]:
    """By experiment, what measures it; the lab first, and speed last."""
    found: dict[str, Callable[[], Iterable[Entry]]] = {
        experiment(tuning): partial(compare, tuning, seeds if tuning.steps else seeds[:1], data, work)
        for tuning in TUNINGS.values()
    }
    found[NULL] = partial(again, data, work)
    found[ALARMS] = partial(alarms, Ledger(work / "ledger.jsonl"))
    found[SPEED] = partial(speed, data, work)
    return found


def run(data: Path, work: Path, seeds: Sequence[int] = SEEDS, only: Sequence[str] = ()) -> Path:
    """Measure what the ledger of the working folder lacks; whole experiments, so that none is half there."""
    work.mkdir(parents=True, exist_ok=True)
    ledger = Ledger(work / "ledger.jsonl")
    done = {entry.experiment for entry in ledger.entries()}
    for name, measured in parts(data, work, seeds).items():
        if name in done or (only and name not in only):
            continue
        if name.startswith("drift found: stories"):
            bases(data, work)
        for entry in list(measured()):
            ledger.append(entry)
        print(name, flush=True)
    return ledger.path


def publish(source: Path, target: Path) -> None:
    """Copy a ledger without what the page does not need: the categories of stories260K's items."""
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_suffix(".unfinished")
    unfinished.unlink(missing_ok=True)
    slim = Ledger(unfinished)
    for entry in Ledger(source).entries():
        scores = entry.scores
        if entry.experiment.startswith("drift found: stories"):
            scores = {name: replace(score, categories=None) for name, score in scores.items()}
        slim.append(replace(entry, scores=scores))
    unfinished.replace(target)


def again(data: Path, work: Path) -> Iterable[Entry]:
    """Adapters of the lab, each twice: as they are, and with rows and batches in another order."""
    for key in NULL_OF:
        folder = adapter(TUNINGS[key], SEEDS[0], data, work)
        for arm, order, size in (("as it is", None, None), ("shuffled", ORDER, BATCH)):
            found = null_run.in_a_process(folder, fresh(work), order, size)
            settings = {"adapter": TUNINGS[key].title, "order": order, "batch_size": size, **found["digests"]}
            cost = {name: found[name] for name in ("cpu_seconds", "wall_seconds")}
            scores = {"scores": Score(found["scores"], n=found["items"])}
            yield Entry(NULL, arm, settings, SEEDS[0], "test", scores, cost)


def alarms(ledger: Ledger) -> Iterable[Entry]:
    """How often the gates fail where nothing drifted, on items of the lab's runs."""
    for key in NULL_OF:
        title = TUNINGS[key].title
        yield from false_alarms.entries(ALARMS, title, pairs_of(ledger.entries(experiment(TUNINGS[key]))))


def pairs_of(entries: Sequence[Entry]) -> list[tuple[Mapping[str, Score], Mapping[str, Score]]]:
    """Base and tuned of each seed of an experiment."""
    base = next(entry for entry in entries if entry.arm == BASE)
    return [(base.scores, entry.scores) for entry in entries if entry.arm != BASE]


def speed(data: Path, work: Path) -> Iterable[Entry]:
    """The whole suite of the lab on both sides, from nothing, a few times."""
    folder = adapter(TUNINGS["lab-harsh"], SEEDS[0], data, work)
    for repeat in range(REPEATS):
        found = null_run.in_a_process(folder, fresh(work))
        cost = {name: found[name] for name in ("cpu_seconds", "wall_seconds", "process_seconds")}
        settings = {"base": LAB, "repeat": repeat, "load_before": found["load"][0], "load_after": found["load"][1]}
        yield Entry(SPEED, "both sides", settings, 0, "test", {"items": Score(2 * found["items"])}, cost)


def fresh(work: Path) -> Path:
    """A folder that is not there yet: an evaluation must not find what another left."""
    work.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(dir=work)) / "drift"
