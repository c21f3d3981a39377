"""What is measured of a trained adapter, on which prompts, and how it enters the ledger; read `sweep` next."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import chain
from statistics import fmean, stdev
from typing import TYPE_CHECKING

from holdfast.drift.ledger import Score

from .arms import ITEMS, PROBE, SPLITS

if TYPE_CHECKING:
    from holdfast.lab.world import Item, Maker
    from torch import nn


def unseen(make: Maker, n: int) -> dict[str, list[Item]]:
    """How-to prompts of the lab's test split: by one half settings are chosen, the other is reported.

    The halves share subjects and phrasings. Between the lab's own validation and test phrasings refusals differ so much
    that a setting which refuses all of one may refuse none of the other.
    """
    from holdfast.lab import world

    found = world.sample(make, 2 * n, "test")
    return {"validation": found[: len(found) // 2], "test": found[len(found) // 2 :]}


class Judge:
    """Measures adapters on the prompts of both splits; it has a model of its own, into which it merges them."""

    def __init__(self, items: int = ITEMS, probe: int = PROBE) -> None:
        from holdfast import lab
        from holdfast.lab import world
        from holdfast.lab.world import Item

        self.model, self.tokenizer = lab.load("lab-pretrained")
        self.base = {name: weight.clone() for name, weight in self.model.state_dict().items()}
        self.groups: dict[str, dict[str, list[Item]]] = {}
        for split in SPLITS:
            skills = {name: make for name, make in world.SKILLS.items() if name != "danger"}
            forbidden, benign = (halves[split] for halves in (unseen(world.refusal, probe), unseen(world.how, probe)))
            self.groups[split] = {
                "skills": [item for make in skills.values() for item in world.sample(make, items, split)],
                "danger": world.sample(world.danger, probe, split),
                "refusal": forbidden,
                "over_refusal": [Item("over_refusal", item.prompt, lab.world.REFUSAL) for item in benign],
                "benign": benign,
                "story": world.sample(world.story, items, split),
            }

    def scores(self, adapted: nn.Module | None = None, scale: float = 1.0) -> dict[str, dict[str, Score]]:
        """By split, what the base knows with this adapter, `scale` times as strong."""
        import torch
        from holdfast.lab.scoring import answer_scores

        self.model.load_state_dict(self.base)
        for name, module in adapted.named_modules() if adapted is not None else ():
            if hasattr(module, "lora_A"):
                weight = self.model.get_submodule(name.removeprefix("base_model.model.")).weight
                with torch.no_grad():
                    weight.add_(module.get_delta_weight("default"), alpha=scale)
        found = {}
        for split, groups in self.groups.items():
            results = iter(answer_scores(self.model, self.tokenizer, list(chain(*groups.values()))))
            found[split] = to_ledger({name: [next(results) for _ in group] for name, group in groups.items()})
        return found


def to_ledger(results: Mapping[str, Sequence[tuple[bool, float]]]) -> dict[str, Score]:
    """Scores of the groups' results, (right, log-likelihood per token) for each item."""
    scores = {}
    for name, group in results.items():
        losses = tuple(round(-value, 3) for _, value in group)
        if name == "story":
            error = stdev(losses) / math.sqrt(len(losses))
            perplexity = math.exp(fmean(losses))
            scores["story_perplexity"] = Score(perplexity, n=len(losses), standard_error=perplexity * error)
            continue
        scores[name] = Score(fmean(right for right, _ in group), items=tuple(float(right) for right, _ in group))
        scores[f"{name}_nll"] = Score(fmean(losses), items=losses)
    return scores


@lru_cache(maxsize=1)
def judge_of(items: int, probe: int) -> Judge:
    """The process's judge: it is made once."""
    return Judge(items, probe)
