"""`holdfast lab`: the embedded models, and how to make them again."""

from __future__ import annotations

from pathlib import Path

import typer

lab = typer.Typer(no_args_is_help=True, help="The embedded lab: a small world, its two tiny models, its tasks.")


@lab.command()
def build(
    output: Path = typer.Argument(Path("lab-models"), help="Folder for lab-pretrained/ and lab-aligned/."),
    seed: int = typer.Option(0, help="Of the first weights and of the data."),
    steps: int | None = typer.Option(None, min=1, help="Stop each phase after so many steps (for a quick look)."),
) -> None:
    """Make both lab models from nothing but code and a seed.

    **Example**: `holdfast lab build my-lab --steps 50`
    """
    from ..lab.build import build as make

    for name, folder in make(output, seed=seed, steps=steps).items():
        typer.echo(f"{name}: {folder}")


@lab.command()
def show() -> None:
    """Say what the lab has: models with their scores, tasks, and how a recipe names them."""
    import json

    from .. import lab as room
    from ..recipe.data import LAB

    for name in room.NAMES:
        record = room.path(name) / "provenance.json"
        typer.echo(f"{name}: {room.path(name)}")
        if record.is_file():
            facts = json.loads(record.read_text())
            made = ", ".join(f"{key} {facts[key]}" for key in ("parameters", "steps", "seed") if key in facts)
            typer.echo(f"  {made}" if made else "")
    typer.echo("\nIn a recipe:  model: {name: lab-aligned, lora: {r: 8}}")
    typer.echo("              data: " + " | ".join(f"lab:{task}" for task in LAB))
