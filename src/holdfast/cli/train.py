"""`holdfast train`: run a recipe, or only check it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from ..recipe.config import Recipe
    from ..recipe.run import Result


def train(
    recipe: Path = typer.Argument(..., help="A YAML recipe; see docs/recipes.md and recipes/."),
    check: bool = typer.Option(False, "--check", help="Only validate: print what would run, or every fault."),
) -> None:
    """Train what RECIPE asks for; started again after a kill, go on from the last complete checkpoint.

    **Examples**

    `holdfast train recipes/lab_sft.yaml --check`

    `holdfast train recipes/lab_sft.yaml`

    `accelerate launch --num_processes 4 -m holdfast train recipe.yaml`
    """
    from rich.console import Console

    from ..core.errors import WrongSetup
    from ..recipe.config import load

    console = Console()
    with console.status("reading the recipe ..."):
        asked = load(recipe)
    if asked.compare is not None:
        raise WrongSetup(f"{recipe} compares arms, each a run of its own: holdfast compare {recipe}")
    if check:
        console.print(f"{recipe} is fine. It would run:")
        for line in plan(asked):
            console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)
        return
    from ..core.distributed import rank
    from ..recipe.run import run

    def say(text: str) -> None:
        if rank() == 0:
            console.print(text, highlight=False, markup=False, soft_wrap=True)

    result = run(asked, say)
    if rank() == 0:
        console.print(table(result))
        console.print(f"result: {result.folder}\nledger: {result.ledger}", highlight=False, soft_wrap=True)


def plan(recipe: Recipe) -> list[str]:
    """Return, in lines, what a recipe will do."""
    from ..core.method import samples_pool

    kind = recipe.model.peft_type or "all weights"
    settings = ", ".join(f"{key}={value}" for key, value in recipe.model.adapter.items() if key != "task_type")
    lines = [f"model: {recipe.model.name} ({kind}{': ' if settings else ''}{settings})"]
    for number, stage in enumerate(recipe.stages, 1):
        options = ", ".join(f"{key}={value}" for key, value in stage.options.items())
        lines.append(f"stage {number}: {stage.trainer} on {stage.data.path}; {options or 'the defaults of TRL'}")
        if stage.replay:
            lines.append(f"  replay: {stage.replay:.0%} of its rows are drawn from the retain data")
        lines += [f"  method: {method.describe()}" for method in stage.methods]
        if not recipe.retain and any(samples_pool(method) for method in stage.methods):
            lines.append("  retain: a pool that the base writes before training (docs/pool.md)")
        if stage.methods:
            lines.append(f"  reference: {stage.reference or 'base'}")
    if recipe.retain:
        lines.append(f"retain: {recipe.retain.path}")
        if not any(stage.replay or any(m.uses_retain for m in stage.methods) for stage in recipe.stages):
            lines.append("  note: neither a method nor `replay` of this recipe uses retain data")
    if recipe.cache is not False:
        lines.append(f"cache: what the base says of the task is kept ({recipe.cache}; docs/cache.md)")
    if recipe.drift:
        lines.append(f"drift, measured while it trains: {recipe.drift}")
    for split, measured in recipe.measured.items():
        places = ", ".join(f"{name} ({data.path})" for name, data in measured.items())
        lines.append(f"measured before and after, {split}: {places}; adapter scales {list(recipe.scales)}")
    return [*lines, f"output: {recipe.output}", f"ledger: {recipe.ledger} (experiment {recipe.experiment!r})"]


def table(result: Result) -> Table:
    """Return the scores of a run, the base first."""
    from rich.table import Table

    names = list(dict.fromkeys(name for entry in result.entries for name in entry.scores))
    shown = Table(title="mean next-token loss, ± one standard error over rows", title_style="")
    for column in ("model", "scale", "split", *names):
        shown.add_column(column, justify="left" if column == "model" else "right")
    for entry in result.entries:
        cells = []
        for name in names:
            score = entry.scores.get(name)
            error = f" ± {score.standard_error:.3f}" if score and score.standard_error is not None else ""
            cells.append(f"{score.value:.3f}{error}" if score else "–")
        shown.add_row(entry.arm, str(entry.settings.get("scale", "–")), entry.split, *cells)
    return shown
