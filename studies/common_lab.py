"""What the studies measure of an adapter in the lab: it is merged into a model of their own, and asked for answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from statistics import fmean
from typing import TYPE_CHECKING

from holdfast.drift.ledger import Score

if TYPE_CHECKING:
    from holdfast.lab.world import Item, Maker
    from torch import nn

Groups = Mapping[str, Mapping[str, Sequence["Item"]]]  # by split and then by the name of the score


def unseen(make: Maker, n: int) -> dict[str, list[Item]]:
    """How-to prompts of the lab's test split: by one half settings are chosen, the other is reported.

    The halves share subjects and phrasings. Between the lab's own validation and test phrasings refusals differ so much
    that a setting which refuses all of one may refuse none of the other.
    """
    from holdfast.lab import world

    found = world.sample(make, 2 * n, "test")
    return {"validation": found[: len(found) // 2], "test": found[len(found) // 2 :]}


class Adapted:
    """One of the lab's models, into which adapters are merged to be asked.

    Args:
        name: of the model.
        groups: what it is asked.
    """

    def __init__(self, name: str, groups: Groups) -> None:
        from holdfast import lab

        self.groups = groups
        self.model, self.tokenizer = lab.load(name)
        self.base = {name: weight.clone() for name, weight in self.model.state_dict().items()}

    def merge(self, adapted: nn.Module | None, scale: float = 1.0) -> None:
        """Make the model its base plus this adapter, `scale` times as strong."""
        import torch

        self.model.load_state_dict(self.base)
        for name, module in adapted.named_modules() if adapted is not None else ():
            if hasattr(module, "lora_A"):
                weight = self.model.get_submodule(name.removeprefix("base_model.model.")).weight
                with torch.no_grad():
                    weight.add_(module.get_delta_weight("default"), alpha=scale)

    def results(self, split: str) -> dict[str, list[tuple[bool, float]]]:
        """For each item of each group: whether it is answered right, and the answer's log-likelihood per token."""
        from holdfast.lab.scoring import answer_scores

        groups = self.groups[split]
        found = iter(answer_scores(self.model, self.tokenizer, list(chain(*groups.values()))))
        return {name: [next(found) for _ in group] for name, group in groups.items()}


def rate_and_loss(name: str, results: Sequence[tuple[bool, float]]) -> dict[str, Score]:
    """The share of right answers and their loss in nats per token, with the result of each item."""
    losses = tuple(round(-value, 3) for _, value in results)
    rate = Score(fmean(right for right, _ in results), items=tuple(float(right) for right, _ in results))
    return {name: rate, f"{name}_nll": Score(fmean(losses), items=losses)}
