"""What is measured of a trained adapter, on which prompts; read `sweep` next."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from holdfast.drift.ledger import Score

from studies.common_lab import Adapted, rate_and_loss, unseen
from studies.stories_safety.judging import judge as judge_rows
from studies.stories_safety.judging import merged

from . import story_rows
from .arms import LAB, SPLITS, Job

if TYPE_CHECKING:
    from holdfast.lab.world import Item
    from torch import nn

Scores = Mapping[str, Mapping[str, Score]]  # by split
NO_RATE = ("text",)  # a whole story is never the greedy one


class LabJudge(Adapted):
    """Measures adapters of `lab-aligned` on the prompts of both splits.

    Args:
        task: that is learnt.
        items: questions of each skill; the task has six times as many, text twice as many. Half as many to choose by.
        probe: forbidden prompts, and as many look-alikes.
    """

    def __init__(self, task: str, items: int, probe: int) -> None:
        from holdfast.lab import world
        from holdfast.lab.tasks import parts
        from holdfast.lab.world import Item

        groups: dict[str, dict[str, list[Item]]] = {}
        for split in SPLITS:
            share = 1 if split == "test" else 2
            halves = (unseen(make, probe)[split] for make in (world.refusal, world.how))
            forbidden, benign = (half[: probe // share] for half in halves)
            groups[split] = {
                "task": [item for make in parts(task) for item in world.sample(make, 3 * items // share, split)],
                "refusal": forbidden,
                "over_refusal": [Item("over_refusal", item.prompt, world.REFUSAL) for item in benign],
                "benign": benign,
                "skills": [
                    item for make in world.SKILLS.values() for item in world.sample(make, items // share, split)
                ],
                "text": world.sample(world.story, 2 * items // share, split),
            }
        super().__init__("lab-aligned", groups)

    def __call__(self, adapted: nn.Module | None, scale: float = 1.0) -> Scores:
        """By split, the scores of the base with this adapter, `scale` times as strong."""
        self.merge(adapted, scale)
        found = {}
        for split in self.groups:
            each = [rate_and_loss(name, results) for name, results in self.results(split).items()]
            found[split] = {name: score for part in each for name, score in part.items() if name not in NO_RATE}
        return found


class StoriesJudge:
    """Measures adapters of stories260K on held-out answers and stories."""

    def __init__(self, work: Path) -> None:
        self.rows = story_rows.measured(work)
        self.base = story_rows.load(work)[0].eval()

    def __call__(self, adapted: nn.Module | None, scale: float = 1.0) -> Scores:
        """By split, the scores of the base with this adapter, `scale` times as strong."""
        return judge_rows(self.base if adapted is None else merged(adapted, scale), self.rows)


@lru_cache(maxsize=3)
def _judge(scenario: str, items: int, probe: int, work: Path) -> LabJudge | StoriesJudge:
    return LabJudge(scenario, items, probe) if scenario in LAB else StoriesJudge(work)


def judge_of(job: Job) -> LabJudge | StoriesJudge:
    """The process's judge of a scenario: it is made once."""
    return _judge(job.scenario, job.items, job.probe, job.work)
