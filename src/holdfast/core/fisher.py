"""Collects Fishers of the base model on retain data: ordinary backward passes, read by hooks on the layers.

A forward hook on the linear map of an adapted layer takes x, and a hook on its output takes δ, the gradient there of
the summed negative log-likelihood of an example's response. Activations alone are differentiated: no parameter gets a
gradient, flags stay as they are, dropout is off (and with it gradient checkpointing, which transformers runs in
training mode alone), and the random-number state is put back.

What is held: the graph of one pass (2,048 tokens, or one retain batch where that is larger), and for each layer two
`Moment`s, 4 MiB of float32 each up to widths of 1,024 and 2 · keep · width numbers above; layers that are called with
the very same tensor (q, k and v) share one. kind="samples" holds rows · keep · (in + out) numbers a layer.
`functional/fisher.py` has the mathematics, `fisher_hooks.py` what the hooks read, `fisher_cache.py` what is remembered.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import accumulate
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from ..functional.head import Head
from ..functional.linear_divergence import linear_cross_entropy
from ..functional.packed_fishers import LayerFisher
from . import fisher_cache
from .distributed import rank, world_size
from .errors import NotYetSupported, WrongSetup
from .fisher_hooks import Layer, Moments, Reader, Samples, Tokens
from .gradients import chosen, is_preference
from .layers import DenseUpdate, LowRankUpdate
from .packing import passes
from .retain import Retain
from .selection import adapters_off, linear_map
from .tap import Tap, evaluation
from .types import Batch, FisherSpec, Supervision

T = TypeVar("T")
Updates = Sequence[LowRankUpdate | DenseUpdate]
Pass = tuple[int, Batch]  # number of its first row in the set, rows
DRAWN_AT_ONCE = 128  # tokens whose probabilities exist at a time while labels are drawn


class Progress(Protocol):
    """Wraps what takes long, to show how far it is."""

    def __call__(self, iterable: Iterable[T], description: str, /) -> Iterable[T]:
        """Return the iterable, or one that shows a bar while it is gone through."""


def unseen(iterable: Iterable[T], description: str) -> Iterable[T]:
    """Show nothing."""
    return iterable


class Fishers:
    """Collects the Fishers of one model, each once.

    Args:
        model: the bare model.
        tap: the model's; None where no method uses retain data.
        retain: the session's.
        seed: of labels that are drawn.
        progress: shows how far a collection is.
    """

    def __init__(self, model: nn.Module, tap: Tap | None, retain: Retain, seed: int, progress: Progress) -> None:
        self.model, self.tap, self.retain, self.seed, self.progress = model, tap, retain, seed, progress
        self._known: dict[tuple[str, FisherSpec, tuple[str, ...], int], dict[str, LayerFisher]] = {}
        self._weights: dict[int, str] = {}  # a hash of the base weights, by the step at which they were so

    def __call__(
        self, updates: Updates, names: Sequence[str], spec: FisherSpec, step: int
    ) -> dict[str, dict[str, LayerFisher]]:
        """Return the normalised Fisher of each layer of the updates, for each named retain set; see `Setup.fishers`.

        Adapters are off; a layer that is trained itself is as it stands, which is its start when `init` asks.

        Raises:
            WrongSetup: if a set is not there, or an adapter is merged into the base weights.
            NotYetSupported: if a layer is no linear map, or does not run on the tokens of the batch.
        """
        sets = self.retain.sets
        if self.tap is None or not sets:
            raise WrongSetup("A Fisher needs retain data: pass retain=... (batches, or rows in a TRL format).")
        if lost := [name for name in names if name not in sets]:
            raise WrongSetup(f"There is no retain set {lost[0]!r}: the sets are {', '.join(map(repr, sets))}.")
        layers = _layers(self.model, updates)
        now = step if any(isinstance(update, DenseUpdate) for update in updates) else 0
        self._known = {key: fisher for key, fisher in self._known.items() if key[-1] in (0, now)}
        found: dict[str, dict[str, LayerFisher]] = {}
        for name in names or sets:
            key = name, spec, tuple(layers), now
            if key not in self._known:
                self._weights = {now: self._weights.get(now) or fisher_cache.weights(self.model)}
                self._known[key] = self._load_or_collect(self.tap, name, layers, spec, self._weights[now])
            found[name] = self._known[key]
        return found

    def _load_or_collect(
        self, tap: Tap, name: str, layers: Mapping[str, Layer], spec: FisherSpec, weights: str
    ) -> dict[str, LayerFisher]:
        work = _passes(self.retain.sets[name], spec.rows)
        path = fisher_cache.path(weights, [batch for _, batch in work], spec, list(layers), self.seed)
        fisher = fisher_cache.read(path, next(self.model.parameters()).device)
        if fisher is None:
            fisher = self._collect(tap, work, layers, spec, f"Fisher of {name}")
            fisher_cache.write(path, fisher)
        return fisher

    def _collect(
        self, tap: Tap, work: Sequence[Pass], layers: Mapping[str, Layer], spec: FisherSpec, description: str
    ) -> dict[str, LayerFisher]:
        device = next(self.model.parameters()).device
        rows = work[-1][0] + len(work[-1][1]["input_ids"])
        reader = Samples(layers, spec.keep, rows) if spec.kind == "samples" else Moments(layers, spec)
        with ExitStack() as held:
            held.enter_context(torch.random.fork_rng(devices=[device] if device.type == "cuda" else []))
            held.enter_context(evaluation(self.model))
            held.enter_context(adapters_off(self.model))
            held.enter_context(torch.enable_grad())
            held.enter_context(torch.autocast(device.type, enabled=False))
            source = held.enter_context(_differentiable_embeddings(tap))
            held.enter_context(reader.watching())
            for first, batch in self.progress(work[rank() :: world_size()], description):
                loss = self._loss(tap, reader, first, batch, spec)
                if not source:
                    raise NotYetSupported(
                        f"{type(tap.language_model).__name__} does not run its input embeddings, and Fishers are "
                        "collected from there on."
                    )
                torch.autograd.grad(loss, source, allow_unused=True)
                source.clear()
        return reader.fisher()

    def _loss(self, tap: Tap, reader: Reader, first: int, batch: Batch, spec: FisherSpec) -> Tensor:
        """Return the negative log-likelihood of the responses, summed: δ of a token is then its own example's."""
        supervision, head = Supervision.of(batch), _frozen(tap.head(original=True))
        mask, targets = supervision.completion, supervision.targets[supervision.completion]
        reader.begin(Tokens.of(_real(batch), first))
        hidden = tap.run((), tap.inputs(batch)).hidden[:, :-1][mask]
        if spec.labels == "model":
            targets = _drawn(hidden.detach(), head, mask.sum(1).tolist(), self.seed, first)
        module = tap.head_module()
        module = getattr(module, "original_module", module)
        if not any(layer.module is module for layer in reader.layers.values()):
            return linear_cross_entropy(hidden, head, targets)
        owners = mask.nonzero()[:, 0] + first
        reader.begin(Tokens((len(owners),), owners))
        logits = module(hidden) * head.scale
        if head.soft_cap is not None:
            logits = head.soft_cap * torch.tanh(logits / head.soft_cap)
        wide = torch.promote_types(logits.dtype, torch.float32)
        return nn.functional.cross_entropy(logits.to(wide), targets, reduction="sum")


# --- which layers, which rows --------------------------------------------------------------------------------------


def _layers(model: nn.Module, updates: Updates) -> dict[str, Layer]:
    layers: dict[str, Layer] = {}
    for update in updates:
        with adapters_off(model):  # PEFT's wrapper of a trained copy then shows the original's parts
            outer = model.get_submodule(update.layer)
        module = linear_map(getattr(outer, "original_module", outer))
        if isinstance(update, LowRankUpdate):
            if update.variant in ("target_parameters", type(module).__name__.lower()):
                raise NotYetSupported(
                    f"{update.name} adapts a {type(module).__name__}, and Fishers are known for linear layers alone. "
                    "Leave it out of target_modules, or out of the method's `select`."
                )
            if getattr(outer, "merged", False):
                raise WrongSetup(f"The adapter of {update.layer} is merged: call model.unmerge_adapter() first.")
            layers[update.layer] = Layer(module, (update.b.shape[0], update.a.shape[1]), update.b)
        else:
            out, into = update.weight.shape[::-1] if update.transposed else update.weight.shape
            layers[update.layer] = Layer(module, (out, into), update.weight)
    return layers


def _passes(batches: Sequence[Batch], most: int) -> list[Pass]:
    """Return the first rows of a set, at most so many, in passes that depend on nothing else."""
    taken: list[Batch] = []
    for batch in batches:
        rows = chosen(batch) if is_preference(batch) else batch
        taken.append({key: value[:most] for key, value in rows.items()})
        most -= len(taken[-1]["input_ids"])
        if most <= 0:
            break
    packed = [batch for _, batch in passes([(0, batch) for batch in taken])]
    ends = accumulate(len(batch["input_ids"]) for batch in packed)
    return [(end - len(batch["input_ids"]), batch) for end, batch in zip(ends, packed, strict=True)]


def _real(batch: Batch) -> Tensor:
    """Return which tokens are no padding, bool [B, T]."""
    mask = batch.get("attention_mask")
    return mask.bool() if mask is not None and mask.dim() == 2 else torch.ones_like(batch["input_ids"]).bool()


# --- the forward pass ----------------------------------------------------------------------------------------------


@contextmanager
def _differentiable_embeddings(tap: Tap) -> Iterator[list[Tensor]]:
    """Let the graph begin at the embeddings, also where every weight is frozen; yields what to differentiate by."""
    embeddings: nn.Module = tap.language_model.get_input_embeddings()  # type: ignore[operator]
    source: list[Tensor] = []

    def cut(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        source.append(output.detach().requires_grad_())
        return source[-1]

    hook = embeddings.register_forward_hook(cut)
    try:
        yield source
    finally:
        hook.remove()


def _frozen(head: Head) -> Head:
    return replace(head, weight=head.weight.detach(), bias=None if head.bias is None else head.bias.detach())


@torch.no_grad()
def _drawn(hidden: Tensor, head: Head, tokens: Sequence[int], seed: int, first: int) -> Tensor:
    """Draw a label for each hidden state [N, H]: by the row's own generator, so that no split changes them.

    Args:
        hidden: states of all rows, one after another.
        head: makes their logits.
        tokens: how many belong to each row.
        seed: of the session.
        first: number of the first row in its set.
    """
    generators = (torch.Generator().manual_seed(1_000_003 * seed + first + row) for row in range(len(tokens)))
    draws = [torch.rand(n, generator=g, dtype=torch.float64) for n, g in zip(tokens, generators, strict=True)]
    labels = []
    chunks = (torch.split(rows, DRAWN_AT_ONCE) for rows in (hidden, torch.cat(draws)))
    for states, u in zip(*chunks, strict=True):
        sums = head.logits(states).double().softmax(-1).cumsum(-1)
        labels.append(torch.searchsorted(sums, u.to(sums)[:, None] * sums[:, -1:])[:, 0])
    return torch.cat(labels)
