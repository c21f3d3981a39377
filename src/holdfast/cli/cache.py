"""`holdfast cache`: run the base on a recipe's training data ahead of training, and look at what is kept."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import typer

cache = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Keep what the base says of the training data, so that it need not run while a model is trained.",
)


@cache.command()
def build(
    recipe: Path = typer.Argument(..., help="A recipe with `cache: true`, or `cache: {folder: ..., dtype: float16}`."),
    stage: int | None = typer.Option(None, min=1, help="Only this stage. Default: every stage that keeps something."),
    batch_size: int | None = typer.Option(None, min=1, help="Sequences at a time; the stage's own if left out."),
) -> None:
    """Run the base of RECIPE once over its training data and keep what its methods need, so that no epoch runs it.

    The same is kept while the first epoch trains; this does it ahead: once for many runs on the same data, or on
    another machine. Strengths and learning rates do not matter to it, and neither do seeds, unless `replay` draws rows
    by one. Stopped, and started again, it goes on with what is there. If the recipe names the folder, training then
    takes a sequence that is not in it for a mistake, and stops.

    **Examples**

    `holdfast cache build recipe.yaml`

    `holdfast cache build recipe.yaml --stage 1 --batch-size 64`

    `accelerate launch --num_processes 4 -m holdfast cache build recipe.yaml`
    """
    from rich.console import Console
    from rich.progress import Progress

    from ..core.distributed import rank
    from ..core.errors import WrongSetup
    from ..recipe.config import load
    from ..recipe.keeping import build as run_base
    from ..recipe.keeping import stages_to_build

    console = Console()
    with console.status("reading the recipe ..."):
        asked = load(recipe)
    if asked.compare is not None:
        raise WrongSetup(
            f"{recipe} compares arms, which find what others have kept by themselves (`cache: true`). To build ahead, "
            "give a recipe of one arm."
        )
    numbers = stages_to_build(asked)
    if stage is not None and stage - 1 not in numbers:
        raise WrongSetup(f"Stage {stage} keeps nothing; there is {', '.join(str(number + 1) for number in numbers)}.")

    for number in numbers if stage is None else [stage - 1]:

        def bar(batches: Iterable[Any], length: int, title: str = f"stage {number + 1}") -> Iterable[Any]:
            with Progress(console=console, transient=True, disable=rank() != 0) as progress:
                yield from progress.track(batches, total=length, description=f"the base on {title}")

        folder = run_base(asked, number, bar, batch_size)
        if rank() == 0:
            _tell(console, folder)


@cache.command()
def show(folder: Path = typer.Argument(..., help="The folder of a cache.")) -> None:
    """Say what a cache keeps, how much of it, and what it depends on.

    **Example**: `holdfast cache show kept`
    """
    from rich.console import Console

    _tell(Console(), folder)


def _tell(console: Any, folder: Path) -> None:
    from rich.table import Table

    from ..core.errors import WrongSetup
    from ..retain.task_folder import contents, manifest

    found = manifest(folder)
    if found is None:
        raise WrongSetup(
            f"{folder} is no cache of the task: it has no cache.json. Give the folder that training or `holdfast cache "
            "build` names."
        )
    table = Table(title=str(folder))
    for column in ("kept", "sequences", "supervised tokens", "bytes a token", "MB", "built ahead"):
        table.add_column(column, justify="left" if column == "kept" else "right")
    for kind in contents(folder, found):
        each = f"{kind.size / kind.tokens:,.0f}" if kind.tokens else ""
        whole = "yes" if kind.name in found.whole else "no"
        table.add_row(kind.name, f"{kind.sequences:,}", f"{kind.tokens:,}", each, f"{kind.size / 1e6:,.1f}", whole)
    console.print(table)
    for name, value in found.facts.items():
        if name != "format":
            console.print(f"  {name}: {value}", highlight=False, markup=False, soft_wrap=True)
