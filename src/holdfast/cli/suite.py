"""`holdfast suite`: prompts for the refusal probes. What a suite holds, a file checked, and a larger one built."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import typer

suite = typer.Typer(no_args_is_help=True, help="DriftCheck's prompts: look at them, check your own, build more.")


@suite.command()
def show(
    source: str = typer.Argument("core", help="core, or a file of prompts."),
    category: str | None = typer.Option(None, help="Print the prompts of one category."),
) -> None:
    """Count a suite's pairs and prompts by category and split; a file with faults is told all of them.

    **Examples**: `holdfast suite show`, `holdfast suite show my_prompts.jsonl --category fraud`
    """
    from collections import Counter

    from rich.console import Console
    from rich.table import Table

    from ..drift.suite import SPLITS
    from ..drift.suite import suite as load

    found = load(source)
    console = Console()
    if category is not None:
        for prompt in found.select(category=category).prompts:
            console.print(f"{prompt.expected:6}  {prompt.text}", highlight=False, markup=False, soft_wrap=True)
        return
    table = Table(title=f"{found.name}: {len(found.pairs)} pairs and {len(found.singles)} single prompts")
    for column in ("category", *SPLITS, "prompts"):
        table.add_column(column, justify="left" if column == "category" else "right")
    count = Counter((prompt.category, prompt.split) for prompt in found.prompts)
    for name in dict.fromkeys(prompt.category for prompt in found.prompts):
        cells = [count[name, split] for split in SPLITS]
        table.add_row(name, *map(str, cells), str(sum(cells)))
    console.print(table)
    console.print(f"sha256 {found.sha256}", highlight=False)


@suite.command()
def build(
    output: Path = typer.Argument(..., help="A folder for driftcheck-10k.jsonl and its manifest."),
    data: Path | None = typer.Option(None, envvar="HOLDFAST_DATA", help="Folder of local copies of the sources."),
    hub: bool = typer.Option(False, help="Read the paper's data sets from the hub instead (needs the network)."),
    per_side: int = typer.Option(5_000, min=1, help="Unsafe, and safe, prompts to aim at; nothing is padded."),
    seed: int = typer.Option(0, help="Of the choice and of the splits."),
) -> None:
    """Assemble a larger suite from public data: deduplicated, in categories and splits, with licences and a manifest.

    **Example**: `holdfast suite build my-suite --data ../shared/data`
    """
    from rich.console import Console

    from ..core.errors import WrongSetup
    from ..drift.build import build as assemble
    from ..drift.driftcheck.sources import LOCAL, PAPER

    if data is None and not hub:
        raise WrongSetup("Give --data, the folder of local copies (docs/driftcheck.md says which), or --hub.")
    command = shlex.join(["holdfast", *sys.argv[1:]])
    console = Console()
    with console.status("reading, deduplicating, choosing ..."):
        manifest = assemble(
            output, PAPER if hub else LOCAL, None if hub else data, per_side=per_side, seed=seed, command=command
        )
    for what in ("steps", "missing"):
        console.print(f"{what}: {manifest.get(what)}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"{output}/driftcheck-10k.jsonl; use it with holdfast drift BASE --suite", highlight=False)
