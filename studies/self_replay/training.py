"""The training of one job: what is kept beside the task, its batches, its loop; read `judging` next.

As data, kept sequences join the batch, and  L = CE(task) + strength · CE(kept),  each a mean over its own tokens:
what self-replay's loss is, but with the sequence's own token in place of the base's distribution.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import chain, count, islice
from typing import TYPE_CHECKING, Any

from studies.common_training import own_loss, steps

from .arms import ALPHA, ARMS, BESIDE, KEPT, RANK, REFUSALS, WARM_UP, Job

if TYPE_CHECKING:
    from torch import Tensor, nn

Batch = Mapping[str, Any]


@lru_cache(maxsize=4)
def kept_batches(what: str, seed: int) -> Sequence[Batch]:
    """The pool that the base writes, or as many rows of true data, refusals among them, of the train split."""
    from holdfast import lab
    from holdfast.integrations.retain_data import to_batches
    from holdfast.retain import making
    from holdfast.retain.settings import Settings

    base, tokenizer = lab.load("lab-aligned")
    if what == "pool":
        return making.make(base, tokenizer, Settings(n=KEPT, seed=seed)).batches(tokenizer.pad_token_id)
    rows = [*lab.retain(KEPT - REFUSALS, seed=1000 + seed), *lab.safety_sft(REFUSALS, seed=3000 + seed)]
    return to_batches(rows, tokenizer)


def drawn(kept: Sequence[Batch], seed: int) -> Iterator[Tensor]:
    """The kept sequences as a session's retain stream draws them, pass after pass, so that soft arms have the same."""
    import torch

    both = (zip(batch["input_ids"], batch["attention_mask"], strict=True) for batch in kept)
    rows = [row[mask.bool()] for row, mask in chain.from_iterable(both)]
    for number in count():
        for place in torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed + number)):
            yield rows[place]


def joined(task: Batch, kept: Sequence[Tensor], pad: int, strength: float) -> dict[str, Tensor]:
    """One batch of task rows and kept sequences, with the weight of every token in the loss."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    own = task["labels"][:, 1:] != -100
    ids = [row[mask.bool()] for row, mask in zip(task["input_ids"], task["attention_mask"], strict=True)]
    lengths = torch.tensor([len(each) for each in chain(ids, kept)])
    batch = pad_sequence([*ids, *kept], batch_first=True, padding_value=pad)
    real = torch.arange(batch.shape[1]) < lengths[:, None]
    weights = torch.zeros(len(batch), batch.shape[1] - 1)
    weights[: len(own), : own.shape[1]] = own / own.sum()
    weights[len(own) :] = strength * real[len(own) :, 1:] / real[len(own) :, 1:].sum()
    return {"input_ids": batch, "attention_mask": real.long(), "weights": weights}


def weighted_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The cross-entropy of a joined batch."""
    from torch.nn.functional import cross_entropy

    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    losses = cross_entropy(logits.transpose(1, 2), batch["input_ids"][:, 1:], reduction="none")
    return (losses * batch["weights"]).sum()


def train(job: Job) -> Iterator[tuple[int, nn.Module, float]]:
    """Train; after each of the job's points yield the steps, the model and the CPU seconds of training so far."""
    import torch
    from holdfast import lab
    from holdfast.integrations.retain_data import to_batches
    from peft import LoraConfig, get_peft_model

    arm = ARMS[job.arm]
    kept = kept_batches(arm.beside, job.seed) if arm.beside else ()
    torch.manual_seed(job.seed)
    base, tokenizer = lab.load("lab-aligned")
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, config).train()
    rows = lab.task(job.scenario, n=job.points[-1] * arm.task_rows, seed=job.seed)
    batches: Sequence[Batch] = to_batches(rows, tokenizer, batch_size=arm.task_rows)
    loss: Callable[[nn.Module, Batch], Tensor] = own_loss
    if arm.as_data:
        sequences, pad, loss = drawn(kept, job.seed), tokenizer.pad_token_id, weighted_loss
        batches = [joined(batch, [*islice(sequences, BESIDE)], pad, job.strength) for batch in batches]
    for done, seconds in steps(
        model, batches, arm.methods(job.strength), rate=job.learning_rate, warm_up=WARM_UP, retain=kept,
        tokenizer=tokenizer, seed=job.seed, loss=loss,
    ):  # fmt: skip
        if done in job.points:
            yield done, model, seconds
