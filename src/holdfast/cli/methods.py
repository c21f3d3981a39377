"""`holdfast methods`: what there is, one line each; `holdfast methods show NAME`: all about one."""

from __future__ import annotations

import inspect
import re
import sys
import textwrap
from collections.abc import Callable
from dataclasses import MISSING, Field, fields
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from ..core.method import Method

BASELINES = {
    "replay": "retain rows mixed into the task data: `replay: 0.3` in a stage of a recipe, or integrations.replay.mix",
    "adapter scaling": "a weaker adapter after training: `scales: [0.5, 0.7, 1.0]` under `evaluate` in a recipe",
}

OF_A_BUDGET = ("budget", "budget_every")  # which gradient methods refuse

methods = typer.Typer(invoke_without_command=True, help="What protects a model: every method, one line each.")


@methods.callback()
def show_all(context: typer.Context) -> None:
    """List every method with its space and one line; `holdfast methods show NAME` says all about one."""
    if context.invoked_subcommand is not None:
        return
    from ..core import registry

    known = registry.methods()
    width = max(map(len, known))
    for name, method in known.items():
        needs = f" ({data})" if (data := _data_of(method)) else ""
        typer.echo(f"{name:{width}}  {method.space:8}  {first_sentence(method)}{needs}")
    typer.echo("\nPresets, papers as lists of methods:")
    for name, preset in presets().items():
        typer.echo(f"{name:{width}}  {first_sentence(preset)}")
    typer.echo("\nBaselines that are no method, to compare with:")
    for name, what in BASELINES.items():
        typer.echo(f"{name:{width}}  {what}")
    typer.echo("\nholdfast methods show NAME  for the equation, the paper and the settings")


@methods.command()
def show(name: str = typer.Argument(..., help="As `holdfast methods` lists it.")) -> None:
    """Show a method: its equation and paper, its settings with defaults, and how a recipe names it."""
    from ..core import registry

    if name in presets() and name not in registry.methods():
        typer.echo(f"{name} (preset)\n\n{inspect.getdoc(presets()[name])}\n\nIn a recipe:  methods: [{name}]")
        return
    method = registry.get(name)
    module = sys.modules[method.__module__]
    about = documented(method)
    data = _data_of(method)
    typer.echo(f"{name} ({method.space} space{f'; {data}' if data else ''})\n")
    typer.echo(f"{inspect.getdoc(module) or ''}\n\nSettings")
    settings = [field for field in fields(method) if field.name not in OF_A_BUDGET or method.space != "gradient"]
    for field in settings:
        typer.echo(f"  {field.name}: {_type_of(field)} = {_default_of(field)}")
        if text := about.get(field.name):
            typer.echo(textwrap.fill(text, 110, initial_indent="      ", subsequent_indent="      "))
    typer.echo(f"\nIn a recipe:  methods: [{{{name}: {{strength: {_default_of(settings[0])}}}}}]")
    if method.space != "gradient":
        typer.echo(
            f"With a budget on drift:  methods: [{{{name}: {{strength: auto, budget: 0.02}}}}]  (docs/budget.md)"
        )


def presets() -> dict[str, Callable[..., object]]:
    """Return the functions that stand for a paper's list of methods."""
    from ..methods import presets as room

    found = inspect.getmembers(room, inspect.isfunction)
    return {name: preset for name, preset in found if preset.__module__ == room.__name__ and name[0] != "_"}


def first_sentence(method: object) -> str:
    """Return the first line of the docstring of a method or a preset."""
    return (inspect.getdoc(method) or "").partition("\n")[0]


def documented(method: type[Method]) -> dict[str, str]:
    """Return what the `Attributes:` of a method's docstring, and of its bases', say of each setting."""
    found: dict[str, str] = {}
    for cls in reversed(method.__mro__):
        section = re.search(r"Attributes:\n((?: {4}.*\n?)+)", inspect.cleandoc(cls.__doc__ or "") + "\n")
        for name, text in re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", section[1] if section else "", re.M):
            found[name] = " ".join(text.split())
    return found


def _type_of(field: Field[object]) -> str:
    return field.type if isinstance(field.type, str) else getattr(field.type, "__name__", str(field.type))


def _default_of(field: Field[object]) -> str:
    return "(required)" if field.default is MISSING else repr(field.default)


def _data_of(method: type[Method]) -> str:
    if not method.uses_retain:
        return ""
    return "samples retain data from the base" if getattr(method, "samples_pool", False) else "needs retain data"
