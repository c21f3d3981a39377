"""What a page reads of one experiment: every arm at equal learning, one against another or against the best of many.

    best(L) of several arms:  the one whose validation loss at L is best, read on test

Read next: `words`, which tells it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from holdfast.analysis.frontier import Comparison, Reading, arms, at_matched_learning, compare, matched_levels
from holdfast.analysis.points import BASE
from holdfast.analysis.scores import ScoreKind
from holdfast.drift.entry import POSTHOC
from holdfast.drift.ledger import Entry, Ledger

from studies.common_readings import at_start, bounds, reading

from .comparisons import FRACTIONS, KINDS, PLAIN, STUDIES, arms_of

DRAWS = 200


@dataclass(frozen=True)
class Column:
    """One experiment.

    Attributes:
        title: of the column in tables.
        learnt: the score at which arms are matched.
        entries: of it.
        readings: on test rows.
        chosen: the same on validation rows, by which the best of several arms is named.
        kinds: how scores are read.
        left_out: seeds of which only a part was run.
        failed: runs that failed.
    """

    title: str
    learnt: str
    entries: Sequence[Entry] = field(repr=False)
    readings: Sequence[Reading] = field(repr=False)
    chosen: Sequence[Reading] = field(repr=False, default=())
    kinds: Mapping[str, ScoreKind] = field(repr=False, default_factory=lambda: KINDS)
    left_out: tuple[int, ...] = ()
    failed: int = 0

    @property
    def arms(self) -> list[str]:
        """Their names, in the order of the ledger."""
        return arms(self.entries)

    @property
    def seeds(self) -> list[int]:
        """Of all runs."""
        return sorted({entry.seed for entry in self.entries if entry.arm != BASE})

    @property
    def levels(self) -> list[float]:
        """At which arms are read, from little learning to much."""
        return list(dict.fromkeys(one.level for one in self.readings))

    def pairs(self, mine: str, theirs: str) -> list[Comparison]:
        """One arm against another, in every score at every level; empty where one of them was not run."""
        if not {mine, theirs} <= {*self.arms}:
            return []
        own = [one for one in self.readings if one.arm in (mine, theirs)]
        return compare(own, theirs, kinds=self.kinds)

    def against_best(self, mine: str, rivals: Sequence[str]) -> list[Comparison]:
        """One arm against whichever of its rivals validation rows name the best, in every score at every level."""
        present = [name for name in rivals if name in self.arms and name != mine]
        if mine not in self.arms or not present:
            return []
        found = {(one.arm.retention, one.arm.level, name): one for name in present for one in self.pairs(mine, name)}
        places = dict.fromkeys((one.retention, one.level) for one in self.readings)
        return [found[score, level, self.best(present, score, level)] for score, level in places]

    def gained(self, one: Comparison) -> bool:
        """Whether plain LoRA ends there beyond noise better than the base: nothing is lost, only something to gain."""
        score, sign = one.arm.retention, 1 if one.kind.higher_is_better else -1
        plain = reading(self.readings, PLAIN, score, one.arm.level)
        if not plain.values:
            return False
        return min(sign * end for end in bounds(plain)) > sign * at_start(self.entries)[score].value

    def best(self, names: Sequence[str], score: str, level: float) -> str:
        """The arm that validation rows name the best at a level, among those that most seeds reach it with."""
        own = [one for one in self.chosen if (one.retention, one.level) == (score, level) and one.arm in names]
        sign = 1 if self.kinds[score].higher_is_better else -1
        return max(own, key=lambda one: (len(one.values), sign * one.mean if one.values else 0.0)).arm


def column(results: Path, name: str) -> Column | None:
    """Read a comparison from its published ledger.

    Args:
        results: the folder with a folder for each page.
        name: of `STUDIES`.

    Returns:
        None where nothing of it was run.
    """
    study = STUDIES[name]
    whole, left_out = whole_seeds(entries_of(results, name))
    for other, wanted in study.others.items():
        theirs, _ = whole_seeds(entries_of(results, other))
        seeds = {entry.seed for entry in whole if entry.arm != BASE}
        alike = [one for one in theirs if one.arm != BASE and one.seed in seeds and (not wanted or one.arm in wanted)]
        alike = [replace(one, experiment=name) for one in alike]
        whole = [*(one for one in whole if one.arm == BASE), *alike, *(one for one in whole if one.arm != BASE)]
    order = {arm: place for place, arm in enumerate(arms_of(name))}
    whole.sort(key=lambda entry: order.get(entry.arm, -1))  # not as they happened to end
    entries = [entry for entry in whole if entry.status == "done"]
    if PLAIN not in arms(entries):
        return None
    levels = matched_levels(entries, PLAIN, study.learn, fractions=FRACTIONS, kinds=KINDS)
    both = [
        at_matched_learning(entries, study.learn, study.keep, levels, kinds=KINDS, draws=draws, reported=split)
        for split, draws in (("test", DRAWS), ("validation", 2))
    ]
    failed = {(one.arm, one.seed, trained(one)) for one in whole if one.status == "failed"}
    return Column(study.title, study.learn, entries, both[0], both[1], KINDS, left_out, len(failed))


def entries_of(results: Path, name: str) -> list[Entry]:
    """The entries of a comparison, failed ones included; none where there is no ledger."""
    path = results / STUDIES[name].page / "ledger.jsonl"
    return Ledger(path).entries(name, status=None) if path.is_file() else []


def whole_seeds(entries: Sequence[Entry]) -> tuple[list[Entry], tuple[int, ...]]:
    """The entries of the seeds with which most was run, and the other seeds: in those some arms would be missing."""
    runs = Counter(seed for seed, _, _ in {(e.seed, e.arm, e.key.settings) for e in entries if e.arm != BASE})
    whole = {seed for seed, count in runs.items() if count == max(runs.values())}
    kept = [entry for entry in entries if entry.arm == BASE or entry.seed in whole]
    return kept, tuple(sorted({*runs} - whole))


def trained(entry: Entry) -> str:
    """The settings that a run was trained with, as text."""
    return str(sorted((name, value) for name, value in entry.settings.items() if name not in POSTHOC))
