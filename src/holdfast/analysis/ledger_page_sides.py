"""What two names stand for: ledgers, experiments or arms; and which runs of one belong beside which of the other.

Read next: `holdfast.analysis.ledger_page_compare`, what is made of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path

from holdfast.analysis.ledger_page_read import Experiment
from holdfast.analysis.points import BASE
from holdfast.drift.ledger import Entry

__all__ = ["Pairing", "pairings", "sides_of"]

KINDS = ("ledger", "experiment", "arm")


@dataclass(frozen=True)
class Pairing:
    """Runs that belong side by side.

    Args:
        title: what they are.
        experiment: of both, where it is one; frontiers are read in it.
        names: of the arms.
        first: finished entries of the split that is reported.
        second: the same of the other.
    """

    title: str
    experiment: Experiment | None
    names: tuple[str, str]
    first: Sequence[Entry] = field(repr=False)
    second: Sequence[Entry] = field(repr=False)


Sides = tuple[str, list[Experiment], list[Experiment]]


def sides_of(a: str, b: str, experiments: Sequence[Experiment], faults: list[str]) -> Sides:
    """Of what kind both names are, and the experiments that each stands for; what is wrong joins `faults`."""
    found = {name: {kind: _called(name, kind, experiments) for kind in KINDS} for name in (a, b)}
    if a == b:
        faults.append(f"--compare {a} {b}: these are the same")
    unknown = [name for name in dict.fromkeys((a, b)) if not any(found[name].values())]
    for name in unknown:
        faults.append(f"--compare {name}: {_there(name, experiments)}")
    both = [kind for kind in KINDS if found[a][kind] and found[b][kind]]
    if not both and not unknown:
        told = [next(f"{name} is an {kind}" for kind in KINDS if found[name][kind]) for name in (a, b)]
        faults.append(f"--compare: {' and '.join(told)}: name two of one kind".replace("an ledger", "a ledger"))
    kind = both[0] if both else "arm"
    for name in (a, b):
        if kind == "experiment" and len(found[name][kind]) > 1:
            titles = ", ".join(repr(experiment.title) for experiment in found[name][kind])
            faults.append(f"--compare {name}: several ledgers have this experiment; name {titles}")
    return kind, found[a][kind], found[b][kind]


def _called(name: str, kind: str, experiments: Sequence[Experiment]) -> list[Experiment]:
    """The experiments that a name stands for, taken as a name of this kind."""
    if kind == "arm":
        return [one for one in experiments if name in one.arms]
    if kind == "experiment":
        exact = [one for one in experiments if one.title == name]
        return exact or [one for one in experiments if one.name == name]
    path = Path(name).resolve()
    return [one for one in experiments if one.ledger == name or path == one.path or path in one.path.parents]


def _there(name: str, experiments: Sequence[Experiment]) -> str:
    """What could have been meant."""
    arms = dict.fromkeys(arm for one in experiments for arm in one.arms)
    titles, ledgers = (dict.fromkeys(getattr(one, of) for one in experiments) for of in ("title", "ledger"))
    close = get_close_matches(name, [*arms, *titles, *ledgers], n=1)
    meant = f" Did you mean {close[0]!r}?" if close else ""
    return (
        f"no arm, experiment or ledger is called so.{meant} The arms: {', '.join(arms) or 'none'}; "
        f"the experiments: {', '.join(titles)}; the ledgers: {', '.join(ledgers)}"
    )


def pairings(a: str, b: str, sides: Sides, why: list[str]) -> Iterator[Pairing]:
    """What of A stands beside what of B; what has no partner joins `why`."""
    kind, first, second = sides
    if kind == "arm":
        both = [one for one in first if one in second]
        if not both:
            lists = [", ".join(one.title for one in side) for side in (first, second)]
            why.append(f"No experiment has both arms: {a} is in {lists[0]}; {b} is in {lists[1]}.")
        for one in both:
            yield Pairing(one.title, one, (a, b), _of(one, a), _of(one, b))
        return
    for mine, theirs in _partners(first, second, why):
        shared = [arm for arm in mine.arms if arm in theirs.arms]
        if _of(mine, BASE) and _of(theirs, BASE):
            shared.append(BASE)
        alone = [[arm for arm in one.arms if arm not in shared] for one in (mine, theirs)]
        for arm in shared:
            yield Pairing(f"{mine.name}: {arm}", None, (arm, arm), _of(mine, arm), _of(theirs, arm))
        if len(alone[0]) == len(alone[1]) == 1:  # two runs, each recorded under its own name
            own, others = alone[0][0], alone[1][0]
            title = f"{mine.name}: {own} and {others}"
            yield Pairing(title, None, (own, others), _of(mine, own), _of(theirs, others))
        else:
            for name, arms in zip((a, b), alone, strict=True):
                if arms:
                    why.append(f"Of {mine.name}, only {name} has {' · '.join(arms)}.")


def _partners(
    first: Sequence[Experiment], second: Sequence[Experiment], why: list[str]
) -> list[tuple[Experiment, Experiment]]:
    """Experiments of one name; or the only one of each."""
    if len(first) == len(second) == 1:
        return [(first[0], second[0])]
    names = [[one.name for one in side] for side in (first, second)]
    pairs = [(one, other) for one in first for other in second if one.name == other.name]
    alone = [name for name in dict.fromkeys((*names[0], *names[1])) if (name in names[0]) != (name in names[1])]
    if alone:
        why.append(f"On one side only, and not compared: {', '.join(alone)}.")
    return pairs


def _of(experiment: Experiment, arm: str) -> list[Entry]:
    return [entry for entry in experiment.reported() if entry.arm == arm]
