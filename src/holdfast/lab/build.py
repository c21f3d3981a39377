"""Recreate the lab's models from code and a seed: pretrain on the world, then safety-train a copy.

    loss = sum_t w_t * CE_t / sum_t w_t,   w = min(1, 6 / T) on an answer or story of T tokens, 0.1 on prompts

so that long answers do not drown short ones. Prompts are learnt a little, so that the base can invent its own: that is
what self-replay samples. Short sequences are packed into rows, each seeing only itself. Beside the weights lies
`provenance.json`: the recipe's fingerprint, the first losses at full precision, and the scores; tests run the first
steps again and compare. Read next: `muon`, the optimizer; `provenance`, the table in the documentation.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from holdfast.lab import models, world
from holdfast.lab.muon import Muon
from holdfast.lab.scoring import evaluate
from holdfast.lab.tasks import TASKS
from holdfast.lab.tokenizer import build_tokenizer, encode
from holdfast.lab.world import Maker
from torch import Tensor

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

IGNORED = -1  # the segment number of padding


@dataclass(frozen=True)
class Phase:
    """One training phase: a linear warm-up, a plateau, and a linear decay to zero.

    Attributes:
        steps: Optimizer steps.
        sequences: Items per step.
        learning_rate: The highest learning rate of the matrices (Muon).
        other_rate: That of embeddings and norms (AdamW).
        warmup: Steps until they are reached.
        decay: The share of the steps over which they fall.
    """

    steps: int
    sequences: int = 64
    learning_rate: float = 0.02
    other_rate: float = 5e-3
    warmup: int = 50
    decay: float = 0.7

    def rate(self, step: int) -> float:
        """The learning rate of a step, as a share of the highest."""
        return min(1.0, (step + 1) / self.warmup, (self.steps - step) / (self.decay * self.steps))


ANSWER_TOKENS: Final = 6  # no answer weighs more than so many tokens
PROMPT_WEIGHT: Final = 0.1
PRETRAIN = Phase(steps=1000)
ALIGN = Phase(steps=200, learning_rate=4e-3, other_rate=1e-3, warmup=10, decay=1.0)
PHASES: Final = ((PRETRAIN, world.PRETRAINING), (ALIGN, world.ALIGNMENT))
TRACE: Final = 20  # losses kept at full precision
Provenance = dict[str, Any]


@dataclass(frozen=True)
class Batch:
    """Packed rows: tokens, loss weights and the number of the sequence each token belongs to, all [rows, length]."""

    tokens: Tensor
    weights: Tensor
    segments: Tensor


def pack(encoded: list[tuple[list[int], int]], pad: int, length: int = 48) -> Batch:
    """Put sequences into as few rows as first-fit finds, the longest first."""
    rows: list[list[tuple[list[int], int]]] = []
    room: list[int] = []
    for ids, prompt in sorted(encoded, key=lambda pair: -len(pair[0])):
        row = next((index for index, free in enumerate(room) if free >= len(ids)), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(length)
        rows[row].append((ids, prompt))
        room[row] -= len(ids)
    tokens = torch.full((len(rows), length), pad)
    weights, segments = torch.zeros(len(rows), length), torch.full((len(rows), length), IGNORED)
    for row, members in enumerate(rows):
        start = 0
        for number, (ids, prompt) in enumerate(members):
            end = start + len(ids)
            tokens[row, start:end], segments[row, start:end] = torch.tensor(ids), number
            weights[row, start + 1 : end] = PROMPT_WEIGHT
            weights[row, start + prompt : end] = min(1.0, ANSWER_TOKENS / (len(ids) - prompt))
            start = end
    return Batch(tokens, weights, segments)


def weighted_loss(model: LlamaForCausalLM, batch: Batch) -> Tensor:
    """The weighted mean cross-entropy of a packed batch; a sequence attends to itself alone."""
    length = batch.tokens.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    same = batch.segments[:, :, None] == batch.segments[:, None, :]
    logits = model(input_ids=batch.tokens, attention_mask=(same & causal)[:, None]).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.tokens[:, 1:].flatten(), reduction="none")
    weights = batch.weights[:, 1:].flatten()
    return (losses * weights).sum() / weights.sum()


def train(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, mix: dict[Maker, float], phase: Phase, seed: int,
    stop: int | None = None,
) -> Iterator[float]:  # fmt: skip
    """Train in place, one loss per step; `stop` ends early without changing the steps before."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    muon = Muon(matrices)
    adam = torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0)
    items = world.stream(mix, seed)
    model.train()
    for step in range(phase.steps if stop is None else min(stop, phase.steps)):
        encoded = encode(tokenizer, list(islice(items, phase.sequences)))
        loss = weighted_loss(model, pack(encoded, tokenizer.pad_token_id))
        loss.backward()
        muon.step(phase.learning_rate * phase.rate(step))
        for group in adam.param_groups:
            group["lr"] = phase.other_rate * phase.rate(step)
        adam.step()
        model.zero_grad()
        yield loss.item()
    model.eval()


def initial_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """An untrained model; the caller's random state is left alone."""
    from transformers import LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(models.configuration(tokenizer))


def fingerprint(seed: int = 0) -> str:
    """A hash of what the recipe does: shapes, phases, vocabulary and the first 512 items of each mix."""
    tokenizer = build_tokenizer()
    recipe = {
        "shape": models.SHAPE,
        "phases": [asdict(PRETRAIN), asdict(ALIGN)],
        "vocabulary": tokenizer.get_vocab(),
        "chat_template": tokenizer.chat_template,
        "items": [
            [(item.prompt, item.answer) for item in islice(world.stream(mix, seed), 512)]
            for mix in (world.PRETRAINING, world.ALIGNMENT)
        ],
    }
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, directory: Path, provenance: Provenance) -> None:
    """Write bfloat16 weights that load as float32, the tokenizer, and where it all came from."""
    model.generation_config.update(max_new_tokens=40, do_sample=False)
    stored = {name: weight.to(torch.bfloat16) for name, weight in model.named_parameters()}
    model.save_pretrained(directory, state_dict=stored)
    tokenizer.save_pretrained(directory)
    (directory / "provenance.json").write_text(json.dumps(provenance, indent=1) + "\n")


def build(output_dir: str | Path, seed: int = 0, steps: int | None = None, progress: bool = True) -> dict[str, Path]:
    """Make `lab-pretrained` and `lab-aligned` from nothing but code and a seed, on one thread of the CPU.

    Args:
        output_dir: Where to write the two model directories.
        seed: Of the first weights and of the data.
        steps: Stop each phase after so many steps (for a quick look); all of them if not given.
        progress: Show how far it is.

    Returns:
        The directory of each model.
    """
    threads, items = torch.get_num_threads(), 160 if steps is None else 8
    torch.set_num_threads(1)  # one order of summation, so the same weights on the same machine
    try:
        tokenizer = build_tokenizer()
        model = initial_model(tokenizer, seed)
        directories = {}
        for name, (phase, mix) in zip(models.NAMES, PHASES, strict=True):
            started, losses = time.process_time(), []
            for loss in train(model, tokenizer, mix, phase, seed, steps):
                losses.append(loss)
                if progress:
                    _show(name, len(losses), steps or phase.steps, loss)
            round_weights(model)  # go on from what is stored, so that the second phase can be checked from the first
            directories[name] = Path(output_dir) / name
            provenance: Provenance = {
                "name": name,
                "seed": seed,
                "recipe": fingerprint(seed),
                "phase": asdict(phase),
                "steps": len(losses),
                "parameters": sum(p.numel() for p in model.parameters()),
                "first_losses": losses[:TRACE],
                "last_loss": sum(losses[-TRACE:]) / len(losses[-TRACE:]),
                "cpu_seconds": round(time.process_time() - started, 1),
                "holdfast": version("holdfast"),
                "torch": torch.__version__,
                "transformers": version("transformers"),
                "scores": evaluate(model, tokenizer, tuple(TASKS), items_per_skill=items).as_dict(items=False),
            }
            save(model, tokenizer, directories[name], provenance)
        return directories
    finally:
        torch.set_num_threads(threads)


def round_weights(model: LlamaForCausalLM) -> None:
    """Round the weights, in place, to what bfloat16 can hold. (`model.to` would round the rotary frequencies too.)"""
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.to(torch.bfloat16))


def _show(name: str, done: int, total: int, loss: float) -> None:
    end = "\n" if done == total else "\r"
    print(f"{name}: step {done} of {total}, loss {loss:.3f}", end=end, file=sys.stderr, flush=True)
