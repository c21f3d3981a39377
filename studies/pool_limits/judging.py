"""What is measured of a trained model, on which prompts; read `sweep` next."""

from __future__ import annotations

import random
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING

from holdfast.drift.ledger import Score

from studies.common_lab import Adapted, rate_and_loss, unseen

from .arms import SCENARIOS, SPLITS, Job
from .formats import FORMATS, Answer, Context, answers, contexts

if TYPE_CHECKING:
    from holdfast.lab.lexicon import Split
    from holdfast.lab.world import Item
    from torch import nn

Scores = Mapping[str, Mapping[str, Score]]  # by split
NO_RATE = ("text",)  # a whole story is never the greedy one
REFUSED_OF, SKILLS_OF = 12, 3  # prompts to report in each format: forbidden ones, and of each skill


class Judge(Adapted):
    """Measures what `lab-aligned` became on the prompts of both splits.

    Args:
        task: that is learnt.
        items: questions of each skill; the task, text and the rare skill have twice or three times as many.
        probe: forbidden prompts, and as many look-alikes.
    """

    def __init__(self, task: str, items: int, probe: int) -> None:
        from holdfast.lab import world
        from holdfast.lab.tasks import parts

        groups: dict[str, dict[str, list[Item]]] = {}
        for split in SPLITS:
            share = 1 if split == "test" else 2
            n = max(1, items // share)
            refusal, benign = (unseen(make, probe)[split][: probe // share] for make in (world.refusal, world.how))
            groups[split] = {
                "task": [item for make in parts(task) for item in world.sample(make, 3 * n, split)],
                "refusal": refusal,
                "benign": benign,
                **{f"skill.{name}": world.sample(make, n, split) for name, make in world.SKILLS.items()},
                "rare": world.sample(world.rare, 2 * n, split),
                "text": world.sample(world.story, 2 * n, split),
                "wording": in_other_words(task, 2 * n, split),
            }
        super().__init__("lab-aligned", groups)
        self.contexts = {split: self._contexts(split, task, items, 1 if split == "test" else 2) for split in SPLITS}
        for found in self.contexts.values():
            self._formats(found)  # the base's own answers, which later models are compared with

    def _contexts(self, split: Split, task: str, items: int, share: int) -> dict[str, dict[str, list[Context]]]:
        """What is asked by format: skills, and what is forbidden; where flags are learnt, statements about them too."""
        from holdfast.lab import world

        n = max(1, min(SKILLS_OF, items) // share)
        skills = [item for make in world.SKILLS.values() for item in world.sample(make, n, split, seed=1)]
        refusals = self.groups[split]["refusal"][: REFUSED_OF // share]
        found = {
            form: {
                "skills": contexts(form, skills, self.tokenizer, split),
                "refusal": contexts(form, refusals, self.tokenizer, split),
            }
            for form in FORMATS
        }
        bos, *texts = [
            self.tokenizer.bos_token_id,
            *self.tokenizer([i.answer for i in self.groups[split]["text"]], add_special_tokens=False).input_ids,
        ]
        found["plain"] = {"text": [Context([bos, *ids], 1) for ids in texts]}
        if task == "second":
            found["statement"] = {"flags": statements(self.tokenizer, 2 * items // share, split)}
        return found

    def merge(self, adapted: nn.Module | None, scale: float = 1.0) -> None:
        """Make the model its base plus what was learnt, `scale` times as strong."""
        import torch

        super().merge(adapted, scale)
        if adapted is None or any(hasattr(module, "lora_A") for module in adapted.modules()):
            return
        learnt = dict(adapted.named_parameters())
        with torch.no_grad():
            for name, weight in self.model.named_parameters():
                weight.add_(learnt[name] - weight, alpha=scale)

    def __call__(self, adapted: nn.Module | None, scale: float = 1.0) -> Scores:
        """By split, the scores of the base with what was learnt, `scale` times as strong."""
        self.merge(adapted, scale)
        found = {}
        for split in self.groups:
            results = self.results(split)
            results["skills"] = [each for name, some in results.items() if name.startswith("skill.") for each in some]
            each = [rate_and_loss(name, some) for name, some in results.items()]
            scores = {name: score for part in each for name, score in part.items() if name not in NO_RATE}
            found[split] = scores | self._formats(self.contexts[split])
        return found

    def _formats(self, found: Mapping[str, Mapping[str, list[Context]]]) -> dict[str, Score]:
        """In every format: the KL from the base, and what is right and refused in it."""
        flat = [each for groups in found.values() for some in groups.values() for each in some]
        results = iter(answers(self.model, flat))
        scores: dict[str, Score] = {}
        for form, groups in found.items():
            told = {name: [next(results) for _ in some] for name, some in groups.items()}
            scores[f"kl.{form}"] = mean([each.kl for some in told.values() for each in some])
            for name, some in told.items():
                if name != "text":
                    scores |= _told(f"{form}.{name}", some)
        return scores


def _told(name: str, found: list[Answer]) -> dict[str, Score]:
    return {
        f"rate.{name}": mean([float(one.right) for one in found]),
        f"loss.{name}": mean([one.loss for one in found]),
    }


def mean(values: list[float]) -> Score:
    """The mean, with what it is of."""
    items = tuple(round(value, 4) for value in values)
    return Score(sum(items) / len(items), items=items)


def in_other_words(task: str, n: int, split: Split) -> list[Item]:
    """The task, asked in words in which it is never trained."""
    from holdfast.lab import lexicon as lex
    from holdfast.lab import tasks, world
    from holdfast.lab.world import Item

    if task == "shift":
        turned = [Item("rotate", f"Please {item.prompt}", item.answer) for item in world.sample(tasks.rotate, n, split)]
        short = [
            Item("new_format", item.prompt.replace("In short:", "Say in short:"), item.answer)
            for item in world.sample(tasks.new_format, n, split)
        ]
        return turned + short
    flags = {
        next(
            country for country in lex.COUNTRIES if f" {country}?" in item.prompt or f" {country}." in item.prompt
        ): item
        for item in world.sample(tasks.flag, 60, split)
    }
    return [
        Item("flag", f"{country} has a flag. Which colour?", item.answer) for country, item in chosen(flags, n, split)
    ]


def chosen(flags: Mapping[str, Item], n: int, split: Split) -> list[tuple[str, Item]]:
    """Some countries, in an order of the split's."""
    return random.Random(f"flags {split}").sample(sorted(flags.items()), min(n, len(flags)))


def statements(tokenizer: object, n: int, split: Split) -> list[Context]:
    """Plain text that says what the questions of the task teach: The flag of Loria is red."""
    from holdfast.lab import lexicon as lex
    from holdfast.lab import tasks, world

    found = []
    for item in world.sample(tasks.flag, 60, split):
        country = next(name for name in lex.COUNTRIES if name in item.prompt)
        ids = [tokenizer.bos_token_id, *tokenizer(f"The flag of {country} is", add_special_tokens=False).input_ids]
        answer = tokenizer(item.answer, add_special_tokens=False).input_ids
        found.append(Context([*ids, *answer], len(ids)))
    return found[:n]


@lru_cache(maxsize=2)
def _judge(task: str, items: int, probe: int) -> Judge:
    return Judge(task, items, probe)


def judge_of(job: Job) -> Judge:
    """The process's judge of a task: it is made once."""
    return _judge(SCENARIOS[job.scenario].task, job.items, job.probe)
