"""Runs the comparisons by `holdfast compare`, whole seeds first, and publishes their ledgers; read `columns` next."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import chdir
from dataclasses import replace
from pathlib import Path

from holdfast.drift.ledger import Entry, Ledger, RunKey

from studies.common_sweep import on_fronts

from .comparisons import KINDS, RESULTS, STUDIES, recipe

WORK = Path("runs/results")  # a folder for each comparison, as the recipes say


def run(names: Sequence[str], work: Path, processes: int, seeds: int) -> None:
    """Run what is missing of these comparisons below a folder, one after the other; each a `holdfast compare`.

    Args:
        names: of `STUDIES`.
        work: where `prepare` has written.
        processes: runs at a time.
        seeds: of every comparison, so many of its recipe's, before any has the next: 1 is a first look at all.
    """
    from holdfast.recipe import compare as comparing
    from holdfast.recipe.config import load

    with chdir(work):
        for name in names:
            asked = load(recipe(name))
            if asked.compare is None:
                continue
            if seeds < len(asked.compare.seeds) and not begun(asked.output, asked.compare.seeds[seeds:]):
                asked = replace(asked, compare=replace(asked.compare, seeds=asked.compare.seeds[:seeds]))
            todo = comparing.plan(asked)
            print(f"{name}: {len(todo.todo)} of {len(todo.jobs)} runs to go", flush=True)
            if todo.todo:
                comparing.run(asked, processes=processes, say=lambda text: print(text, flush=True))


def begun(output: Path, seeds: Sequence[int]) -> bool:
    """Whether a comparison has runs of these seeds already: then it may not go on with fewer."""
    path = output / "ledger.jsonl"
    return path.is_file() and any(entry.seed in seeds for entry in Ledger(path).entries(status=None))


def publish(work: Path, results: Path = RESULTS) -> None:
    """Copy the ledgers to where the pages read them, one for each page.

    Results of single items stay where an interval needs them: at test points that are on a front of some arm.

    Args:
        work: the folder in which the comparisons were run.
        results: the folder with a folder for each page.
    """
    for page in dict.fromkeys(study.page for study in STUDIES.values()):
        entries = list[Entry]()
        for name, study in STUDIES.items():
            path = work / WORK / name / "ledger.jsonl"
            if study.page == page and path.is_file():
                entries += lean(Ledger(path).entries(name, status=None), name)
        if entries:
            write(entries, results / page / "ledger.jsonl")


def lean(entries: Sequence[Entry], name: str) -> list[Entry]:
    """The last entry of each point, with items only where they are needed, and without descriptions of models."""
    study = STUDIES[name]
    last = {(entry.key, entry.split): entry for entry in entries}.values()
    done = [entry for entry in last if entry.status == "done"]
    kept: set[RunKey] = on_fronts(done, [(study.learn, score) for score in study.keep], KINDS) if done else set()
    found = []
    for entry in last:
        whole = entry.split == "test" and entry.key in kept
        scores = {score: value if whole else value.without_items() for score, value in entry.scores.items()}
        found.append(replace(entry, scores=scores, models={}))
    return found


def write(entries: Sequence[Entry], target: Path) -> None:
    """Write a ledger, whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_suffix(".unfinished")
    unfinished.unlink(missing_ok=True)
    copy = Ledger(unfinished)
    for entry in entries:
        copy.append(entry)
    unfinished.replace(target)
