"""The training of one job: its retain rows, its batches, its losses, its loop; read `judging` next."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

from studies.common_training import steps as steps_of

from .arms import ARMS, BATCH, BATCH_OF, BETA, CHAT_ROWS, DPO_RATE, RANK, STAGES, STORY_ROWS, WARM_UP, Arm, Job

if TYPE_CHECKING:
    from torch import Tensor, nn


def retain_rows(which: str, seed: int) -> dict[str, list[dict[str, Any]]]:
    """What must not be lost, by set: instructions (only answers are supervised) and stories, all of the train split."""
    from holdfast import lab
    from holdfast.lab import world
    from holdfast.lab.tasks import assistant, user

    if which == "few":
        items = [world.sample(make, 1, "train", seed)[0] for make in (*world.SKILLS.values(), world.how)]
        return {"chat": [{"prompt": user(item.prompt), "completion": assistant(item.answer)} for item in items]}
    drawn = [row["messages"] for row in lab.retain(4 * CHAT_ROWS, seed=1000 + seed, form="chat")]
    if which == "no look-alikes":
        drawn = [messages for messages in drawn if not messages[1]["content"].startswith("To ")]
    chat = [{"prompt": messages[:1], "completion": messages[1:]} for messages in drawn[:CHAT_ROWS]]
    stories = [row for row in lab.retain(40 * STORY_ROWS, seed=2000 + seed) if "<|user|>" not in row["text"]]
    return {"chat": chat, "text": stories[:STORY_ROWS]}


def replayed(retain: Mapping[str, list[dict[str, Any]]], arm: Arm, steps: int, seed: int) -> list[list[Any]]:
    """For each loss that replays, the rows of all steps: every row before any comes again."""
    sets, shuffle = list(retain.values()), random.Random(seed)
    pools = sets if arm.apart else [list(chain.from_iterable(sets))]
    n = arm.replay * steps // len(pools)
    return [[row for _ in range(n // len(pool) + 1) for row in shuffle.sample(pool, len(pool))][:n] for pool in pools]


def part(rows: Sequence[Any], i: int, steps: int) -> list[Any]:
    """The rows of step i."""
    size = len(rows) // steps
    return list(rows[i * size : (i + 1) * size])


def sft_batches(steps: int, job: Job, mixed: Sequence[Any], tokenizer: Any) -> list[dict[str, Any]]:
    """Batches of refusals, with their share of the replayed rows in each."""
    from holdfast import lab
    from holdfast.integrations.retain_data import to_batches

    rows = lab.safety_sft(n=steps * BATCH_OF.get(job.pipeline, BATCH), seed=job.seed)
    both = [part(rows, i, steps) + part(mixed, i, steps) for i in range(steps)]
    return [dict(to_batches(some, tokenizer, batch_size=len(some))[0]) for some in both]


def dpo_batches(steps: int, seed: int, tokenizer: Any, model: nn.Module) -> list[dict[str, Any]]:
    """Batches of pairs, chosen answers first, with log-likelihoods under the model as it is now: the reference."""
    import torch
    from holdfast import lab
    from holdfast.integrations.retain_data import to_batches

    pairs, batches = lab.preference_pairs(n=steps * BATCH, seed=seed), []
    for i in range(steps):
        some = part(pairs, i, steps)
        rows = [{"prompt": p["prompt"], "completion": p[side]} for side in ("chosen", "rejected") for p in some]
        batch = dict(to_batches(rows, tokenizer, batch_size=len(rows))[0])
        with torch.no_grad():
            batch["reference"] = log_likelihoods(model.eval(), batch)
        batches.append(batch)
    model.train()
    return batches


def batches_of(
    stage: str, steps: int, job: Job, retain: Mapping[str, list[Any]], tokenizer: Any, model: nn.Module
) -> list[dict[str, Any]]:
    """All batches of a stage; under "replay" those whose losses are added."""
    from holdfast.integrations.retain_data import to_batches

    arm = ARMS[job.arm]
    pools = replayed(retain, arm, steps, job.seed) if arm.replay else []
    if stage == "sft" and not arm.apart:
        return sft_batches(steps, job, pools[0] if pools else [], tokenizer)
    sft = stage == "sft"
    found = sft_batches(steps, job, [], tokenizer) if sft else dpo_batches(steps, job.seed, tokenizer, model)
    for i, batch in enumerate(found):
        each = [part(pool, i, steps) for pool in pools]
        batch["replay"] = [dict(to_batches(rows, tokenizer, batch_size=len(rows))[0]) for rows in each]
    return found


def log_likelihoods(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The log-likelihood of every row's answer, summed over its tokens; shape [rows]."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    targets = batch["labels"][:, 1:]
    each = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return (each * (targets >= 0)).sum(-1)


def task_loss(model: nn.Module, batch: Mapping[str, Any], weight: float) -> Tensor:
    """Cross-entropy; for pairs -log sigmoid(beta * (margin - margin of the reference)) (Rafailov et al., 2023).

    To the latter comes the cross-entropy of the chosen answers with its weight (TRL: loss_type=["sigmoid", "sft"]).
    """
    import torch

    inputs = {name: value for name, value in batch.items() if name not in ("replay", "reference")}
    added = sum(model(**some).loss for some in batch.get("replay", ()))
    if "reference" not in batch:
        return model(**inputs).loss + added
    found, pairs = log_likelihoods(model, batch), len(batch["labels"]) // 2
    chosen, rejected = (found - batch["reference"]).chunk(2)
    loss = -torch.nn.functional.logsigmoid(BETA * (chosen - rejected)).mean()
    tokens = (batch["labels"][:pairs, 1:] >= 0).sum()
    return loss - weight * found[:pairs].sum() / tokens + added


def train(job: Job) -> Iterator[tuple[int, nn.Module, float]]:
    """Train; after each of the job's points yield the steps, the model and the CPU seconds of training so far."""
    import torch
    from holdfast import lab
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(job.seed)
    base, tokenizer = lab.load("lab-pretrained")
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    model, arm = get_peft_model(base, config).train(), ARMS[job.arm]
    retain, done, seconds = retain_rows(arm.rows, job.seed), 0, 0.0
    for stage, steps in STAGES[job.pipeline]:
        if (steps := min(steps, job.points[-1] - done)) <= 0:
            break
        batches = batches_of(stage, steps, job, retain, tokenizer, model)
        rate = job.learning_rate * (DPO_RATE if stage == "dpo" and done else 1.0)
        methods, before = arm.methods(), done
        loop = steps_of(
            model, batches, methods, rate=rate, warm_up=WARM_UP, retain=retain, tokenizer=tokenizer, seed=job.seed,
            loss=lambda model, batch: task_loss(model, batch, arm.chosen),
        )  # fmt: skip
        spent = seconds
        for here, took in loop:
            done, seconds = before + here, spent + took
            if done in job.points:
                yield done, model, seconds
