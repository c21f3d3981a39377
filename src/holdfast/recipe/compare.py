"""Compares arms at equal learning: every point of every arm and seed is trained, measured, and kept in one ledger.

    jobs = arms x their grids x seeds           each a run of its own, in its own folder, resumed if killed
    points = jobs x checkpoints x scales        each an entry for validation and one for test

A run that fails is recorded and stops nobody else. Started again, only what is missing is run.

Read next: `compare_job`, one run; `compare_results`, what is made of the ledger; docs/compare.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from ..core.errors import WrongSetup
from ..drift.ledger import JSON, Entry, Ledger
from ..drift.probe import BASE
from .compare_folder import Folder
from .compare_job import Job, perform
from .compare_measure import base_entries
from .compare_scores import SPLITS
from .compare_settings import Comparing, Variant
from .config import Recipe
from .processes import Failed, performed, processes_for
from .training import Say

RUNS = "runs"
OWN = "training.jsonl"
"""Of a run, for itself; not called as a ledger is, which `holdfast report` would count the run by once more."""


@dataclass(frozen=True)
class Plan:
    """What a comparison amounts to.

    Attributes:
        jobs: all runs, seed by seed, so that a comparison that is stopped has whole seeds.
        todo: those of them that are not in the ledger.
        failed: those that are in it as failed, and are not run again.
        seconds: for one run, the mean over those that are finished; None: none is.
    """

    jobs: tuple[Job, ...]
    todo: tuple[Job, ...]
    failed: tuple[Job, ...]
    seconds: float | None

    def minutes(self, processes: int) -> float | None:
        """Return how long the rest will take, about."""
        rounds = -(-len(self.todo) // max(processes, 1))
        return None if self.seconds is None else self.seconds * rounds / 60


def comparing_in(recipe: Recipe) -> Comparing:
    """Return what a recipe compares.

    Raises:
        WrongSetup: if it compares nothing.
    """
    if recipe.compare is None:
        raise WrongSetup(
            f"{recipe.source} is one run: it has no `compare`. Run it with `holdfast train`, or say what is to be "
            "compared: compare: {learn: new_task, keep: [old_skills], arms: {plain LoRA: {learning_rate: [1e-3, 2e-3]},"
            " self-replay: {methods: [self_replay]}}} (docs/compare.md)."
        )
    return recipe.compare


def plan(recipe: Recipe, *, retry_failed: bool = False) -> Plan:
    """Return the runs of a comparison, and which of them are left; nothing is written.

    Args:
        recipe: with `compare`.
        retry_failed: whether failed runs are left too.

    Raises:
        WrongSetup: if the recipe compares nothing, or its folder holds another comparison.
    """
    comparing = comparing_in(recipe)
    Folder(recipe, comparing)
    jobs = tuple(_job(recipe, comparing, v, seed) for seed in comparing.seeds for v in comparing.variants)
    entries = latest(Ledger(recipe.ledger).entries(recipe.experiment, status=None))
    there = {(entry.key, entry.split) for entry in entries if entry.status == "done" or not retry_failed}
    seconds = dict[str, float]()
    for entry in entries:
        if "train_seconds" in entry.cost:
            trained = seconds.get(entry.run, entry.cost["train_seconds"])
            seconds[entry.run] = trained + entry.cost.get("evaluate_seconds", 0.0)
    lost = {(entry.key, entry.split) for entry in entries if entry.status == "failed"}
    todo = tuple(job for job in jobs if not job.keys() <= there)
    failed = tuple(job for job in jobs if job.keys() <= there and job.keys() & lost)
    return Plan(jobs, todo, failed, fmean(seconds.values()) if seconds else None)


def latest(entries: Sequence[Entry]) -> list[Entry]:
    """Return the last entry of each setting, seed and split, in the order of the first."""
    return list({(entry.key, entry.split): entry for entry in entries}.values())


def run(
    recipe: Recipe,
    *,
    processes: int = 0,
    retry_failed: bool = False,
    keep_adapters: bool = False,
    say: Say = print,
    told: Callable[[float, int], None] = lambda done, runs: None,
) -> list[Entry]:
    """Run what is missing of a comparison, and return all of its entries, failed ones included.

    Args:
        recipe: with `compare`.
        processes: runs at a time; 0: one for each core, at most 8, and one where there is an accelerator.
        retry_failed: run failed runs again.
        keep_adapters: leave what was trained on disk.
        say: where messages go.
        told: called with how many runs are done, in parts of them, and how many there are to do.

    Raises:
        WrongSetup: if the folder holds another comparison or one is at work in it, the base cannot be measured or is
            not the one that was, or what is to be compared is not among its scores.
    """
    comparing = comparing_in(recipe)
    folder, ledger = Folder(recipe, comparing), Ledger(recipe.ledger)
    with folder.alone():
        asked = plan(recipe, retry_failed=retry_failed)
        folder.write()
        if folder.probes is None or len(ledger.entries(recipe.experiment, arm=BASE)) < len(SPLITS):
            say("measuring the base ...")
            folder.measured(_measure_base(asked.jobs[0], comparing, ledger))
        if len(asked.todo) < len(asked.jobs):
            failed = f", {len(asked.failed)} of them failed: --retry-failed" if asked.failed else ""
            say(f"{len(asked.jobs) - len(asked.todo)} of {len(asked.jobs)} runs are in {ledger.path} already{failed}.")
        jobs = {job.recipe.output.name: job for job in asked.todo}
        for job in jobs.values():
            job.recipe.source.parent.mkdir(parents=True, exist_ok=True)
            job.recipe.source.write_text(yaml.safe_dump(dict(job.recipe.plain), sort_keys=False, allow_unicode=True))
        bases = [entry.models for entry in ledger.entries(recipe.experiment, arm=BASE)][-len(SPLITS) :]
        tasks = {name: partial(perform, job, folder.probes or {}, keep_adapters) for name, job in jobs.items()}
        for name, outcome in performed(
            tasks, processes_for(processes), told=lambda done: told(done, len(jobs)), log=lambda key: _log(jobs[key])
        ):
            _record(jobs[name], outcome, ledger, bases, say)
        told(len(jobs), len(jobs))
        return latest(ledger.entries(recipe.experiment, status=None))


def _record(
    job: Job, outcome: list[Entry] | Failed, ledger: Ledger, bases: Sequence[Mapping[str, JSON]], say: Say
) -> None:
    """Append what came of a run.

    Raises:
        WrongSetup: if its base is not the one that is in the ledger; then nothing is appended.
    """
    if isinstance(outcome, Failed):
        say(f"failed: {job.recipe.output.name}: {outcome.error} (see {_log(job)})")
        outcome = job.failed(outcome.error)
    if any(entry.models and entry.models not in bases for entry in outcome):
        raise WrongSetup(
            f"The weights of {job.recipe.model.name} are not those that {ledger.path} has as the base: they changed "
            "since it was measured, and what is there cannot be compared with them. Put them back, or choose another "
            "`output`."
        )
    for entry in outcome:
        ledger.append(entry)


def _measure_base(job: Job, comparing: Comparing, ledger: Ledger) -> dict[str, list[str]]:
    """Append the base's entries, and return which probes give what is compared."""
    wanted = (comparing.learn, *comparing.keep)
    log = job.recipe.output.with_name("base.log")
    [(_, outcome)] = performed({BASE: partial(base_entries, job, wanted)}, 1, log=lambda key: log)
    if isinstance(outcome, Failed):
        raise WrongSetup(f"The base could not be measured: {outcome.error} (see {log}).")
    entries, probes = outcome
    for entry in entries:
        if missing := [name for name in wanted if name not in entry.scores]:
            raise WrongSetup(
                f"{', '.join(missing)} cannot be compared: the base has no such score on {entry.split}. It has: "
                f"{', '.join(sorted(entry.scores))}. Change `learn` or `keep`."
            )
    for entry in entries:
        ledger.append(entry)
    return probes


def _job(recipe: Recipe, comparing: Comparing, variant: Variant, seed: int) -> Job:
    """One run of a variant, as a recipe that `holdfast train` would run alike."""
    name = f"{variant.name}_seed-{seed}"
    output = recipe.output / RUNS / name
    plain: dict[str, Any] = {key: value for key, value in variant.recipe.plain.items() if key != "ledger"}
    plain |= {"seed": seed, "output": str(output), "experiment": recipe.experiment, "arm": variant.arm}
    if variant.scales != (1.0,):
        plain["evaluate"] = {**plain["evaluate"], "scales": list(variant.scales)}
    own = replace(
        variant.recipe, plain=plain, source=output.with_name(f"{name}.yaml"), output=output, seed=seed,
        ledger=output / OWN, experiment=recipe.experiment, arm=variant.arm, scales=variant.scales,
    )  # fmt: skip
    return Job(own, variant.settings, comparing)


def _log(job: Job) -> Path:
    return job.recipe.output.with_name(f"{job.recipe.output.name}.log")
