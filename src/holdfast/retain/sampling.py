"""Sampling from the base in batches: the host's model with its adapters off, at a temperature, the same for a seed.

    token ~ softmax(z / temperature)          no top-k, no top-p, no penalty: the base's own distribution

The model's own generation_config must not leak in (it may sample from a nucleus, and penalise), and the caller's random
numbers go on as if nothing had been sampled. Another server samples through one function, `Sampler`. Read next:
`making`, which says what to sample from.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..core.selection import CHANGES_BASE, MOVES_BASE_INTO_ADAPTER, adapters_off, unwrap
from ..core.tap import evaluation, language_model
from .kept import PoolError

__all__ = ["Sampler", "Writer", "ends_of", "until"]

Sampler = Callable[[list[list[int]], int], list[list[int]]]
"""A hook for vLLM or a server: prompts as token ids and the most tokens to write, to what was written for each, without
the prompt; it samples from the base, at the temperature that is wanted. What it writes is cut at the first end."""


def ends_of(model: nn.Module, tokenizer: Any) -> frozenset[int]:
    """Every token that ends an answer: the tokenizer's, and those that the model's own generation_config names."""
    own = getattr(getattr(language_model(model), "generation_config", None), "eos_token_id", None)
    found = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])}
    return frozenset(int(token) for token in found if token is not None)


def until(tokens: Sequence[int], stops: frozenset[int]) -> list[int]:
    """Tokens up to the first stop, which is kept.

    >>> until([5, 6, 2, 0, 0], frozenset({2}))
    [5, 6, 2]
    """
    stop = next((place for place, token in enumerate(tokens) if token in stops), len(tokens))
    return list(tokens[: stop + 1])


class Writer:
    """Writes on from contexts, as the base would.

    Args:
        model: a causal language model of transformers, or PEFT's around one.
        pad: the token to pad with.
        temperature: above 0.
        seed: the same gives the same on one machine, with the same batch size.
        batch_size: contexts at a time.
        sampler: samples instead of the model.

    Raises:
        PoolError: if the model is not the base when its adapters are off.
    """

    def __init__(
        self,
        model: nn.Module,
        pad: int,
        *,
        temperature: float = 1.0,
        seed: int = 0,
        batch_size: int = 64,
        sampler: Sampler | None = None,
    ) -> None:
        if moved := _moved(model):
            raise PoolError(
                f"Adapters that start as {moved} take their start out of the base weights, so the model without them "
                "is not the base, and what it samples is not what must be kept. Sample the pool before the adapter is "
                "put on (holdfast retain sample MODEL)."
            )
        self.model, self.pad, self.temperature, self.batch_size = model, pad, temperature, batch_size
        self.sampler, self._seed, self._batches = sampler, seed, 0

    def write(self, contexts: Sequence[Sequence[int]], max_tokens: int, stops: frozenset[int]) -> list[list[int]]:
        """Sample what follows each context, up to the first stop, which is kept, or to so many tokens.

        Raises:
            PoolError: if the hook returns anything else than a list of token ids for each context.
        """
        if self.sampler is not None:
            return [until(row, stops)[:max_tokens] for row in self._asked(self.sampler, contexts, max_tokens)]
        order = sorted(range(len(contexts)), key=lambda i: (len(contexts[i]), i))
        written: dict[int, list[int]] = {}
        with evaluation(self.model), adapters_off(self.model), _own_random_numbers(), torch.no_grad():
            for start in range(0, len(order), self.batch_size):
                places = order[start : start + self.batch_size]
                rows = self._batch([list(contexts[i]) for i in places], max_tokens, stops)
                written |= zip(places, (until(row, stops) for row in rows), strict=True)
        return [written[i] for i in range(len(contexts))]

    def _batch(self, contexts: list[list[int]], max_tokens: int, stops: frozenset[int]) -> list[list[int]]:
        model = language_model(self.model)
        longest = max(map(len, contexts))
        ids = torch.tensor([[self.pad] * (longest - len(row)) + row for row in contexts])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in contexts])
        device = next(model.parameters()).device
        torch.manual_seed(_mixed(self._seed, self._batches))
        self._batches += 1
        settings = {
            "max_new_tokens": max_tokens,
            "do_sample": True,
            "temperature": self.temperature,
            "top_k": 0,
            "top_p": 1.0,
            "num_beams": 1,
            "use_cache": True,
            "pad_token_id": self.pad,
            "eos_token_id": sorted(stops),
        }
        with _plain_sampling(model, settings):
            written = model.generate(input_ids=ids.to(device), attention_mask=mask.to(device))  # type: ignore[operator]
        return [list(row) for row in written[:, longest:].tolist()]

    def _asked(self, sampler: Sampler, contexts: Sequence[Sequence[int]], max_tokens: int) -> list[list[int]]:
        rows: object = sampler([list(row) for row in contexts], max_tokens) if contexts else []
        faults = []
        if not isinstance(rows, list) or len(rows) != len(contexts):
            size = len(rows) if isinstance(rows, list) else type(rows).__name__
            raise PoolError(f"The sampler must return a list with one row for each of {len(contexts)}, got {size}.")
        for i, row in enumerate(rows):
            if not isinstance(row, list) or not all(isinstance(token, int) for token in row):
                faults.append(f"row {i} must be a list of token ids, got {row!r:.60}")
        if faults:
            raise PoolError("The sampler returned what cannot be used:", faults)
        return rows


def _moved(model: nn.Module) -> str:
    """The starts of the model's adapters that change the base weights."""
    configs = [getattr(module, "peft_config", None) for module in unwrap(model).modules()]
    starts = [
        str(getattr(config, "init_lora_weights", "")).lower()
        for each in configs
        if isinstance(each, Mapping)
        for config in each.values()
    ]
    return ", ".join(sorted({start for start in starts if start.startswith(MOVES_BASE_INTO_ADAPTER + CHANGES_BASE)}))


def _mixed(seed: int, batch: int) -> int:
    """A seed of its own for every batch."""
    return int.from_bytes(hashlib.sha256(f"{seed} {batch}".encode()).digest()[:7], "big")


@contextmanager
def _own_random_numbers() -> Iterator[None]:
    """Torch's random numbers on every device, put back afterwards: seeding reaches all of them."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        yield


@contextmanager
def _plain_sampling(model: nn.Module, settings: Mapping[str, object]) -> Iterator[None]:
    """The model with a generation_config of these settings alone: `generate` would fill in its own even so."""
    from transformers import GenerationConfig

    before = model.generation_config
    try:
        model.generation_config = GenerationConfig(**settings)
        yield
    finally:
        model.generation_config = before
