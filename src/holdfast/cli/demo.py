"""`holdfast demo`: tune real small models with and without protection, and show what was kept at equal learning."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
import warnings
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures import TimeoutError as NotYet
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from ..analysis.frontier import Comparison
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
_steps: Synchronized[int]


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
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from ..recipe import demo as runs

    done = ledger.runs(runs.EXPERIMENT)
    todo = [job for job in jobs if job.missing(done)]
    if len(todo) < len(jobs):
        typer.echo(f"{len(jobs) - len(todo)} of {len(jobs)} runs are in {ledger.path} already; --fresh starts over.")
    context = multiprocessing.get_context("spawn")
    taken = context.Value("i", 0)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps"),
        TimeRemainingColumn(),
    )
    with (
        ProcessPoolExecutor(processes, context, initializer=_start_worker, initargs=(taken,)) as pool,
        Progress(*columns, TimeRemainingColumn()) as progress,
    ):
        bar = progress.add_task("measuring the base", total=sum(job.length for job in todo) * steps)
        waiting: dict[Future[list[Entry]], str] = {pool.submit(_run, job, steps, items): job.arm for job in todo}
        if not ledger.entries(runs.EXPERIMENT, arm=runs.BASE):
            waiting[pool.submit(runs.base_entries, items)] = runs.BASE
        while waiting:
            try:
                for future in as_completed(list(waiting), timeout=0.5):
                    for entry in future.result():
                        ledger.append(entry)
                    progress.update(bar, description=f"tuned: {waiting.pop(future)}")
            except NotYet:
                pass
            progress.update(bar, completed=taken.value)


def _end_with_parent() -> None:
    """Wait for the demo to end, however it ends, and end with it: a killed demo leaves no worker behind."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _start_worker(steps: Synchronized[int]) -> None:
    global _steps
    _steps = steps
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["OMP_NUM_THREADS"] = "1"  # two threads on so small a model are slower than one
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FutureWarning)  # hosts' deprecations are not for the reader of a demo
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"


def _run(job: Job, steps: int, items: int) -> list[Entry]:
    from ..recipe import demo as runs

    def count() -> None:
        with _steps.get_lock():
            _steps.value += 1

    return runs.run(job, steps, items, on_step=count)


def _print_tables(entries: list[Entry]) -> tuple[float, ...]:
    """Print what was measured and what it means; return the levels of adaptation that were compared."""
    from rich.console import Console
    from rich.table import Table

    from ..analysis.frontier import arms, at_matched_learning, compare, matched_levels
    from ..analysis.report import costs, summaries
    from ..analysis.scores import kind

    console = Console(width=140)
    levels = tuple(dict.fromkeys(matched_levels(entries, BASELINE)))
    readings = at_matched_learning(entries, "adaptation", SHOWN, levels)
    comparisons = compare(readings, BASELINE)
    seconds = {cost.arm: cost for cost in costs(entries, BASELINE)}
    base = next(entry for entry in entries if entry.arm == "base" and entry.split == "test")
    table = Table(title=f"Kept at equal learning: test split, mean over seeds; * = beyond noise from {BASELINE}")
    for column in ("arm", "adaptation", *COLUMNS, "s/run"):
        table.add_column(column, justify="left" if column == "arm" else "right", no_wrap=True)
    table.add_row("the base, untuned", _show(base, "adaptation"), *(_show(base, score) for score in SHOWN), "")
    clear = {(c.arm.arm, c.arm.retention, c.arm.level) for c in comparisons if c.verdict in ("better", "worse")}
    for level in levels:
        table.add_section()
        for arm in arms(entries):
            cells = []
            for reading in (r for r in readings if r.arm == arm and r.level == level):
                star = "*" if (arm, reading.retention, level) in clear else ""
                cells.append(f"{kind(reading.retention).show(reading.mean)}{star}" if reading.values else "not reached")
            mean_seconds = (seconds[arm].seconds or (0.0,))[0]
            table.add_row(arm, f"{level:.2f}", *cells, f"{mean_seconds:.1f}")
    console.print(table)
    for summary in summaries(comparisons):
        console.print(f"[bold]{summary.arm}[/bold]: {summary.sentence}")
    console.print(_noise(comparisons))
    return levels


def _show(entry: Entry, score: str) -> str:
    from ..analysis.scores import kind

    return kind(score).show(entry.scores[score].value)


def _noise(comparisons: list[Comparison]) -> str:
    """Say how many of the differences are within noise."""
    judged = [c for c in comparisons if c.verdict != "not reached"]
    noise = sum(c.verdict == "within noise" for c in judged)
    return f"{noise} of {len(judged)} differences from {BASELINE} are within noise; of 20 true ties one would not be."
