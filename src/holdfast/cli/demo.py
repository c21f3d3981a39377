"""`holdfast demo`: tune real small models with and without protection, and show what was kept at equal learning."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from .kept import kept_table, runs_bar, tell_verdicts

if TYPE_CHECKING:
    from ..drift.ledger import Entry, Ledger
    from ..recipe.demo import Job

BASELINE = "plain LoRA"
SHOWN = ("skills", "refusal", "refusal_nll", "over_refusal", "story_perplexity")
PANELS = ("skills", "refusal_nll", "story_perplexity")
NOTE = (
    "A toy: a model of a million parameters in a world made by code, one base model, few seeds. It shows how methods "
    "are compared (learning matched, settings chosen on one split and reported on another, post-hoc adapter scaling "
    "given to every arm), not which of them wins on your model. Self-replay, which gives a quarter of every batch to "
    "what it keeps, trains twice as many steps as the rest; plain LoRA may do so too."
)
COLUMNS = ("skills", "refused", "refusal loss", "over-refused", "story ppl")  # short names of SHOWN


def demo(
    output: Path = typer.Option(Path("runs/demo"), help="Where the ledger, the figure and the page go."),
    seeds: int = typer.Option(2, min=1, help="Seeds for every setting; three or more before you claim anything."),
    processes: int = typer.Option(0, min=0, help="Trainings at a time, one thread each; 0: one per core, at most 8."),
    steps: int = typer.Option(120, min=1, help="Optimizer steps of a training; some are twice as long."),
    items: int = typer.Option(32, min=2, help="Prompts per skill and split."),
    fresh: bool = typer.Option(False, "--fresh", help="Start over, even if the folder has results to continue from."),
) -> None:
    """Tune the lab's aligned model with plain LoRA, two KLs and self-replay; show what each one kept.

    Offline, five to eight minutes on two cores. Every arm tries several settings, each with post-hoc adapter scaling.
    Killed and started again, it goes on where it was. Results: a table here, a ledger, a figure and one HTML page.
    """
    from ..analysis.figure import frontier_png
    from ..analysis.report import write_report
    from ..core.errors import WrongSetup
    from ..drift.ledger import Ledger
    from ..recipe import demo as runs

    started = time.perf_counter()
    if fresh:
        (output / "ledger.jsonl").unlink(missing_ok=True)
    ledger = Ledger(output / "ledger.jsonl")
    if runs.measured_otherwise(ledger.entries(runs.EXPERIMENT), steps, items):
        raise WrongSetup(
            f"{ledger.path} holds a demo with other --steps or --items, or of an older version, which cannot be "
            "continued or compared with this one. Start over with --fresh, or choose another --output."
        )
    _train_all(ledger, runs.jobs(seeds), steps, items, processes or min(os.cpu_count() or 1, 8))
    entries = [entry for entry in ledger.entries(runs.EXPERIMENT, status=None) if entry.seed < seeds]
    entries.sort(key=lambda entry: entry.arm != BASELINE)  # what the others are compared with comes first
    levels = _print_tables(entries)
    frontier_png(entries, output / "frontier.png", PANELS, levels=levels)
    page = write_report(entries, output / "report.html", baseline=BASELINE, retention=SHOWN, levels=levels, note=NOTE)
    typer.echo(f"\nLedger, figure and page: {output}/ledger.jsonl, frontier.png, {page.name}")
    typer.echo(f"{time.perf_counter() - started:.0f} seconds in all.")


def _train_all(ledger: Ledger, jobs: list[Job], steps: int, items: int, processes: int) -> None:
    """Run what the ledger lacks, in processes of one thread each, under one progress bar."""
    from ..core.errors import HoldfastError
    from ..recipe import demo as runs
    from ..recipe.processes import Failed, count, performed

    done = ledger.runs(runs.EXPERIMENT)
    todo = [job for job in jobs if job.missing(done)]
    if len(todo) < len(jobs):
        typer.echo(f"{len(jobs) - len(todo)} of {len(jobs)} runs are in {ledger.path} already; --fresh starts over.")
    tasks: dict[Job | str, Callable[[], list[Entry]]] = {
        job: partial(runs.run, job, steps, items, on_step=count) for job in todo
    }
    if len(ledger.entries(runs.EXPERIMENT, arm=runs.BASE)) < len(runs.SPLITS):
        tasks[runs.BASE] = partial(runs.base_entries, items)
    with runs_bar(unit=" steps") as bar:
        task = bar.add_task("measuring the base", total=sum(job.length for job in todo) * steps)
        for key, outcome in performed(tasks, processes, told=lambda done: bar.update(task, completed=done)):
            if isinstance(outcome, Failed):
                raise HoldfastError(f"A run of the demo failed: {outcome.error}\n{outcome.trace}")
            for entry in outcome:
                ledger.append(entry)
            bar.update(task, description=f"tuned: {key if isinstance(key, str) else key.arm}")


def _print_tables(entries: list[Entry]) -> tuple[float, ...]:
    """Print what was measured and what it means; return the levels of adaptation that were compared."""
    from rich.console import Console

    from ..analysis.frontier import at_matched_learning, compare, matched_levels

    console = Console(width=140)
    levels = tuple(dict.fromkeys(matched_levels(entries, BASELINE)))
    readings = at_matched_learning(entries, "adaptation", SHOWN, levels)
    comparisons = compare(readings, BASELINE)
    console.print(kept_table(entries, readings, comparisons, BASELINE, "adaptation", SHOWN, titles=COLUMNS))
    tell_verdicts(comparisons, BASELINE, console)
    return levels
