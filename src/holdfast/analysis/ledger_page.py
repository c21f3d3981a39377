"""One page over any ledgers: verdicts, runs, frontiers, drift, fits, and the settings to do it all again.

Everything comes from ledger entries. The page is one file that loads nothing; it is written whole or not at all, and
never over a file that is not such a page.

Read next: `holdfast.analysis.ledger_page_read`, what is read; docs/report.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from holdfast.analysis.drift_text import leaves, short
from holdfast.analysis.ledger_page_compare import Side, side_by_side
from holdfast.analysis.ledger_page_drift import drift_of, is_drift
from holdfast.analysis.ledger_page_fits import Fits, fits_of
from holdfast.analysis.ledger_page_frontiers import Frontier, frontier_of, why_none
from holdfast.analysis.ledger_page_read import NAME, PageError, Read, read_ledgers
from holdfast.analysis.ledger_page_runs import runs_of, table_of
from holdfast.analysis.ledger_page_scores import Asked, Choice, asked_for, choose
from holdfast.analysis.ledger_page_sides import sides_of
from holdfast.analysis.ledger_page_words import Verdict, head, machines_of, some
from holdfast.analysis.pages import pages, write_whole
from holdfast.analysis.scores import find

__all__ = ["MARK", "Page", "PageError", "write_ledger_page"]

MARK = '<meta name="generator" content="holdfast report">'
"""What tells a page of this command from any other file."""
OPEN = 60
"""Rows of all tables together up to which none is folded."""


class Page(NamedTuple):
    """Where the page is, what it says first, and what a reader must know of what was read."""

    path: Path
    sentences: tuple[str, ...]
    verdicts: tuple[Verdict, ...]
    notes: tuple[str, ...]


def write_ledger_page(
    runs: Sequence[str | Path],
    path: str | Path,
    *,
    compare: tuple[str, str] | None = None,
    title: str = "",
    baseline: str | None = None,
    learn: Sequence[str] = (),
    keep: Sequence[str] = (),
    interactive: bool = True,
    force: bool = False,
    tick: Callable[[str, int], None] | None = None,
) -> Page:
    """Write the page.

    Args:
        runs: ledgers, or folders that hold `ledger.jsonl` at any depth.
        path: of the page; folders are made.
        compare: two arms, experiments or ledgers to put side by side; a ledger given here is read too.
        title: of the page.
        baseline: the arm that the others are compared with; by default the one without any method.
        learn: scores that are learned, NAME or NAME=lower or NAME=higher; of every experiment the first it has.
        keep: scores that are kept, likewise.
        interactive: figures that answer to the mouse, 5 MB; else pictures.
        force: write over a file that is no page of this command.
        tick: called with what is being done, and how many steps there are in all.

    Raises:
        PageError: lists everything that is wrong; then nothing is written.

    >>> import tempfile
    >>> from holdfast.drift.ledger import Entry, Ledger, Score
    >>> folder = Path(tempfile.mkdtemp())
    >>> Ledger(folder / "ledger.jsonl").append(Entry("demo", "plain LoRA", {}, 0, "test", {"skills": Score(0.8)}))
    >>> write_ledger_page([folder], folder / "page.html").sentences[0]
    '1 run of 1 arm in 1 experiment, from 1 ledger, with 1 seed; none failed.'
    """
    read, asked = _checked(runs, Path(path), compare, baseline, learn, keep, force)
    count = len(read.experiments)

    def step(what: str) -> None:
        if tick is not None:
            tick(what, 2 * count)

    frontiers, without = _frontiers(read, asked, baseline, interactive, step)
    fits, unfitted = _fits(read, asked, step)
    drifts = {one.title: drift_of(one, asked.kinds) for one in read.experiments if is_drift(one)}
    sides, apart = _sides(read, asked, compare)
    machines = machines_of(read.experiments)
    sentences, verdicts = head(read, machines, frontiers, drifts)
    tables = [table_of(one, asked.kinds) for one in read.experiments]
    templates = pages()
    templates.filters["short"], templates.globals["leaves"] = short, leaves
    html = templates.get_template("ledger.html.j2").render(
        mark=MARK, title=title or f"Results: {some([one.title for one in read.experiments], ' · ')}",
        sentences=sentences, verdicts=verdicts, notes=read.notes, tables=tables, known=_titles(read, asked),
        open=sum(len(table.rows) for table in tables) <= OPEN, frontiers=frontiers, without=without, drifts=drifts,
        fits=fits, unfitted=unfitted, compare=compare, sides=sides, apart=apart,
        runs=[(one, runs_of(one, {text: name for name, (text, _) in machines.items()})) for one in read.experiments],
        machines={name: environment for name, (_, environment) in machines.items()}, heading="h3", scaled=True,
        along=None, words=WORDS,
    )  # fmt: skip
    write_whole(path, html)
    notes = [f"no frontier of {one}: {why}" for one, why in without if "--" in why]  # where the user can do something
    return Page(Path(path), sentences, verdicts, (*read.notes, *notes))


WORDS = {
    "worse": "▼ worse", "better": "▲ better", "within noise": "≈ within noise", "drifted": "◆ drifted",
    "identical": "= identical", "not known": "? not known", "higher": "◆ higher", "lower": "◆ lower",
    "not reached": "not reached",
}  # fmt: skip


def _checked(
    runs: Sequence[str | Path], path: Path, compare: tuple[str, str] | None, baseline: str | None,
    learn: Sequence[str], keep: Sequence[str], force: bool,
) -> tuple[Read, Asked]:  # fmt: skip
    """What was read and what is asked of it, or all faults at once."""
    faults = []
    if path.is_dir():
        faults.append(f"--output {path} is a folder: name a file in it, as {path / 'report.html'}")
    elif path.exists() and MARK not in path.read_text(encoding="utf-8", errors="replace")[:4000]:
        ledger = path.suffix == ".jsonl"
        if ledger or not force:
            way = "" if ledger else ", or write over it with --force"
            faults.append(f"--output {path} is there and is no page of holdfast report: choose another name{way}")
    try:
        read = read_ledgers([*runs, *(name for name in compare or () if _is_ledger(Path(name)))])
    except PageError as error:
        raise PageError("holdfast report wrote nothing:", (*faults, *error.faults)) from None
    asked = asked_for(learn, keep, read.experiments, faults)
    arms = dict.fromkeys(arm for one in read.experiments for arm in one.arms)
    if baseline is not None and baseline not in arms:
        faults.append(f"--baseline {baseline}: no experiment has such an arm; there are {', '.join(arms) or 'none'}")
    if compare is not None:
        sides_of(*compare, read.experiments, faults)
    if faults:
        raise PageError("holdfast report wrote nothing:", faults)
    return read, asked


def _is_ledger(path: Path) -> bool:
    """Whether a name to be compared is a file, or a folder with a ledger in it; else it may be that of an arm."""
    return path.is_file() or (path.is_dir() and next(path.rglob(NAME), None) is not None)


def _frontiers(
    read: Read, asked: Asked, baseline: str | None, interactive: bool, step: Callable[[str], None]
) -> tuple[dict[str, Frontier], list[tuple[str, str]]]:
    """By title the frontiers, and why other experiments have none."""
    found, without = dict[str, Frontier](), list[tuple[str, str]]()
    for one in read.experiments:
        step(f"frontiers: {one.title}")
        if is_drift(one):
            continue
        choice: Choice | str = why_none(one.entries) or choose(one, asked)
        made = choice if isinstance(choice, str) else frontier_of(one, choice, baseline, interactive, not found)
        if isinstance(made, str):
            without.append((one.title, made))
        else:
            found[one.title] = made
    return found, without


def _fits(
    read: Read, asked: Asked, step: Callable[[str], None]
) -> tuple[dict[str, Fits], list[tuple[str, str]]]:  # fmt: skip
    found, without = dict[str, Fits](), list[tuple[str, str]]()
    for one in read.experiments:
        step(f"fits: {one.title}")
        if is_drift(one) or not one.arms:
            continue
        made = fits_of(one, asked)
        if isinstance(made, str):
            without.append((one.title, made))
        else:
            found[one.title] = made
    return found, without


def _sides(read: Read, asked: Asked, compare: tuple[str, str] | None) -> tuple[list[Side], list[str]]:
    if compare is None:
        return [], []
    chosen = {}
    for one in read.experiments:
        choice = choose(one, asked)
        if not isinstance(choice, str) and not is_drift(one) and not why_none(one.entries):
            chosen[one.title] = (choice.learned, choice.kept)
    return side_by_side(*compare, read.experiments, chosen, asked.kinds)


def _titles(read: Read, asked: Asked) -> Mapping[str, str]:
    """What scores are called in words, where that is known."""
    names = dict.fromkeys(name for one in read.experiments for name in one.scores)
    return {name: kind.title for name in names if (kind := find(name, asked.kinds))}
