"""`holdfast fit`: how forgetting grows with data and size; a law with intervals, and what to expect at more data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import typer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from rich.table import Table

    from ..analysis.extrapolation import Extrapolation
    from ..analysis.fit import Fit, Points, Prediction, Together
    from ..drift.ledger import JSON, Entry

Made = TypeVar("Made")
READ, TOLD = "What is read", "What is told"


def fit(
    ledger: Path = typer.Argument(..., help="A ledger (JSONL) with runs at several amounts of data."),
    score: str = typer.Option(..., help="The loss that rises with forgetting, as text_nll or perplexity.wiki."),
    data: str = typer.Option(..., help="The setting or cost that is D: steps, tokens."),
    size: str = typer.Option("", help="The setting or cost that is N: parameters, rank.", rich_help_panel=READ),
    injected: str = typer.Option("", help="The one that is p, the share of old data.", rich_help_panel=READ),
    experiment: str = typer.Option("", help="Of the ledger; needed if it holds several.", rich_help_panel=READ),
    arm: list[str] = typer.Option([], help="An arm; again for more; all if left out.", rich_help_panel=READ),
    split: str = typer.Option("test", help="Of the entries.", rich_help_panel=READ),
    where: list[str] = typer.Option([], help="Only entries whose setting is this, NAME=VALUE.", rich_help_panel=READ),
    base: float | None = typer.Option(None, help="L0; the base's own entry if left out.", rich_help_panel=READ),
    law: str = typer.Option("drift", help="base, drift, injected, shifted.", rich_help_panel=TOLD),
    predict: list[float] = typer.Option([], help="Expect at this many times the largest D.", rich_help_panel=TOLD),
    together: str = typer.Option(
        "runs", help="What is drawn as a whole: runs, with their checkpoints, or seeds.", rich_help_panel=TOLD
    ),
    draws: int = typer.Option(200, min=20, help="Of the bootstrap.", rich_help_panel=TOLD),
    figure: Path | None = typer.Option(None, help="Write a figure (png, svg, pdf).", rich_help_panel=TOLD),
    json: bool = typer.Option(False, "--json", help="Print everything as JSON.", rich_help_panel=TOLD),
) -> None:
    """Fit the law of forgetting to a ledger: its parameters with intervals, and how much to expect at more data.

    What the points cannot tell is refused, with the reason. Forms are compared by fitting the smaller amounts of data
    and foretelling the larger.

    **Examples**

    `holdfast fit runs/shift.jsonl --score text_nll --data steps --size rank --arm "plain LoRA" --predict 10`

    `holdfast fit runs/shift.jsonl --score output_kl --base 0 --data steps --law base --figure fit.png`
    """
    from ..analysis.fit import LAWS
    from ..analysis.fit import fit as fitted
    from ..analysis.fit_points import from_ledger
    from ..analysis.frontier import arms

    chosen = _entries(ledger, experiment)
    conditions = _asked(law, where, predict, together, chosen, list(LAWS))
    names = arm or arms(chosen)
    points = _each(
        names,
        lambda name: from_ledger(
            chosen, score, data, size or None, arm=name, injected=injected or None, split=split, where=conditions,
            base=base,
        ),
    )  # fmt: skip
    whole: Together = "seeds" if together == "seeds" else "runs"
    fits = _each(names, lambda name: fitted(points[name], LAWS[law], together=whole, draws=draws))
    held_out = {name: _held_out(own) for name, own in points.items()}
    expected = {name: _expected(found, predict) for name, found in fits.items()}
    if figure is not None:
        from ..analysis.fit_figure import fit_png

        fit_png(fits, figure, score, data, size, max([10.0, *predict]))
    if json:
        _print_json(fits, held_out, expected)
        return
    _tell(fits, held_out, expected)
    if figure is not None:
        typer.echo(f"figure: {figure}")


def _entries(ledger: Path, experiment: str) -> list[Entry]:
    """The entries of one experiment."""
    from ..core.errors import ConfigError
    from ..drift.ledger import Ledger

    if not ledger.is_file():
        raise ConfigError("holdfast fit", [f"there is no ledger {ledger}"])
    every = Ledger(ledger).entries(status=None)
    there = list(dict.fromkeys(entry.experiment for entry in every))
    if experiment not in there and (experiment or len(there) != 1):
        told = f"got {experiment!r}" if experiment else "none was named"
        raise ConfigError("--experiment", [f"{told}; {ledger} holds {', '.join(there) or 'no entries'}"])
    return [entry for entry in every if entry.experiment == (experiment or there[0])]


def _asked(
    law: str, where: list[str], predict: list[float], together: str, entries: list[Entry], laws: list[str]
) -> dict[str, JSON]:
    """The conditions of --where, once everything asked for makes sense."""
    from json import JSONDecodeError, loads

    from ..core.errors import ConfigError

    faults = [] if law in laws else [f"--law must be one of {', '.join(laws)}, got {law!r}"]
    faults += [] if together in ("runs", "seeds") else [f"--together must be runs or seeds, got {together!r}"]
    faults += [f"--predict must be above 0, got {factor:g}" for factor in predict if not factor > 0]
    there = sorted({name for entry in entries for name in entry.settings})
    if all(entry.arm == "base" for entry in entries):
        faults.append("the ledger has no arm but the base; a fit needs tuned models")
    found: dict[str, JSON] = {}
    for each in where:
        name, equals, value = each.partition("=")
        if not equals or name not in there:
            faults.append(f"--where {each!r} is not SETTING=VALUE; the settings are {', '.join(there) or 'none'}")
        try:
            found[name] = loads(value)
        except JSONDecodeError:
            found[name] = value
    if faults:
        raise ConfigError("holdfast fit", faults)
    return found


def _each(names: Iterable[str], make: Callable[[str], Made]) -> dict[str, Made]:
    """What is made of every arm; the faults of all arms at once."""
    from ..analysis.fit_points import FitError

    made, faults = {}, []
    for name in names:
        try:
            made[name] = make(name)
        except FitError as error:
            faults += [f"{name}: {fault}" for fault in error.faults or [str(error)]]
    if faults:
        raise FitError("holdfast fit cannot go on:", dict.fromkeys(faults))
    return made


def _held_out(points: Points) -> list[Extrapolation] | str:
    """How well every form foretells, or why that cannot be known."""
    from ..analysis.extrapolation import compare
    from ..analysis.fit_points import FitError

    try:
        return compare(points)
    except FitError as error:
        return str(error)


def _expected(found: Fit, factors: list[float]) -> dict[float, list[Prediction]]:
    """By factor, what is expected at that many times the largest amount of data, at every size and share measured."""
    points = found.points
    places = sorted(set(zip(points.size.tolist(), points.injected.tolist(), strict=True)))
    last = float(points.data.max())
    return {factor: [found.predict(factor * last, size, share) for size, share in places] for factor in factors}


def _print_json(
    fits: Mapping[str, Fit],
    held_out: Mapping[str, list[Extrapolation] | str],
    expected: Mapping[str, Mapping[float, list[Prediction]]],
) -> None:
    """Everything, by arm; what is not a number is null."""
    from dataclasses import asdict
    from json import dumps
    from math import isfinite

    def plain(value: object) -> object:
        if isinstance(value, dict):
            return {str(key): plain(part) for key, part in value.items()}
        if isinstance(value, list | tuple):
            return [plain(part) for part in value]
        return None if isinstance(value, float) and not isfinite(value) else value

    told = {}
    for name, found in fits.items():
        compared = held_out[name]
        told[name] = found.as_dict() | {
            "held_out": compared if isinstance(compared, str) else [asdict(one) for one in compared],
            "expected": {
                factor: [{**asdict(place), "forgetting": place.forgetting} for place in places]
                for factor, places in expected[name].items()
            },
        }
    typer.echo(dumps(plain(told), ensure_ascii=False, indent=1, allow_nan=False))


def _tell(
    fits: Mapping[str, Fit],
    held_out: Mapping[str, list[Extrapolation] | str],
    expected: Mapping[str, Mapping[float, list[Prediction]]],
) -> None:
    """The tables and the words."""
    from rich.console import Console

    console = Console(width=max(Console().width, 132))

    def say(text: str, style: str = "") -> None:
        console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)

    console.print(table(fits))
    for name, found in fits.items():
        for told in found.said:
            say(f"{name}: {told}", "yellow")
    for name, compared in held_out.items():
        if isinstance(compared, str):
            say(f"{name}: forms are not compared: {compared}", "dim")
        else:
            console.print(held_out_table(name, compared))
    for name, factors in expected.items():
        for factor, predictions in factors.items():
            for prediction in predictions:
                say(f"{name}, {factor:g}x the data, {prediction.sentence()}")


def table(fits: Mapping[str, Fit]) -> Table:
    """Every arm's parameters with intervals, and what the law says in the middle of its points."""
    from math import exp, log

    from rich.table import Table

    first = next(iter(fits.values()))
    percent = f"{100 * first.confidence:g} %"
    shown = Table(title=f"{first.law.equation}, with {percent} intervals", title_style="")
    names = list(dict.fromkeys(name for found in fits.values() for name in found.law.names))
    for column in ("arm", *names, "forgetting, mid-data", "residual", "points"):
        shown.add_column(column, justify="left" if column == "arm" else "right")
    for arm, found in fits.items():
        cells = [
            f"{found.parameters[name]:.3g}\n({found.intervals[name][0]:.3g} to {found.intervals[name][1]:.3g})"
            if name in found.parameters
            else "not told"
            for name in names
        ]
        points = found.points
        place = exp((log(points.data.min()) + log(points.data.max())) / 2)
        middle = found.predict(place, injected=float(points.injected.min()))
        low, high = (end - (points.base or 0.0) for end in middle.interval)
        value = middle.loss - (points.base or 0.0)
        cells.append(f"{value:.4f}\n({low:.4f} to {high:.4f})\nD {middle.data:.3g}, N {middle.size:.3g}")
        shown.add_row(arm, *cells, f"{100 * found.residual:.2g} %", str(len(points)))
    return shown


def held_out_table(name: str, compared: list[Extrapolation]) -> Table:
    """How far off every form is on the data that it did not see."""
    from rich.table import Table

    one = compared[0]
    noise = "" if one.noise != one.noise else f"; runs differ from their own mean by {100 * one.noise:.2g} %"
    title = f"{name}: fitted on {one.fitted} points up to D = {one.cut:g}, read on {one.held_out} beyond{noise}"
    shown = Table(title=title, title_style="")
    for column in ("form", "error", "bias", ""):
        shown.add_column(column, justify="right" if column in ("error", "bias") else "left")
    for each in compared:
        numbers = ["–", "–"] if each.why else [f"{100 * each.error:.2f} %", f"{100 * each.bias:+.2f} %"]
        shown.add_row(each.law, *numbers, each.why)
    return shown
