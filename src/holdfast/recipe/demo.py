"""The demo's runs: which arms are compared, and what one training and its evaluations are.

Every arm tries three settings (learning rates for plain LoRA, strengths for the rest) and is evaluated at the same
post-hoc adapter scales, on two disjoint splits: settings are chosen on one and reported on the other. Self-replay sees
fewer task rows in a step and learns more slowly, so it trains twice as long; plain LoRA has a fourth setting that does
so too.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

from ..drift.ledger import Entry, RunKey, Score

if TYPE_CHECKING:
    from ..core.method import Method
    from ..lab import Score as LabScore
    from ..lab import Scores

EXPERIMENT, BASE = "demo", "base"
SCALES = (0.7, 0.85, 1.0)
SPLITS: tuple[Literal["validation", "test"], ...] = ("validation", "test")
STEPS, BATCH, WARM_UP = 120, 12, 10
REPLAYED = 3  # of a batch: what self-replay holds to the base in place of as many task rows, so that it costs the same
LEARNING_RATE = 3e-3  # of the regularised arms; plain LoRA sweeps its own
ITEMS = 32  # prompts per skill and split


@dataclass(frozen=True)
class Job:
    """One training run: an arm, the setting that it tries, and a seed."""

    arm: str
    learning_rate: float
    strength: float
    seed: int
    length: int = 1
    """Times the steps of the other runs."""

    def settings(self, scale: float) -> dict[str, Any]:
        """Return what the ledger calls the settings of one of this run's points."""
        return {
            "learning_rate": self.learning_rate, "strength": self.strength, "length": self.length, "scale": scale,
        }  # fmt: skip

    def missing(self, done: frozenset[RunKey]) -> bool:
        """Return whether some point of this run is not in the ledger yet."""
        return any(RunKey.of(EXPERIMENT, self.arm, self.settings(scale), self.seed) not in done for scale in SCALES)

    def methods(self) -> list[Method]:
        """Return the arm's list of methods."""
        from ..methods import FullKL, SelfReplay, TargetMaskedKL

        masked = TargetMaskedKL(strength=self.strength)
        arms: dict[str, list[Method]] = {
            "plain LoRA": [],
            "full KL": [FullKL(strength=self.strength)],
            "TMKL": [masked],
            "TMKL + prompt": [masked, replace(masked, positions="prompt")],
            "self-replay": [SelfReplay(strength=self.strength)],
        }
        return arms[self.arm]


def jobs(seeds: int = 2) -> list[Job]:
    """Return every run of the demo, the slow ones first: five arms, of each a rate, a strength and a length."""
    on_task = tuple((LEARNING_RATE, strength, 1) for strength in (0.03, 0.1, 0.3))
    arms: Mapping[str, tuple[tuple[float, float, int], ...]] = {
        "self-replay": tuple((LEARNING_RATE, strength, 2) for strength in (0.1, 0.3, 1.0)),
        "TMKL + prompt": on_task,
        "TMKL": on_task,
        "full KL": on_task,
        "plain LoRA": ((1e-3, 0.0, 2), (1e-3, 0.0, 1), (2e-3, 0.0, 1), (3e-3, 0.0, 1)),
    }
    return [
        Job(arm, rate, strength, seed, length)
        for arm, settings in arms.items()
        for rate, strength, length in settings
        for seed in range(seeds)
    ]


def measured_otherwise(entries: Iterable[Entry], steps: int, items: int) -> bool:
    """Return whether some entry is of trainings of another length, other prompts, or an older version of the demo."""

    def as_long(entry: Entry) -> bool:
        length = entry.settings.get("length")
        return entry.arm == BASE or (isinstance(length, int) and entry.cost.get("steps") == steps * length)

    return any(not as_long(entry) or entry.scores["refusal"].n != items for entry in entries)


def base_entries(items: int = ITEMS) -> list[Entry]:
    """Measure the model before tuning: adapter scale 0, a point of every arm."""
    from .. import lab

    model, tokenizer = lab.load("lab-aligned")
    scores = {split: lab.evaluate(model, tokenizer, split=split, items_per_skill=items) for split in SPLITS}
    return [Entry(EXPERIMENT, BASE, {"scale": 0.0}, 0, split, to_ledger(found)) for split, found in scores.items()]


def run(job: Job, steps: int = STEPS, items: int = ITEMS, on_step: Callable[[], None] = lambda: None) -> list[Entry]:
    """Tune a LoRA adapter as the job says and return its ledger entries, one for each scale and split."""
    import torch
    from peft import LoraConfig, get_peft_model

    from .. import lab
    from ..integrations.plain_loop import preserve
    from ..integrations.pools import sampled
    from ..integrations.retain_data import to_batches
    from ..methods.posthoc import scale_adapter
    from ..retain.settings import Settings

    steps *= job.length
    torch.manual_seed(job.seed)
    base, tokenizer = lab.load("lab-aligned")
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, config).train()
    methods = job.methods()
    pool = sampled(base, tokenizer, Settings(seed=job.seed)) if any(method.uses_retain for method in methods) else ()
    batch_size = BATCH - REPLAYED if pool else BATCH
    rows = lab.task("shift", n=steps * batch_size, seed=job.seed)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], job.learning_rate, weight_decay=0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / WARM_UP) * (1 - 0.9 * step / steps)
    )
    started = time.perf_counter()
    with preserve(model, optimizer, methods, retain=pool, tokenizer=tokenizer, seed=job.seed) as session:
        for batch in to_batches(rows, tokenizer, batch_size=batch_size):
            loss = model(**batch).loss + session.loss(batch)
            loss.backward()
            session.gradients_ready()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            on_step()
    cost, entries = {"train_seconds": time.perf_counter() - started, "steps": float(steps)}, []
    for scale in SCALES:
        with scale_adapter(model, scale):
            for split in SPLITS:
                scores = to_ledger(lab.evaluate(model, tokenizer, split=split, items_per_skill=items))
                entries.append(Entry(EXPERIMENT, job.arm, job.settings(scale), job.seed, split, scores, cost))
    return entries


def to_ledger(scores: Scores) -> dict[str, Score]:
    """Return the lab's scores as the ledger's, per-item results included."""

    def rate(*parts: LabScore) -> Score:
        items = tuple(chain.from_iterable(part.items for part in parts))
        return Score(fmean(items), items=items)

    def loss(*parts: LabScore) -> Score:
        items = tuple(round(-value, 5) for part in parts for value in part.log_likelihoods)
        return Score(fmean(items), items=items)

    learnt, skills, story = scores.tasks.values(), scores.skills.values(), loss(scores.story)
    return {
        "adaptation": rate(*learnt),
        "adaptation_nll": loss(*learnt).without_items(),
        "skills": rate(*skills),
        "skills_nll": loss(*skills).without_items(),
        "rare": rate(scores.rare).without_items(),
        "rare_nll": loss(scores.rare).without_items(),
        "refusal": rate(scores.refusal),
        "refusal_nll": loss(scores.refusal),
        "over_refusal": rate(scores.over_refusal),
        "story_perplexity": Score(math.exp(story.value), items=story.items),
    }
