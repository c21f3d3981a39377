"""Which score is learned and which are kept: known by name, or said by the user, with the direction of each.

A score that `holdfast.analysis.scores` does not know is never guessed to be learned or kept. Once it is named, a loss,
a perplexity or a divergence is taken to be better when lower; of any other the direction is asked for.

Read next: `holdfast.analysis.ledger_page_frontiers`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from holdfast.analysis.ledger_page_read import Experiment
from holdfast.analysis.scores import ScoreKind, find

__all__ = ["Asked", "Choice", "asked_for", "choose", "lower_by_name"]

LEARNED = ("adaptation", "adaptation_nll")
LOWER = ("_loss", "_nll", "_kl", "perplexity", "loss", "nll", "kl")


@dataclass(frozen=True)
class Asked:
    """The scores that the user named, in order, and how to read those that are not known."""

    learn: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    kinds: Mapping[str, ScoreKind] = field(default_factory=dict)


@dataclass(frozen=True)
class Choice:
    """What is learned and what is kept in one experiment."""

    learned: str
    kept: tuple[str, ...]
    kinds: Mapping[str, ScoreKind]


def lower_by_name(name: str) -> bool:
    """Whether a score is called a loss, a perplexity or a divergence.

    >>> lower_by_name("text_nll"), lower_by_name("kl.chat"), lower_by_name("skills")
    (True, True, False)
    """
    return name.endswith(LOWER) or name.partition(".")[0].endswith(LOWER)


def asked_for(learn: Sequence[str], keep: Sequence[str], experiments: Sequence[Experiment], faults: list[str]) -> Asked:
    """Read NAME, NAME=lower and NAME=higher; what is wrong joins `faults`.

    >>> faults = []
    >>> asked_for(["gsm8k"], [], [], faults).learn, faults[0][:46]
    ((), '--learn gsm8k: no experiment has such a score;')
    """
    there = list(dict.fromkeys(name for experiment in experiments for name in experiment.scores))
    kinds, names = dict[str, ScoreKind](), dict[str, list[str]]()
    for option, given in (("--learn", learn), ("--keep", keep)):
        names[option] = []
        for each in given:
            name, equals, way = each.partition("=")
            if name not in there:
                faults.append(
                    f"{option} {name}: no experiment has such a score; there are {', '.join(there) or 'none'}"
                )
            elif equals and way not in ("lower", "higher"):
                faults.append(f"{option} {each}: say {name}=lower or {name}=higher, whichever is better")
            elif equals:
                kinds[name] = _kind(name, way == "higher")
            elif find(name) is None and not lower_by_name(name):
                faults.append(
                    f"{option} {name}: it is not known whether higher is better; say {name}=higher or {name}=lower"
                )
            elif find(name) is None:
                kinds[name] = _kind(name, False)
            names[option].append(name)
    for name in set(names["--learn"]) & set(names["--keep"]):
        faults.append(f"{name} cannot be both learned and kept")
    return Asked() if faults else Asked(tuple(names["--learn"]), tuple(names["--keep"]), kinds)


def _kind(name: str, higher: bool) -> ScoreKind:
    """How to read a score whose direction the user gave; what else is known of it stays."""
    known = find(name)
    if known is not None and known.higher_is_better == higher:
        return known
    return ScoreKind(name.replace("_", " ").replace(".", ", "), higher, ".2f" if higher else ".3f")


def choose(experiment: Experiment, asked: Asked) -> Choice | str:
    """What is learned and kept in an experiment, or why that cannot be known and what to do.

    Known scores are kept by themselves; of a rate and its loss (`skills`, `skills_nll`) the rate.
    """
    there = experiment.scores
    learned = next((name for name in asked.learn if name in there), None)
    if learned is None:
        learned = next((name for wanted in LEARNED for name in there if name.partition(".")[0] == wanted), None)
    if learned is None:
        return f"which score is learned is not known: name it with --learn. There are {', '.join(there) or 'none'}"
    kept: Iterable[str] = (name for name in asked.keep if name in there)
    kept = tuple(kept) or tuple(name for name in there if _kept_by_itself(name, there))
    kept = tuple(name for name in kept if name != learned)
    if not kept:
        return f"which scores are kept is not known: name them with --keep. There are {', '.join(there)}"
    return Choice(learned, kept, asked.kinds)


def _kept_by_itself(name: str, there: Sequence[str]) -> bool:
    rate = name.removesuffix("_nll")
    return find(name) is not None and name.partition(".")[0] not in LEARNED and not (rate != name and rate in there)
