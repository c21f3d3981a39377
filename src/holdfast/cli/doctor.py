"""`holdfast doctor`: is everything here that a recipe needs; and of one recipe: can it run, and what does it take?"""

from __future__ import annotations

import platform
import warnings
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from ..recipe.doctor import Report, StageMemory

TESTED = {
    "torch": "2.13.0",
    "transformers": "5.23.0",
    "trl": "1.16.0",
    "peft": "0.21.2",
    "accelerate": "1.15.0",
    "datasets": "5.2.0",
    "safetensors": "0.8.0",
    "numpy": "2.4.6",
    "scipy": "1.17.1",
    "matplotlib": "3.11.2",
}
"""The versions of constraints.txt, which is not part of an installed package; a test compares the two."""
EXTRAS = {
    "transformers": "trl", "trl": "trl", "peft": "trl", "accelerate": "trl", "datasets": "trl",
    "numpy": "report", "scipy": "report", "matplotlib": "report",
}  # fmt: skip
UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
SIGNS = {"ok": "[green]ok     [/]", "warning": "[yellow]warning[/]", "fault": "[red]fault  [/]"}
WHEN = {
    "held": "always", "forward": "in a step", "moment": "for a moment", "update": "at the optimizer's step",
    "start": "before the first step, and at refreshes", "host": "on the host", "disk": "on disk",
}  # fmt: skip


def doctor(
    recipe: Path | None = typer.Argument(None, help="A YAML recipe. Without one: versions, device, what is missing."),
    memory: str = typer.Option("", help="Of the device that it will run on: 80GiB. This machine's if left out."),
    length: int | None = typer.Option(None, min=1, help="Tokens of a sequence; the stage's max_length if left out."),
    batch: int | None = typer.Option(None, min=1, help="Sequences of a micro-batch, instead of the recipe's."),
    load: bool = typer.Option(False, "--load", help="Read weights and hub data, to prove what can be proven."),
    launch: Path | None = typer.Option(None, help="accelerate's config file with which the recipe will be launched."),
    json: bool = typer.Option(False, "--json", help="Print everything as JSON."),
) -> None:
    """Say, before a run, whether RECIPE can work and what it takes: no training, no weights read unless they are small.

    Every check at once, each ok, a warning or a fault; a fault gives exit code 1. Is the recipe valid, are model and
    data there and whole, is the reference the base, do host and sharding suit the methods, are there enough retain
    data, is there room on the disk, does it fit the memory? The memory comes line by line, with what each method adds
    and its formula: what is held is exact, activations and workspaces are estimates (docs/memory.md).

    **Examples**

    `holdfast doctor`

    `holdfast doctor recipes/lab_sft.yaml`

    `holdfast doctor recipes/qwen_sft.yaml --memory 80GiB --length 4096 --batch 2`
    """
    if recipe is None:
        if memory or length or batch or load or launch or json:
            raise typer.BadParameter("these options are about a recipe: holdfast doctor RECIPE --memory 80GiB")
        _installed()
        return
    from rich.console import Console
    from transformers.utils.logging import disable_progress_bar

    from ..recipe.doctor import Question, examine

    console, limit = Console(width=max(Console().width, 140)), size_of(memory) if memory else None
    if launch is not None and not launch.is_file():
        raise typer.BadParameter(f"there is no file {launch}: give accelerate's config file", param_hint="--launch")
    with Console(stderr=True).status("looking at the recipe ..."), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of host libraries among themselves
        disable_progress_bar()
        report = examine(Question(recipe, limit, length, batch, load, launch))
    if json:
        console.print_json(data=plain(report))
    else:
        _tell(report, console)
    if report.faulty:
        raise typer.Exit(1)


def size_of(text: str) -> int:
    """Return the bytes that a size stands for.

    >>> size_of("80GiB"), size_of("1.5 GB")
    (85899345920, 1500000000)

    Raises:
        typer.BadParameter: if it is none.
    """
    for unit, size in UNITS.items():
        number = text.strip().removesuffix(unit)
        if number != text.strip() and number.strip().replace(".", "", 1).isdigit():
            return int(float(number) * size)
    raise typer.BadParameter(f"a size is a number with its unit, 80GiB or 24GB, got {text!r}", param_hint="--memory")


def plain(report: Report) -> dict[str, Any]:
    """Return a report as plain values."""
    stages = [
        {"stage": each.name, "tokens": each.tokens, "peak": each.peak, "parts": [asdict(part) for part in each.parts]}
        for each in report.memory
    ]
    return {
        "works": not report.faulty,
        "findings": [asdict(found) for found in report.findings],
        "device": {"name": report.device, "memory": report.limit},
        "memory": stages,
    }


def _tell(report: Report, console: Console) -> None:
    from rich.markup import escape

    for found in report.findings:
        line = f"{SIGNS[found.status]} [bold]{escape(found.about)}[/]: {escape(found.text)}"
        console.print(line, highlight=False, soft_wrap=True)
    for stage in report.memory:
        console.print()
        console.print(table(stage))
        text = f"at most about {_gib(stage.peak)} GiB at one time, of {_gib(report.limit)} GiB ({report.device})"
        console.print(text, highlight=False, soft_wrap=True)
    faults = sum(found.status == "fault" for found in report.findings)
    warnings = sum(found.status == "warning" for found in report.findings)
    verdict = "it can run" if not faults else "it cannot run as it is"
    console.print(f"\n{verdict}: {faults} faults, {warnings} warnings", highlight=False)


def table(stage: StageMemory) -> Table:
    """Return what a stage takes, the host first, then each method."""
    from rich.markup import escape
    from rich.table import Table

    shown = Table(title=f"memory of {stage.name}, {stage.tokens:,} tokens a micro-batch", title_style="", box=None)
    shown.add_column("of")
    shown.add_column("what")
    shown.add_column("GiB", justify="right")
    for column in ("when", "how", ""):
        shown.add_column(column)
    for part in stage.parts:
        sure = "exact" if part.exact else "estimate"
        cells = (part.of or "the host", part.name, _gib(part.size), WHEN[part.when], part.formula, sure)
        shown.add_row(*map(escape, cells))
    return shown


def _gib(size: int) -> str:
    return f"{size / 2**30:.3f}" if size < 10 * 2**30 else f"{size / 2**30:.1f}"


def _installed() -> None:
    """Report python, device, installed versions against tested ones, and what is missing."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.print(f"python {platform.python_version()} on {platform.system()} {platform.machine()}", highlight=False)
    console.print(f"device: {_device()}", highlight=False)
    shown = Table(box=None, pad_edge=False)
    for column in ("package", "here", "tested", ""):
        shown.add_column(column)
    missing = set()
    for package, tested in TESTED.items():
        try:
            here = metadata.version(package)
        except metadata.PackageNotFoundError:
            missing.add(EXTRAS.get(package, ""))
            shown.add_row(package, "–", tested, "missing")
            continue
        shown.add_row(package, here, tested, "" if here.split("+")[0] == tested else "another version: run the tests")
    console.print(shown)
    if missing:
        wanted = ",".join(sorted(missing - {""}))
        console.print(f"\npip install 'holdfast[{wanted}]'  brings what is missing", highlight=False, markup=False)
        raise typer.Exit(1)
    console.print("\neverything is here", highlight=False)


def _device() -> str:
    try:
        import torch
    except ImportError:
        return "unknown (torch is missing)"
    if torch.cuda.is_available():
        return (
            f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}, bfloat16 {torch.cuda.is_bf16_supported()}"
        )
    if torch.backends.mps.is_available():
        return "Apple MPS"
    return f"CPU, {torch.get_num_threads()} threads (bf16 and gradient checkpointing are off unless a recipe asks)"
