"""`holdfast drift`: what did tuning break? Numbers, intervals, a page, and an exit code that a pipeline can hang on."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from ..recipe.drift import Answered

MEASURES, OUTPUT, RUNNING = "What is measured", "What is written", "How it runs"


def drift(
    base: str = typer.Argument(..., help="The model before tuning: a hub name, a folder, lab-aligned."),
    adapter: list[Path] = typer.Option([], help="Folder of an adapter of BASE; a second is what it is compared with."),
    tuned: list[Path] = typer.Option([], help="Folder of a whole model that was tuned from BASE."),
    name: list[str] = typer.Option([], help="What they are called, in their order; their folders' names if left out."),
    suite: str = typer.Option("", help="core, lab, none, or a file of prompts.", rich_help_panel=MEASURES),
    split: str = typer.Option(
        "", help="Of the suite: test, validation, train, all (the lab: test).", rich_help_panel=MEASURES
    ),
    text: list[str] = typer.Option([], help="Text to keep, NAME=FILE: perplexity and KL.", rich_help_panel=MEASURES),
    inputs: list[str] = typer.Option([], help="Prompts, NAME=FILE (the task's): KL.", rich_help_panel=MEASURES),
    exact: list[str] = typer.Option([], help="Questions and answers, NAME=FILE.", rich_help_panel=MEASURES),
    choices: list[str] = typer.Option([], help="Multiple choice, NAME=FILE.", rich_help_panel=MEASURES),
    ifeval: str = typer.Option("", help="Instructions in IFEval's format.", rich_help_panel=MEASURES),
    lm_eval: list[str] = typer.Option([], help="A task of lm-eval.", rich_help_panel=MEASURES),
    include_path: str = typer.Option("", help="A folder of lm-eval tasks of your own.", rich_help_panel=MEASURES),
    judges: str = typer.Option("", help="A file that names judges (docs/judges.md).", rich_help_panel=MEASURES),
    limit: int | None = typer.Option(None, min=1, help="Rows of each file at most.", rich_help_panel=MEASURES),
    max_new_tokens: int | None = typer.Option(
        None, min=1, help="Where answers are cut off; 64.", rich_help_panel=MEASURES
    ),
    gate: Path | None = typer.Option(None, help="Budgets: exit 1 if one is exceeded.", rich_help_panel=OUTPUT),
    output: Path | None = typer.Option(None, help="Folder; runs/drift-NAME.", rich_help_panel=OUTPUT),
    ledger: Path | None = typer.Option(None, help="A ledger to append to; OUTPUT's own.", rich_help_panel=OUTPUT),
    seed: int = typer.Option(0, help="Of the training run, for the record.", rich_help_panel=OUTPUT),
    batch_size: int | None = typer.Option(
        None, min=1, help="Answers at a time; changes no score.", rich_help_panel=RUNNING
    ),
    dtype: str = typer.Option("float32", help="auto, float32, bfloat16, float16.", rich_help_panel=RUNNING),
    device: str | None = typer.Option(None, help="cpu, cuda, cuda:1; a GPU if any.", rich_help_panel=RUNNING),
    revision: str | None = typer.Option(None, help="Of a hub model.", rich_help_panel=RUNNING),
    any_base: bool = typer.Option(False, help="Take an adapter that names another base.", rich_help_panel=RUNNING),
    trust_remote_code: bool = typer.Option(False, help="Run code from the model.", rich_help_panel=RUNNING),
) -> None:
    """Measure what tuning BASE did to it: refusals, answers, probabilities, item by item; exit 1 if a gate says so.

    Started again after a kill, it goes on where it was. Nothing is merged, and nothing is downloaded but what you name.

    **Examples**

    `holdfast drift lab-aligned --adapter runs/lab-sft/adapter`

    `holdfast drift Qwen/Qwen2.5-0.5B-Instruct --adapter my-adapter --text wiki=wiki.jsonl --gate gate.yaml`

    `holdfast drift BASE --adapter ours --adapter plain --lm-eval arc_easy --limit 200`
    """
    from rich.console import Console

    from ..core.errors import ConfigError
    from ..recipe.drift import Question, name_of, run
    from ..recipe.drift_probes import Wanted
    from ..recipe.model import DTYPES, ModelSpec

    faults = [f"--dtype must be one of {', '.join(DTYPES)}, got {dtype!r}"] if dtype not in DTYPES else []
    folders = [str(folder) for folder in (*adapter, *tuned)]
    names = [*name, *map(name_of, folders[len(name) :])]
    if len(name) > len(folders):
        faults.append(f"there are {len(name)} names for {len(folders)} tuned models")
    faults += [f"two tuned models are called {one!r}; give each a --name" for one in set(names) if names.count(one) > 1]
    if not 1 <= len(folders) <= 2:
        faults.append(f"give one --adapter (or --tuned), or two to compare, got {len(folders)}")
    given = {"text": text, "inputs": inputs, "exact": exact, "choices": choices}
    files = {option: _named(each, option, faults) for option, each in given.items()}
    if faults:
        raise ConfigError("holdfast drift", faults)
    console = Console(width=max(Console().width, 132))
    asked = Question(
        base=ModelSpec(base, dtype=dtype, revision=revision, trust_remote_code=trust_remote_code),
        tuned=dict(zip(names, folders, strict=True)),
        wanted=Wanted(
            suite, split, max_new_tokens, **files, ifeval=ifeval, lm_eval=tuple(lm_eval), include_path=include_path,
            limit=limit, judges=judges,
        ),
        output=output or Path("runs") / f"drift-{names[0]}", ledger=ledger, gate=gate, seed=seed,
        batch_size=batch_size, device=device, any_base=any_base, command=shlex.join(["holdfast", *sys.argv[1:]]),
    )  # fmt: skip
    asked.output.mkdir(parents=True, exist_ok=True)
    with Bar(console) as bar:
        answered = run(asked, lambda said: console.print(said, highlight=False, markup=False, soft_wrap=True), bar)
    console.print(table(answered, names))
    for doubt in answered.doubts:
        console.print(doubt, style="yellow", highlight=False, markup=False, soft_wrap=True)
    for what, why in answered.not_measured.items():
        console.print(f"not measured: {what}: {why}", style="dim", highlight=False, markup=False, soft_wrap=True)
    console.print(f"report: {answered.report}\nledger: {ledger or asked.output / 'ledger.jsonl'}", highlight=False)
    _verdict(answered, console)


def _named(given: list[str], option: str, faults: list[str]) -> dict[str, str]:
    """NAME=FILE, or FILE alone, which is called by its stem."""
    found: dict[str, str] = {}
    for each in given:
        name, equals, path = each.partition("=")
        name, path = (name, path) if equals else (Path(each).stem, each)
        name = name.replace(".", "_")
        if name in found:
            faults.append(f"--{option}: {name!r} is given twice")
        if not Path(path).exists():
            faults.append(f"--{option}: there is no file {path}")
        found[name] = path
    return found


class Bar:
    """A progress bar: which probe, on which side, how many items."""

    def __init__(self, console: Console) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self.progress = Progress(*columns, console=console, transient=True)

    def __enter__(self) -> Bar:
        self.progress.start()
        self.task = self.progress.add_task("loading", total=None)
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def start(self, probe: str, side: str, size: int) -> None:
        """A probe begins."""
        self.progress.reset(self.task, total=size, description=f"{side}: {probe}")

    def tick(self, items: int) -> None:
        """Items are finished."""
        self.progress.advance(self.task, items)


def table(answered: Answered, names: list[str]) -> Table:
    """Every score of the base and of what was tuned, with the drift of the first, its interval and p."""
    from rich.table import Table

    from ..analysis.paired import drifts
    from ..analysis.scores import find
    from ..drift.probe import BASE

    shown = Table(title="drift, with 95 % intervals; p corrected for the number of scores (Holm)", title_style="")
    for column in ("score", BASE, *names, "drift", "95 % interval", "p", "n"):
        shown.add_column(column, justify="left" if column == "score" else "right", no_wrap=True)
    base, first = answered.entries[BASE].scores, answered.entries[names[0]].scores
    kinds = {name: known for name in base if (known := find(name))}
    for one in drifts({name: base[name] for name in kinds}, first, kinds):
        known, (low, high) = kinds[one.score], one.interval
        style = ("red" if one.forgetting > 0 else "green") if one.adjusted < 0.05 else ""
        values = [known.show(answered.entries[side].scores[one.score].value) for side in (BASE, *names)]
        span = f"{known.show(low, signed=True)} to {known.show(high, signed=True)}"
        shown.add_row(
            one.score, *values, known.show(one.change.value, signed=True), span, f"{one.adjusted:.2g}",
            str(one.change.n or ""), style=style,
        )  # fmt: skip
    return shown


def _verdict(answered: Answered, console: Console) -> None:
    """Say what the gate says; exit 1 if it failed."""
    if answered.judgement is None:
        return
    for verdict in answered.judgement.verdicts:
        if verdict.outcome != "pass":
            console.print(f"{verdict.outcome}: {verdict.why}", highlight=False, markup=False, soft_wrap=True)
    console.print("gate passed" if answered.judgement.passed else "gate failed", style="bold")
    if not answered.judgement.passed:
        raise typer.Exit(1)
