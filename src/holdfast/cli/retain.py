"""`holdfast retain`: the pool of what must be kept. Sampled once from the base, and looked at."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from ..retain.coverage import Coverage

retain = typer.Typer(no_args_is_help=True, help="What must be kept: sample a pool from the base, and look at it.")
HOW = "How it runs"
LONG = 160  # characters of an example


@retain.command()
def sample(
    model: str = typer.Argument(..., help="The base: a hub name, a folder, lab-aligned."),
    output: Path = typer.Option(..., help="A folder for the pool."),
    n: int = typer.Option(256, help="Sequences."),
    max_tokens: int = typer.Option(128, help="Of an answer, or of free text."),
    temperature: float = typer.Option(1.0, help="1 is the base's own distribution."),
    seed: int = typer.Option(0, help="The same gives the same pool on one machine."),
    mix: str = typer.Option("", help="Shares: text=0.2,chat=0.25,prompts=0.25,noise=0.3,task=...,own=..."),
    task: Path | None = typer.Option(None, help="Rows of the task (JSON lines): the base answers their prompts."),
    rows: Path | None = typer.Option(None, help="Your own text, in any of TRL's formats (JSON lines)."),
    system: list[str] = typer.Option([], help="A system prompt in use; may be repeated. A few built-in ones."),
    answer_noise: bool = typer.Option(False, help="Whole answers to random tokens, not their first token alone."),
    max_length: int = typer.Option(1024, help="Longer prompts are left out, longer rows cut."),
    replace: bool = typer.Option(False, help="Replace the pool that is there."),
    batch_size: int = typer.Option(64, help="Sequences sampled at a time.", rich_help_panel=HOW),
    dtype: str = typer.Option("float32", help="auto, float32, bfloat16, float16: as in training.", rich_help_panel=HOW),
    device: str | None = typer.Option(None, help="cpu, cuda, cuda:1; a GPU if any.", rich_help_panel=HOW),
    revision: str | None = typer.Option(None, help="Of a hub model.", rich_help_panel=HOW),
    trust_remote_code: bool = typer.Option(False, help="Run code from the model.", rich_help_panel=HOW),
) -> None:
    """Sample a pool from the base: text, chat, answers to prompts, random tokens in the chat format; and your rows.

    **Examples**

    `holdfast retain sample lab-aligned --output my-pool`

    `holdfast retain sample MODEL --output my-pool --n 512 --mix chat=0.4,noise=0.4,own=0.2 --rows mine.jsonl`
    """
    from rich.console import Console
    from rich.progress import Progress

    from ..core.errors import WrongSetup
    from ..retain.files import MANIFEST
    from ..retain.formats import SYSTEM
    from ..retain.making import make
    from ..retain.rows import prompts, read_rows, sequences
    from ..retain.settings import Settings

    settings = Settings(
        n=n,
        mix=_shares(mix),
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
        batch_size=batch_size,
        systems=tuple(system) or SYSTEM,
        answer_noise=answer_noise,
        max_length=max_length,
    )
    if (output / MANIFEST).exists() and not replace:
        raise WrongSetup(f"{output} holds a pool. Give another --output, or say --replace.")
    asked = prompts(read_rows(task)) if task is not None else []
    given = read_rows(rows) if rows is not None else []
    base, tokenizer = _loaded(model, dtype, device, revision, trust_remote_code)
    own = sequences(given, tokenizer, source=rows.name, max_length=max_length) if rows is not None else []
    console = Console()
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("sampling", total=n)
        pool = make(base, tokenizer, settings, task=asked, rows=own, tick=lambda done: progress.advance(bar, done))
    pool.save(output)
    _tell(console, pool.manifest)
    told = ", ".join(f"{kind} {count}" for kind, count in pool.counts.items())
    console.print(f"{len(pool)} sequences: {told}", highlight=False, soft_wrap=True)
    console.print(f"{output}; look at it: holdfast retain show {output}", highlight=False, markup=False, soft_wrap=True)


@retain.command()
def show(
    pool: Path = typer.Argument(..., help="The folder of a pool."),
    kind: str | None = typer.Option(None, help="Print the sequences of one kind, with their ids."),
    examples: int = typer.Option(2, min=0, help="Of each kind."),
    probe: list[str] = typer.Option([], help="A text to look for; may be repeated. Needs --model."),
    model: str | None = typer.Option(None, help="The base: checks that the pool is its own, gives perplexities."),
    json: bool = typer.Option(False, "--json", help="Print plain data."),
    dtype: str = typer.Option("float32", help="Of the base, as it was when the pool was sampled.", rich_help_panel=HOW),
    device: str | None = typer.Option(None, help="cpu, cuda, cuda:1; a GPU if any.", rich_help_panel=HOW),
    revision: str | None = typer.Option(None, help="Of a hub model.", rich_help_panel=HOW),
    trust_remote_code: bool = typer.Option(False, help="Run code from the model.", rich_help_panel=HOW),
) -> None:
    """Say what a pool covers, by kind and with examples, and whether it touches texts that you name.

    **Examples**: `holdfast retain show my-pool`, `holdfast retain show my-pool --model BASE --probe "Reverse: b c d"`
    """
    from json import dumps

    from rich.console import Console

    from ..core.errors import WrongSetup
    from ..retain.coverage import coverage
    from ..retain.pool import Pool

    console = Console()
    found = Pool.load(pool)
    if kind is not None:
        for kept in found.filter([kind]):
            console.print(f"{kept.id}  {kept.source}", highlight=False, markup=False, soft_wrap=True)
            console.print(f"  {kept.text}", highlight=False, markup=False, soft_wrap=True)
        return
    if probe and model is None:
        raise WrongSetup("--probe needs --model, whose tokenizer the pool is in.")
    base, tokenizer = _loaded(model, dtype, device, revision, trust_remote_code) if model is not None else (None, None)
    told = coverage(found, probes=probe, tokenizer=tokenizer, model=base, examples=examples)
    if json:
        typer.echo(dumps({"manifest": dict(found.manifest), "edited": found.edited, **told.as_dict()}, indent=1))
        return
    _tables(console, told, pool)
    if found.edited:
        console.print("The sequences were changed by hand since the pool was saved.", highlight=False)
    _tell(console, found.manifest)


def _shares(text: str) -> dict[str, float]:
    """Read `text=0.2,chat=0.8`."""
    from ..core.errors import ConfigError

    shares, faults = {}, []
    for part in filter(None, (part.strip() for part in text.split(","))):
        kind, _, share = part.partition("=")
        try:
            shares[kind.strip()] = float(share)
        except ValueError:
            faults.append(f"{part!r} is not KIND=SHARE")
    if faults:
        raise ConfigError("--mix", faults)
    return shares


def _loaded(
    model: str, dtype: str, device: str | None, revision: str | None, trust_remote_code: bool
) -> tuple[Any, Any]:
    """The base, where it is to run, and its tokenizer."""
    import torch

    from ..core.errors import ConfigError
    from ..recipe.model import DTYPES, ModelSpec

    if dtype not in DTYPES:
        raise ConfigError("--dtype", [f"it must be one of {', '.join(DTYPES)}, got {dtype!r}"])
    base, tokenizer = ModelSpec(model, dtype=dtype, revision=revision, trust_remote_code=trust_remote_code).load()
    return base.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval(), tokenizer


def _tables(console: Console, told: Coverage, pool: Path) -> None:
    from rich.table import Table

    table = Table(title=str(pool))
    columns = ("kind", "n", "share", "tokens", "dist-1", "dist-2", "dist-3", "perplexity")
    for column in columns:
        table.add_column(column, justify="left" if column == "kind" else "right")
    for part in told.parts:
        perplexity = "" if part.perplexity is None else f"{part.perplexity:.1f}"
        distinct = (f"{value:.2f}" for value in part.distinct)
        table.add_row(part.kind, str(part.count), f"{part.share:.2f}", f"{part.mean_tokens:.1f}", *distinct, perplexity)
    console.print(table)
    for part in told.parts[:-1]:
        sources = ", ".join(f"{name} {count}" for name, count in part.sources.items())
        console.print(f"{part.kind}: {sources}", highlight=False, markup=False, soft_wrap=True)
        for text in part.examples:
            console.print(f"  {text[:LONG]!r}", highlight=False, markup=False, soft_wrap=True)
    for touch in told.touches:
        line = f"{touch.overlap:.2f} (anywhere {touch.anywhere:.2f})  {touch.probe!r}"
        nearest = f"  nearest {touch.id}: {touch.text[:LONG]!r}" if touch.id else "  nothing shares a word sequence"
        console.print(line, highlight=False, markup=False, soft_wrap=True)
        console.print(nearest, highlight=False, markup=False, soft_wrap=True)


def _tell(console: Console, manifest: Mapping[str, Any]) -> None:
    """What was left out, and why."""
    for kind, reasons in manifest.get("dropped", {}).items():
        told = ", ".join(f"{count} {why}" for why, count in reasons.items())
        console.print(f"dropped of {kind}: {told}", highlight=False, markup=False, soft_wrap=True)
    for line in manifest.get("said", []):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
