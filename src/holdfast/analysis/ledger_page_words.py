"""What the page says first: verdicts in words, and in three sentences what was run, when and on what.

Read next: `holdfast.analysis.ledger_page`, the page.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from holdfast.analysis.ledger_page_drift import Drifted
from holdfast.analysis.ledger_page_frontiers import Frontier
from holdfast.analysis.ledger_page_read import Experiment, Read
from holdfast.analysis.points import BASE
from holdfast.drift.ledger import JSON

__all__ = ["Verdict", "counted", "head", "machines_of", "some"]

NAMED = 4
"""Commits and machines that are named before the rest is counted."""
Machines = Mapping[str, tuple[str, Mapping[str, JSON]]]


class Verdict(NamedTuple):
    """One line at the head of the page; `place` is the section that it links to."""

    title: str
    sentence: str
    place: str


def machines_of(experiments: Sequence[Experiment]) -> dict[str, tuple[str, Mapping[str, JSON]]]:
    """Every environment under a short name, with its JSON."""
    every = {
        json.dumps(entry.environment, sort_keys=True): entry.environment for one in experiments for entry in one.entries
    }
    return {f"M{number}": pair for number, pair in enumerate(every.items(), 1)}


def head(
    read: Read,
    machines: Machines,
    frontiers: Mapping[str, Frontier],
    drifts: Mapping[str, tuple[Sequence[Drifted], Sequence[str]]],
) -> tuple[tuple[str, ...], tuple[Verdict, ...]]:
    """The sentences and the verdicts."""
    verdicts = [Verdict(title, one.verdict, f"frontier-{n}") for n, (title, one) in enumerate(frontiers.items(), 1)]
    for n, (title, (found, _)) in enumerate(drifts.items(), 1):
        told: dict[str, list[str]] = {}
        for one in found:
            told.setdefault(one.verdict.sentence, []).append(one.name)
        sentences = [f"{'; '.join(names)}: {sentence}" for sentence, names in told.items()]
        verdicts += [Verdict(title, " ".join(sentences), f"drift-{n}")] if found else []
    return (_runs(read), _when(read), _where([environment for _, environment in machines.values()])), tuple(verdicts)


def _runs(read: Read) -> str:
    tuned = [(one.title, entry) for one in read.experiments for entry in one.entries if entry.arm != BASE]
    runs = {(title, entry.arm, entry.run) for title, entry in tuned}
    failed = {(title, entry.arm, entry.run) for title, entry in tuned if entry.status == "failed"}
    arms, seeds = {entry.arm for _, entry in tuned}, {entry.seed for _, entry in tuned}
    told = f"{counted(len(runs), 'run')} of {counted(len(arms), 'arm')} in "
    told += f"{counted(len(read.experiments), 'experiment')}, from {counted(len(read.ledgers), 'ledger')}"
    how = f"{len(failed)} failed" if failed else "none failed"
    return f"{told}, with {counted(len(seeds), 'seed')}; {how}."


def _when(read: Read) -> str:
    entries = [entry for one in read.experiments for entry in one.entries]
    days = sorted(entry.time[:10] for entry in entries)
    span = days[0] if days[0] == days[-1] else f"{days[0]} to {days[-1]}"
    commits = dict.fromkeys(str(e.environment["commit"]) for e in entries if "commit" in e.environment)
    edited = sum(commit.endswith("-dirty") for commit in commits)
    at = f"at commit{'s' * (len(commits) > 1)} {some(commits)}" if commits else "at commits that were not recorded"
    return f"Measured {span}, {at}{f' ({edited} with edited files)' if edited else ''}."


def _where(environments: Sequence[Mapping[str, JSON]]) -> str:
    names = dict.fromkeys(
        ", ".join(
            f"{one[name]} cores" if name == "cores" else str(one[name])
            for name in ("processor", "platform", "cores") if one.get(name)
        ) for one in environments
    )  # fmt: skip
    names.pop("", None)
    if not names:
        return "The machine was not recorded."
    return f"On {some(names, '; ')}." if len(names) > 1 else f"On one kind of machine: {next(iter(names))}."


def some(names: Iterable[str], between: str = ", ") -> str:
    """The first of many names, and how many more there are.

    >>> some("abcdef")
    'a, b, c, d and 2 more'
    """
    every = list(names)
    more = f" and {len(every) - NAMED} more" if len(every) > NAMED else ""
    return between.join(every[:NAMED]) + more


def counted(n: int, what: str) -> str:
    """A number of things, in words.

    >>> counted(1, "run"), counted(1200, "run")
    ('1 run', '1,200 runs')
    """
    return f"{n:,} {what}{'s' * (n != 1)}"
