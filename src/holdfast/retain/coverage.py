"""What a pool covers: counts, lengths, diversity, how likely it is under the base, and whether it touches given texts.

    distinct-n = different n-grams / all n-grams           perplexity = exp(mean −log p(token | before))
    touch(probe) = max over sequences  |G(probe) ∩ G(sequence)| / |G(probe)|         G: token 3-grams

(distinct-n: Li et al., 2016.) A touch of 1 says that one sequence holds all of the probe's wording; a low one says that
the wording is not there, not that the skill is not kept (docs/pool.md). Read next: `pool`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from ..core.selection import adapters_off
from ..core.tap import evaluation, language_model
from .drops import grams
from .kept import KINDS, Kept, PoolError
from .pool import Pool

__all__ = ["Coverage", "Part", "Touch", "coverage", "log_likelihoods"]


@dataclass(frozen=True)
class Part:
    """What is known of the sequences of one kind.

    Attributes:
        kind: one of `KINDS`, or `all`.
        count: of sequences.
        share: of the pool.
        sources: how many sequences came from each source.
        mean_tokens: of a sequence.
        distinct: distinct-1, -2 and -3 over tokens.
        perplexity: under the base; None where no model was given.
        examples: texts, the first ones of the kind.
    """

    kind: str
    count: int
    share: float
    sources: dict[str, int]
    mean_tokens: float
    distinct: tuple[float, float, float]
    perplexity: float | None
    examples: tuple[str, ...]


@dataclass(frozen=True)
class Touch:
    """How much of a probe's wording one sequence holds.

    Attributes:
        probe: the text that was looked for.
        overlap: of its token 3-grams, the share that the best sequence has; of all sequences together, `anywhere`.
        anywhere: see `overlap`.
        id: of the best sequence; empty where none shares anything.
        text: of the best sequence.
    """

    probe: str
    overlap: float
    anywhere: float
    id: str
    text: str


@dataclass(frozen=True)
class Coverage:
    """What a pool covers, by kind and in all, and what it touches."""

    parts: tuple[Part, ...]
    touches: tuple[Touch, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)


def coverage(
    pool: Pool,
    *,
    probes: Sequence[str] = (),
    tokenizer: Any = None,
    model: nn.Module | None = None,
    examples: int = 2,
    batch_size: int = 16,
) -> Coverage:
    """Say what a pool covers.

    Args:
        pool: not empty.
        probes: texts to look for.
        tokenizer: the pool's; needed for probes.
        model: the base, for perplexities; its adapters are switched off.
        examples: texts of each kind to show.
        batch_size: sequences that the model sees at a time.

    Raises:
        PoolError: if the pool is empty, or does not belong to the tokenizer or the model, or a probe has no tokens.
    """
    faults = [] if len(pool) else ["the pool is empty"]
    if probes and tokenizer is None:
        faults.append("probes need the pool's tokenizer: pass tokenizer=")
    if faults:
        raise PoolError("There is no coverage to tell:", faults)
    pool.check(tokenizer=tokenizer, base=model)
    likely = log_likelihoods(pool, model, batch_size) if model is not None else None
    whole = [_part("all", list(pool), likely, len(pool), 0)]
    kinds = [kind for kind in KINDS if kind in pool.counts]
    each = [_part(kind, [k for k in pool if k.kind == kind], likely, len(pool), examples) for kind in kinds]
    return Coverage((*each, *whole), _touches(pool, probes, tokenizer))


def log_likelihoods(pool: Pool, model: nn.Module, batch_size: int = 16) -> dict[str, float]:
    """The log-likelihood of each sequence under the base, given its first token, by id; in nats.

    Args:
        pool: the sequences.
        model: the base; its adapters are switched off.
        batch_size: sequences at a time.
    """
    ordered = Pool(tuple(sorted(pool, key=lambda kept: len(kept.input_ids))))
    device = next(model.parameters()).device
    found: list[float] = []
    with torch.no_grad(), evaluation(model), adapters_off(model):
        for batch in ordered.batches(0, batch_size, device):
            inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
            logits = language_model(model)(**inputs).logits[:, :-1].float()
            chosen = logits.gather(-1, batch["input_ids"][:, 1:, None])[..., 0] - logits.logsumexp(-1)
            found += chosen.mul(batch["attention_mask"][:, 1:]).sum(-1).tolist()
    return {kept.id: value for kept, value in zip(ordered, found, strict=True)}


def _part(kind: str, kept: Sequence[Kept], likely: dict[str, float] | None, total: int, examples: int) -> Part:
    tokens = sum(len(each.input_ids) for each in kept)
    perplexity = None
    if likely is not None:
        perplexity = math.exp(-sum(likely[each.id] for each in kept) / (tokens - len(kept)))
    return Part(
        kind,
        len(kept),
        len(kept) / total,
        dict(Counter(each.source for each in kept).most_common()),
        tokens / len(kept),
        (_distinct(kept, 1), _distinct(kept, 2), _distinct(kept, 3)),
        perplexity,
        tuple(each.text for each in kept[:examples]),
    )


def _distinct(kept: Sequence[Kept], n: int) -> float:
    every = [each.input_ids[i : i + n] for each in kept for i in range(len(each.input_ids) - n + 1)]
    return len(set(every)) / len(every) if every else 0.0


def _touches(pool: Pool, probes: Sequence[str], tokenizer: Any) -> tuple[Touch, ...]:
    wanted = [list(tokenizer(probe, add_special_tokens=False).input_ids) for probe in probes]
    if faults := [f"{probe!r:.60} has no tokens" for probe, ids in zip(probes, wanted, strict=True) if not ids]:
        raise PoolError("These probes cannot be looked for:", faults)
    found = []
    for probe, ids in zip(probes, wanted, strict=True):
        n = min(3, len(ids))
        looked_for, anywhere, best, where = grams(ids, n), set[tuple[int, ...]](), 0.0, None
        for kept in pool:
            shared = looked_for & grams(kept.input_ids, n)
            anywhere |= shared
            if len(shared) / len(looked_for) > best:
                best, where = len(shared) / len(looked_for), kept
        text = (where.id, where.text) if where is not None else ("", "")
        found.append(Touch(probe, best, len(anywhere) / len(looked_for), *text))
    return tuple(found)
