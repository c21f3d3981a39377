"""The command line, one file per verb; each verb imports what it needs when it is called, so that `--help` is quick.

holdfast demo                   tune small real models and see what each method kept
holdfast train recipe.yaml      train with methods that protect the model, measure, resume if killed
holdfast compare recipe.yaml    which of several arms keeps most, where all have learned as much
holdfast drift BASE --adapter D  what did tuning break? A page, and an exit code for a gate
holdfast fit LEDGER             how forgetting grows with data and size, and what to expect at more
holdfast report RUNS            one page over any ledgers: runs, frontiers, drift, fits, settings
holdfast methods                what there is; `holdfast methods show NAME` for one
holdfast suite show             DriftCheck's prompts; check your own, build more from public data
holdfast retain sample MODEL    what the base writes, once, to keep a tuned model at it; `show POOL` to read it
holdfast cache build recipe.yaml  run the base on the training data once, ahead; `show FOLDER` to see what is kept
holdfast lab build              make the lab's models again from code and a seed
holdfast doctor [recipe.yaml]   versions, device; of a recipe: can it run, and what memory does it take?
"""

from __future__ import annotations

import sys

import typer

from .cache import cache
from .compare import compare
from .demo import demo
from .doctor import doctor
from .drift import drift
from .fit import fit
from .lab import lab
from .methods import methods
from .report import report
from .retain import retain
from .suite import suite
from .train import train

app = typer.Typer(
    name="holdfast",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Fine-tune language models without losing what they knew or how they were aligned.\n\n"
    "Start with `holdfast methods`, then write a recipe and `holdfast train recipe.yaml --check`.",
)
app.command()(demo)
app.command()(train)
app.command()(compare)
app.command()(drift)
app.command()(fit)
app.command()(report)
app.add_typer(methods, name="methods")
app.add_typer(suite, name="suite")
app.add_typer(retain, name="retain")
app.add_typer(cache, name="cache")
app.add_typer(lab, name="lab")
app.command()(doctor)


@app.callback(invoke_without_command=True)
def version(show: bool = typer.Option(False, "--version", help="Print the version and stop.")) -> None:
    """Fine-tune language models without losing what they knew or how they were aligned."""
    if show:
        from .. import __version__

        typer.echo(f"holdfast {__version__}")
        raise typer.Exit


def main() -> None:
    """Run the command line; an error that holdfast raised on purpose is shown as its message alone."""
    from ..core.errors import HoldfastError

    try:
        app()
    except Exception as error:
        if not isinstance(error, HoldfastError) and not hasattr(error, "faults"):  # of ledgers, gates, probes, suites
            raise
        typer.secho(str(error), fg="red", err=True)
        sys.exit(1)
