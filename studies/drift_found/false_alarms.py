"""Does the gate cry wolf? Base and tuned change places at random, item by item, so nothing can have drifted.

    swapped_i ~ Bernoulli(1/2), one draw for all scores that share item i;   failed = the gate finds drift all the same

The items are real ones, with their ties, tails and dependence between scores. Read next: `page`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from holdfast.analysis.budgets import Budget, Gate
from holdfast.analysis.changes import link_of
from holdfast.analysis.gate import judge
from holdfast.analysis.gate_file import read_gate
from holdfast.drift.ledger import JSON, Entry, Score
from scipy.stats import binom

Scores = Mapping[str, Score]

LAB_GATE = Path(__file__).resolve().parents[2] / "recipes/gates/lab.yaml"
DRAWS, LEVEL, SURE = 200, 0.05, 0.01
OF_ZERO: tuple[Budget, ...] = (
    Budget("refusal", "fall", 0.0),
    Budget("over_refusal", "rise", 0.0),
    Budget("refusal_margin", "fall", 0.0),
    Budget("exact_answer.skills", "fall", 0.0),
    Budget("exact_answer.how_to", "fall", 0.0),
    Budget("perplexity.stories", "rise", 0.0),
)
SHARED = {  # which scores speak of the same items, in one order
    "refusal": "pairs", "over_refusal": "pairs",  # the margin is measured on every other pair
    "perplexity.stories": "stories", "output_kl.stories": "stories",
}  # fmt: skip


def gates() -> dict[str, Gate]:
    """The two gates, by what the page calls them."""
    return {"budgets of 0": Gate(OF_ZERO, level=LEVEL), "recipes/gates/lab.yaml": read_gate(LAB_GATE)}


def bar(draws: int = DRAWS, level: float = LEVEL, sure: float = SURE) -> int:
    """As many failures as a gate that truly fails `level` exceeds with a chance of at most `sure`.

    >>> bar()
    18
    """
    return int(binom.isf(sure, draws, level))


def swapped(base: Scores, tuned: Scores, names: Sequence[str], draw: random.Random) -> tuple[Scores, Scores]:
    """Both sides after their items changed places at random; scores of the same items change them together.

    >>> one = {"refusal": Score(1.0, items=(1, 1))}, {"refusal": Score(0.5, items=(1, 0))}
    >>> before, after = swapped(*one, ["refusal"], random.Random(0))
    >>> sorted([before["refusal"].items, after["refusal"].items])
    [(1.0, 0.0), (1.0, 1.0)]
    """
    coins: dict[str, list[bool]] = {}
    sides: tuple[dict[str, Score], dict[str, Score]] = {}, {}
    for name in names:
        pairs = list(zip(base[name].items or (), tuned[name].items or (), strict=True))
        coin = coins.setdefault(SHARED.get(name, name), [draw.random() < 0.5 for _ in pairs])
        turned = [(b, a) if turn else (a, b) for (a, b), turn in zip(pairs, coin, strict=True)]
        for side, items in zip(sides, zip(*turned, strict=True), strict=True):
            side[name] = of_items(base[name], items)
    return sides


def of_items(like: Score, items: Sequence[float]) -> Score:
    """A score with other items, whose value follows from them as it did before."""
    mean = fmean(items)
    value = math.exp(mean) if link_of(like) == "log" else mean
    return replace(like, value=value, items=tuple(items), interval=None)


def failures(gate: Gate, runs: Sequence[tuple[Scores, Scores]], draws: int = DRAWS) -> Iterator[bool]:
    """Whether the gate fails, of each draw; runs take turns, and every draw has a seed of its own."""
    names = list(dict.fromkeys(budget.score for budget in gate.budgets))
    for seed in range(draws):
        base, tuned = swapped(*runs[seed % len(runs)], names, random.Random(seed))
        yield not judge(gate, base, tuned).passed


def entries(experiment: str, items: str, runs: Sequence[tuple[Scores, Scores]], draws: int = DRAWS) -> Iterator[Entry]:
    """One line for each gate: the share of draws in which it failed, and how many of its scores could make it."""
    for name, gate in gates().items():
        failed = tuple(float(one) for one in failures(gate, runs, draws))
        scores = {budget.score for budget in gate.budgets}
        alive = {score for base, tuned in runs for score in scores if base[score].items != tuned[score].items}
        settings: dict[str, JSON] = {"items": items, "gate": name, "level": gate.level, "budgets": len(gate.budgets)}
        settings |= {"scores": len(scores), "scores that differ": len(alive)}
        yield Entry(experiment, name, settings, 0, "test", {"failed": Score(fmean(failed), items=failed)})
