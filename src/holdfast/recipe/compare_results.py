"""What a comparison's ledger says, at equal learning, and the files that say it.

    output/
      frontier.png  report.html      retention against learning: a picture, and a page that answers to the mouse
      table.md  table.tex            every comparison with the baseline, for pages and papers
      fronts.md                      the area that each arm's front dominates, and the settings that no other beats

Read next: `holdfast.analysis.frontier`, how values are read; docs/frontier.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..analysis.figure import frontier_png
from ..analysis.frontier import Comparison, Reading, at_matched_learning, compare, matched_levels
from ..analysis.hypervolume import AreaError, area_rows, areas
from ..analysis.joint_front import joint_front, joint_front_rows
from ..analysis.points import BASE
from ..analysis.report import write_report
from ..analysis.scores import ScoreKind, kind
from ..analysis.tables import comparison_rows, latex_table, markdown_table
from ..core.errors import WrongSetup
from ..drift.ledger import Entry
from .compare_settings import Comparing

ENOUGH = 3  # seeds, below which nothing is evidence
FILES = ("report.html", "frontier.png", "table.md", "table.tex", "fronts.md")


@dataclass(frozen=True)
class Results:
    """What is read from the ledger.

    Attributes:
        entries: the last of each setting, seed and split, failed ones included.
        levels: of what is learned, at which arms are compared.
        readings: what every arm keeps at each level.
        comparisons: of every arm with the baseline.
        kinds: how the scores are read that are losses on the recipe's own data.
        notes: what a reader must know of how the arms were measured.
    """

    entries: Sequence[Entry]
    levels: tuple[float, ...]
    readings: Sequence[Reading]
    comparisons: Sequence[Comparison]
    kinds: Mapping[str, ScoreKind]
    notes: tuple[str, ...] = ()


def results(comparing: Comparing, entries: Sequence[Entry]) -> Results:
    """Read the arms at equal learning.

    Raises:
        WrongSetup: if the baseline has no finished run, or none that has learned anything.
    """
    kinds, learn = comparing.kinds, comparing.learn
    every = _in_order(comparing, entries)
    entries = [entry for entry in every if not _left_as_it_is(entry)]
    if not any(entry.arm == comparing.baseline and entry.status == "done" for entry in entries):
        raise WrongSetup(
            f"No run of the baseline {comparing.baseline!r} is finished, so there is nothing to compare with: see what "
            "failed above, correct it, and start again with --retry-failed; or name another `baseline`."
        )
    start = next(one.scores[learn].value for one in entries if one.arm == BASE and one.split == "validation")
    levels = tuple(dict.fromkeys(matched_levels(entries, comparing.baseline, learn, kinds=kinds)))
    if start in levels or (levels[-1] > start) != kind(learn, kinds).higher_is_better:
        raise WrongSetup(
            f"{comparing.baseline!r} has not learned: its best {kind(learn, kinds).title} on validation is no better "
            f"than the base's {kind(learn, kinds).show(start)}. Give it more steps or higher learning rates."
        )
    readings = at_matched_learning(entries, learn, comparing.keep, levels, kinds=kinds)
    comparisons = compare(readings, comparing.baseline, kinds=kinds)
    return Results(entries, levels, readings, comparisons, kinds, tuple(_unrepaired(every)))


def _unrepaired(entries: Sequence[Entry]) -> Iterator[str]:
    """Say which runs a repair left as they are."""
    runs: dict[str, dict[str, str]] = {}
    for entry in filter(_left_as_it_is, entries):
        runs.setdefault(entry.not_measured["repair"], {})[entry.run] = entry.arm
    for why, own in runs.items():
        many = f"{len(own)} run{'s' * (len(own) > 1)} of {', '.join(dict.fromkeys(own.values()))}"
        yield f"In {many} a repair changes nothing and adds no point: {why.rstrip('.')}."


def _left_as_it_is(entry: Entry) -> bool:
    """Whether a point is another one again, because there was nothing to repair."""
    return "repair" in entry.settings and "repair" in entry.not_measured


def _in_order(comparing: Comparing, entries: Sequence[Entry]) -> list[Entry]:
    """The entries, the base first, then arm by arm as the recipe has them and by seed, whichever run ended first."""
    arms = {name: place for place, name in enumerate(dict.fromkeys(variant.arm for variant in comparing.variants))}
    return sorted(entries, key=lambda entry: (arms.get(entry.arm, -1), entry.seed, entry.key.settings, entry.split))


def no_evidence(comparing: Comparing) -> str:
    """Say that so few seeds prove nothing; empty where there are enough."""
    count = len(comparing.seeds)
    if count >= ENOUGH:
        return ""
    return (
        f"{count} seed{'s' * (count > 1)} only: this is a first look and no evidence. With one seed there is no "
        "interval at all, with two a very wide one; add seeds to the recipe and start again, what is finished is kept."
    )


def write(comparing: Comparing, found: Results, folder: Path) -> list[Path]:
    """Write the figure, the page and both tables, each whole or not at all; return where they are."""
    rows = comparison_rows(found.comparisons)
    paths = {name: folder / f".unfinished-{name}" for name in FILES}
    paths["table.md"].write_text(markdown_table(rows) + "\n", encoding="utf-8")
    paths["table.tex"].write_text(latex_table(rows) + "\n", encoding="utf-8")
    paths["fronts.md"].write_text("\n".join(_fronts(comparing, found)), encoding="utf-8")
    frontier_png(
        found.entries, paths["frontier.png"], comparing.keep, comparing.learn, levels=found.levels, kinds=found.kinds
    )
    write_report(
        found.entries, paths["report.html"], baseline=comparing.baseline, retention=comparing.keep,
        adaptation=comparing.learn, levels=found.levels, kinds=found.kinds,
        note=" ".join(filter(None, [no_evidence(comparing), *found.notes])),
    )  # fmt: skip
    return [path.replace(folder / name) for name, path in paths.items()]


def _fronts(comparing: Comparing, found: Results) -> Iterator[str]:
    """The fronts in Markdown: their areas, by score the settings on the front of all arms."""
    learn, kinds = comparing.learn, found.kinds
    yield "## Area that an arm's front dominates\n"
    try:
        measured = areas(found.entries, learn, comparing.keep, kinds=kinds)
        yield markdown_table(area_rows(measured, comparing.baseline, kinds)) + "\n"
    except (AreaError, ImportError) as error:
        yield f"{error}\n"
    for score in comparing.keep:
        yield f"## Settings that no other beats: {kind(score, kinds).title}\n"
        chosen = joint_front(found.entries, learn, score, kinds=kinds)
        yield markdown_table(joint_front_rows(chosen, learn, score, kinds)) + "\n"
