"""`holdfast compare`: many runs from one recipe, and what each arm kept where all have learned equally much."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from .kept import kept_table, runs_bar, tell_verdicts

if TYPE_CHECKING:
    from rich.console import Console

    from ..drift.ledger import Entry
    from ..recipe.compare import Plan
    from ..recipe.compare_settings import Comparing


def compare(
    recipe: Path = typer.Argument(..., help="A YAML recipe with `compare`; see docs/compare.md and recipes/."),
    check: bool = typer.Option(
        False, "--check", help="Only validate: say what would run, and how long; or every fault."
    ),
    processes: int = typer.Option(
        0, min=0, help="Runs at a time, one thread each; 0: one per core, at most 8; with a GPU one."
    ),
    retry_failed: bool = typer.Option(False, "--retry-failed", help="Run again what is recorded as failed."),
    keep_adapters: bool = typer.Option(
        False, "--keep-adapters", help="Keep what is trained. Otherwise it is deleted once it is measured."
    ),
) -> None:
    """Train every arm of RECIPE with every setting and seed; say what each kept at equal learning.

    Every adapter is measured at several scales too, which costs no training. Settings are chosen on validation data and
    reported on test data. A run that fails is recorded, and the rest goes on. Killed and started again, only what is
    missing is run; arms, values, seeds and scales may be added. Written: a ledger, a page, a figure, two tables.

    **Examples**

    `holdfast compare recipes/lab_compare.yaml --check`

    `holdfast compare recipes/lab_compare.yaml`
    """
    from rich.console import Console

    from ..recipe import compare as runs
    from ..recipe.config import load
    from ..recipe.processes import processes_for

    console = Console(width=max(Console().width, 120))

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    with console.status("reading the recipe ..."):
        asked = load(recipe)
        comparing, plan = runs.comparing_in(asked), runs.plan(asked, retry_failed=retry_failed)
    if check:
        say(f"{recipe} is fine. It would run:")
        for line in planned(comparing, plan, processes_for(processes)):
            say(f"  {line}")
        return
    started = time.perf_counter()
    with runs_bar(console) as bar:
        task = bar.add_task("runs", total=len(plan.todo), visible=bool(plan.todo))

        def told(done: float, total: int) -> None:
            bar.update(task, completed=done, total=total)

        entries = runs.run(
            asked, processes=processes, retry_failed=retry_failed, keep_adapters=keep_adapters, say=say, told=told
        )
    _tell(comparing, entries, asked.output, console)
    say(f"ledger: {asked.ledger}\n{time.perf_counter() - started:.0f} seconds in all.")


def planned(comparing: Comparing, plan: Plan, processes: int) -> list[str]:
    """Return, in lines, what a comparison will do."""
    from ..recipe.compare_results import no_evidence

    lines = []
    for arm in dict.fromkeys(variant.arm for variant in comparing.variants):
        own = [variant for variant in comparing.variants if variant.arm == arm]
        told = "; ".join(", ".join(f"{k} {v}" for k, v in variant.settings.items()) or "as it is" for variant in own)
        note = " (the baseline)" if arm == comparing.baseline else ""
        lines.append(f"arm {arm}{note}: {len(own)} setting{'s' * (len(own) > 1)}: {told}")
        if why := own[0].recipe.model.why_no_scale():
            lines.append(f"  measured at scale 1 alone: {why}")
    points = sum(len(list(job.points())) for job in plan.jobs)
    seeds = ", ".join(map(str, comparing.seeds))
    lines += [
        f"matched by {comparing.learn}; compared by {', '.join(comparing.keep)}",
        f"{len(plan.jobs)} runs: {len(comparing.variants)} settings, seeds {seeds}",
        f"{points} points, each measured on validation and test",
    ]
    if plan.failed:
        lines.append(f"{len(plan.failed)} runs failed, and are run again with --retry-failed alone")
    if plan.todo:
        minutes = plan.minutes(processes)
        long = "a minute or less" if (minutes or 0) <= 1 else f"{minutes:.0f} minutes"
        lines.append(f"{len(plan.todo)} runs are left, {processes} at a time: " + (
            "how long that takes is known when the first of them is finished; ask again then" if minutes is None
            else f"about {long}, as runs took so far"
        ))  # fmt: skip
    else:
        lines.append("0 runs are left: the table and the page are made of what is there")
    return [*lines, *filter(None, [no_evidence(comparing)])]


def _tell(comparing: Comparing, entries: Sequence[Entry], folder: Path, console: Console) -> None:
    """Print what came out, and write the files."""
    from ..recipe.compare_results import no_evidence, results, write

    def warn(text: str) -> None:
        console.print(text, style="yellow", highlight=False, markup=False, soft_wrap=True)

    failures = failed(entries)
    for line in failures:
        warn(line)
    if failures:
        warn("Failed runs count as tried and have no points; --retry-failed runs them again.")
    found = results(comparing, entries)
    table = kept_table(
        found.entries, found.readings, found.comparisons, comparing.baseline, comparing.learn, comparing.keep,
        kinds=found.kinds,
    )  # fmt: skip
    console.print(table)
    tell_verdicts(found.comparisons, comparing.baseline, console)
    for line in filter(None, [*found.notes, no_evidence(comparing)]):
        warn(line)
    paths = write(comparing, found, folder)
    console.print("\n".join(map(str, paths)), highlight=False, markup=False, soft_wrap=True)


def failed(entries: Sequence[Entry]) -> list[str]:
    """Return what failed, in lines: the seeds of a setting that have one error together."""
    from ..drift.entry import POSTHOC

    seeds: dict[tuple[str, ...], list[int]] = {}
    for entry in entries:
        if entry.status == "failed":
            told = [f"{name} {value}" for name, value in entry.settings.items() if name not in POSTHOC]
            seeds.setdefault((", ".join([entry.arm, *told]), entry.error or ""), []).append(entry.seed)
    return [
        f"failed: {what}, seed{'s' * (len({*own}) > 1)} {', '.join(map(str, sorted({*own})))}: {error}"
        for (what, error), own in seeds.items()
    ]
