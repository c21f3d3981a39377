"""What is measured of a trained adapter, on which prompts; read `sweep` next."""

from __future__ import annotations

from functools import lru_cache

from studies.alignguard.judging import LabJudge

from .arms import SPLITS, Job


class Judge(LabJudge):
    """Measures adapters of `lab-aligned` on the prompts of both splits, its rare skill among them.

    Args:
        task: that is learnt.
        items: questions of each skill; of the rare one three times as many. Half as many to choose by.
        probe: forbidden prompts, and as many look-alikes.
    """

    def __init__(self, task: str, items: int, probe: int) -> None:
        from holdfast.lab import world

        super().__init__(task, items, probe)
        sizes = dict(zip(SPLITS, (3 * items // 2, 3 * items), strict=True))
        self.groups = {
            split: {**groups, "rare": world.sample(world.rare, sizes[split], split)}
            for split, groups in self.groups.items()
        }


@lru_cache(maxsize=2)
def _judge(scenario: str, items: int, probe: int) -> Judge:
    return Judge(scenario, items, probe)


def judge_of(job: Job) -> Judge:
    """The process's judge of a scenario: it is made once."""
    return _judge(job.scenario, job.items, job.probe)
