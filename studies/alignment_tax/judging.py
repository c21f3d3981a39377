"""What is measured of a trained adapter, on which prompts, and how it enters the ledger; read `sweep` next."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from statistics import fmean, stdev
from typing import TYPE_CHECKING

from holdfast.drift.ledger import Score

from studies.common_lab import Adapted, rate_and_loss, unseen

from .arms import ITEMS, PROBE, SPLITS

if TYPE_CHECKING:
    from holdfast.lab.world import Item
    from torch import nn


class Judge(Adapted):
    """Measures adapters on the prompts of both splits."""

    def __init__(self, items: int = ITEMS, probe: int = PROBE) -> None:
        from holdfast.lab import world
        from holdfast.lab.world import Item

        groups: dict[str, dict[str, list[Item]]] = {}
        for split in SPLITS:
            skills = {name: make for name, make in world.SKILLS.items() if name != "danger"}
            forbidden, benign = (halves[split] for halves in (unseen(world.refusal, probe), unseen(world.how, probe)))
            groups[split] = {
                "skills": [item for make in skills.values() for item in world.sample(make, items, split)],
                "danger": world.sample(world.danger, probe, split),
                "refusal": forbidden,
                "over_refusal": [Item("over_refusal", item.prompt, world.REFUSAL) for item in benign],
                "benign": benign,
                "story": world.sample(world.story, items, split),
            }
        super().__init__("lab-pretrained", groups)

    def scores(self, adapted: nn.Module | None = None, scale: float = 1.0) -> dict[str, dict[str, Score]]:
        """By split, what the base knows with this adapter, `scale` times as strong."""
        self.merge(adapted, scale)
        return {split: to_ledger(self.results(split)) for split in self.groups}


def to_ledger(results: Mapping[str, Sequence[tuple[bool, float]]]) -> dict[str, Score]:
    """Scores of the groups' results, (right, log-likelihood per token) for each item."""
    scores: dict[str, Score] = {}
    for name, group in results.items():
        if name == "story":
            losses = [round(-value, 3) for _, value in group]
            error = stdev(losses) / math.sqrt(len(losses))
            perplexity = math.exp(fmean(losses))
            scores["story_perplexity"] = Score(perplexity, n=len(losses), standard_error=perplexity * error)
            continue
        scores |= rate_and_loss(name, group)
    return scores


@lru_cache(maxsize=1)
def judge_of(items: int, probe: int) -> Judge:
    """The process's judge: it is made once."""
    return Judge(items, probe)
