"""Two arms, experiments or ledgers side by side: paired differences with intervals, or why nothing can be paired.

    arms of one sweep    at matched learning, paired by seed: `holdfast.analysis.frontier.compare`
    otherwise            B - A at the same settings and seed, mean over settings, interval over seeds and items

Runs at other settings or seeds are not put beside each other, but for the only run of each. One pair of runs has an
interval over its items alone.

Read next: `holdfast.analysis.uncertainty`, the interval; `holdfast.analysis.ledger_page_sides`, what is paired.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from holdfast.analysis.changes import change
from holdfast.analysis.frontier import at_matched_learning, matched_levels
from holdfast.analysis.frontier import compare as matched
from holdfast.analysis.ledger_page_read import Experiment
from holdfast.analysis.ledger_page_runs import plain, shown
from holdfast.analysis.ledger_page_sides import Pairing, pairings, sides_of
from holdfast.analysis.points import BASE
from holdfast.analysis.scores import ScoreKind, find
from holdfast.analysis.tables import comparison_rows
from holdfast.analysis.uncertainty import interval, resample
from holdfast.drift.ledger import Entry

__all__ = ["Difference", "Side", "differences", "side_by_side", "sides_of"]

DRAWS = 400
Kinds = Mapping[str, ScoreKind]
Chosen = Mapping[str, tuple[str, Sequence[str]]]
"""By the title of an experiment, the score that is learned and those that are kept."""
Pair = tuple[Entry, Entry]


@dataclass(frozen=True)
class Difference:
    """One score of A and B over their pairs, as text; `verdict` is of B."""

    score: str
    title: str
    a: str
    b: str
    difference: str
    interval: str
    verdict: str
    pairs: int


@dataclass(frozen=True)
class Side:
    """One pairing: how it was paired, what differs, rows at matched learning of a sweep, what was left out."""

    title: str
    names: tuple[str, str]
    how: str
    differences: tuple[Difference, ...]
    matched: tuple[Mapping[str, str], ...]
    why: tuple[str, ...]


def side_by_side(
    a: str, b: str, experiments: Sequence[Experiment], chosen: Chosen, kinds: Kinds
) -> tuple[list[Side], list[str]]:
    """Everything that can be put side by side, and why the rest cannot.

    Args:
        a: the name of an arm, an experiment or a ledger.
        b: another of the same kind.
        experiments: of the page.
        chosen: which scores are learned and kept, of the experiments that have frontiers.
        kinds: how to read scores that are not known.
    """
    faults, why = list[str](), list[str]()
    sides = sides_of(a, b, experiments, faults)
    if faults:
        return [], faults
    return [_side(pairing, chosen, kinds) for pairing in pairings(a, b, sides, why)], why


def _side(pairing: Pairing, chosen: Chosen, kinds: Kinds) -> Side:
    if pairing.experiment is not None and pairing.experiment.title in chosen:
        rows, why = _at_matched_learning(pairing.experiment, pairing.names, *chosen[pairing.experiment.title], kinds)
        return Side(pairing.title, pairing.names, "at equal learning, paired by seed", (), rows, why)
    pairs, how, reason = _pairs(pairing)
    if not pairs:
        return Side(pairing.title, pairing.names, "", (), (), (reason,))
    found, apart = differences(pairs, kinds)
    return Side(pairing.title, pairing.names, how, tuple(found), (), tuple(apart))


def _at_matched_learning(
    experiment: Experiment, names: tuple[str, str], learned: str, kept: Sequence[str], kinds: Kinds
) -> tuple[tuple[Mapping[str, str], ...], tuple[str, ...]]:
    """B against A on their own fronts."""
    a, b = names
    entries = [entry for entry in experiment.entries if entry.arm in (BASE, a, b)]
    try:
        levels = tuple(dict.fromkeys(matched_levels(entries, a, learned, kinds=kinds)))
        readings = at_matched_learning(entries, learned, kept, levels, kinds=kinds)
        return tuple(comparison_rows(matched(readings, a, kinds=kinds))), ()
    except ValueError as error:
        return (), (str(error),)


def _pairs(pairing: Pairing) -> tuple[list[Pair], str, str]:
    """The pairs, how they were made, and else why there are none."""
    first, second = ({(e.key.settings, e.seed): e for e in side} for side in (pairing.first, pairing.second))
    if not first or not second:
        empty = pairing.names[0] if not first else pairing.names[1]
        return [], "", f"{empty} has no finished run on the split that is reported: nothing to pair."
    if splits := {e.split for e in pairing.first} ^ {e.split for e in pairing.second}:
        return [], "", f"Measured on different splits ({', '.join(sorted(splits))}), that is on other items."
    if both := [key for key in first if key in second]:
        left = len(first) + len(second) - 2 * len(both)
        how = "at the same settings and seed" + (f"; {left} without a partner left out" if left else "")
        return [(first[key], second[key]) for key in both], how, ""
    seeds = [{key[1]: e for key, e in side.items()} for side in (first, second)]
    if len(seeds[0]) == len(first) and len(seeds[1]) == len(second) and (both_seeds := seeds[0].keys() & seeds[1]):
        one, other = (plain(side[min(both_seeds)].settings) for side in seeds)
        how = f"by seed; the settings differ: {one or 'none'} against {other or 'none'}"
        return [(seeds[0][seed], seeds[1][seed]) for seed in sorted(both_seeds)], how, ""
    counts = [f"{len({k for k, _ in side})} settings, seeds {sorted({s for _, s in side})}" for side in (first, second)]
    return [], "", f"They cannot be paired: no setting and seed was run for both ({counts[0]}; {counts[1]})."


def differences(pairs: Sequence[Pair], kinds: Kinds) -> tuple[list[Difference], list[str]]:
    """B - A of every score, and why some are not compared.

    >>> from holdfast.drift.ledger import Score
    >>> a, b = ([Entry("demo", "x", {}, seed, "test", {"skills": Score(value + 0.01 * seed)}, environment={})
    ...          for seed in range(3)] for value in (0.5, 0.8))
    >>> one, = differences(list(zip(a, b)), {})[0]
    >>> one.difference, one.verdict, one.pairs
    ('+0.30', 'better', 3)
    """
    found, apart = [], []
    for name in dict.fromkeys(name for a, b in pairs for name in (*a.scores, *b.scores)):
        both = [(a, b) for a, b in pairs if name in a.scores and name in b.scores]
        if not both:
            apart.append(f"{name} was measured on one side only.")
        elif any(a.scores[name].instrument != b.scores[name].instrument for a, b in both):
            apart.append(f"{name} was measured with two instruments, which says nothing of a difference.")
        else:
            found.append(_difference(name, both, kinds))
    return found, apart


def _difference(name: str, pairs: Sequence[Pair], kinds: Kinds) -> Difference:
    mean, low, high = _spread(name, pairs, bool((known := find(name, kinds)) and known.share))
    a, b = (float(np.mean([pair[side].scores[name].value for pair in pairs])) for side in (0, 1))
    ends = [shown(name, end, kinds, signed=True) for end in (low, high)]
    same = all(one.scores[name].value == other.scores[name].value for one, other in pairs)
    told = "" if same else f"[{ends[0]}, {ends[1]}]" if math.isfinite(low) else "no interval"
    verdict = "identical" if same else _verdict(mean, low, high, known)
    return Difference(
        name, known.title if known else name, shown(name, a, kinds), shown(name, b, kinds),
        shown(name, mean, kinds, signed=True), told, verdict, len(pairs),
    )  # fmt: skip


def _spread(name: str, pairs: Sequence[Pair], share: bool) -> tuple[float, float, float]:
    """The mean of B - A and its interval: over seeds and items, or of one pair over its items."""
    if len(pairs) == 1:
        try:
            one = change(pairs[0][0].scores[name], pairs[0][1].scores[name], share=share)
            return (one.value, *one.interval())
        except ValueError:  # other items on both sides: the values alone are left
            mean = pairs[0][1].scores[name].value - pairs[0][0].scores[name].value
            return mean, -math.inf, math.inf
    by_seed = defaultdict(list)
    for a, b in pairs:
        drawn = [resample(e.scores[name], name, f"{e.arm}|{e.key}|{e.time}", DRAWS, share) for e in (a, b)]
        by_seed[a.seed].append(drawn[1] - drawn[0])
    return interval(np.stack([np.mean(own, axis=0) for own in by_seed.values()]))


def _verdict(mean: float, low: float, high: float, known: ScoreKind | None) -> str:
    if not (math.isfinite(low) and math.isfinite(high)):
        return "not known"
    if low <= 0 <= high:
        return "within noise"
    if known is None:
        return "higher" if mean > 0 else "lower"
    return "better" if (mean > 0) == known.higher_is_better else "worse"
