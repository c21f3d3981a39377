"""`holdfast report`: one page over any ledgers: what was run, what was kept, and how to do it again."""

from __future__ import annotations

from pathlib import Path

import typer

READ, SHOWN = "What is read", "What is shown"


def report(
    runs: list[Path] = typer.Argument(None, help="Ledgers, or folders in which ledger.jsonl is looked for."),
    output: Path = typer.Option(Path("report.html"), help="The page; one file that needs nothing else."),
    compare: tuple[str, str] = typer.Option(
        ("", ""),
        metavar="A B",
        show_default=False,
        help="Two arms, experiments or ledgers side by side: B - A.",
        rich_help_panel=SHOWN,
    ),
    title: str = typer.Option("", help="Of the page.", rich_help_panel=SHOWN),
    baseline: str = typer.Option("", help="The arm that others are compared with; plain LoRA.", rich_help_panel=SHOWN),
    learn: list[str] = typer.Option(
        [], metavar="SCORE", help="A score that is learned; again for other experiments.", rich_help_panel=READ
    ),
    keep: list[str] = typer.Option(
        [], metavar="SCORE", help="A score that must be kept; again for more.", rich_help_panel=READ
    ),
    still: bool = typer.Option(
        False, "--still", help="Pictures instead of figures that answer to the mouse (5 MB).", rich_help_panel=SHOWN
    ),
    force: bool = typer.Option(False, "--force", help="Write over a file that is no page of this command."),
) -> None:
    """Put everything that ledgers hold on one HTML page: verdicts, runs, frontiers, drift, fits, settings.

    The page opens from disk, loads nothing, and may be sent by mail. A score that holdfast does not know is named with
    its direction: `--learn task=higher --keep text_nll=lower`; of a loss, a perplexity and a KL lower is better.

    **Examples**

    `holdfast report runs/demo`

    `holdfast report runs --output all.html --learn task_loss --keep text_loss --baseline naive`

    `holdfast report runs/demo --compare "plain LoRA" TMKL`

    `holdfast report --compare runs/monday runs/tuesday`
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from ..analysis.ledger_page import write_ledger_page

    console = Console(width=max(Console().width, 100))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("reading", total=None)

        def tick(what: str, total: int) -> None:
            progress.update(bar, description=what, total=total, advance=1)

        page = write_ledger_page(
            runs or (), output, compare=compare if any(compare) else None, title=title, baseline=baseline or None,
            learn=learn, keep=keep, interactive=not still, force=force, tick=tick,
        )  # fmt: skip

    def say(text: str, style: str = "") -> None:
        console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)

    for sentence in page.sentences:
        say(sentence)
    for verdict in page.verdicts:
        say(f"{verdict.title}: {verdict.sentence}")
    for note in page.notes:
        say(note, "yellow")
    say(f"page: {page.path}")
