"""Keeps what the KL needs of the base on a fixed pool, so that training on it runs no base at all.

    KL(base ‖ student) = c0 − s h·e0 + logsumexp(z):    (e0, c0) and the token, 4 H + 12 bytes a position in float32

That is exact for the forward KL under one frozen, uncapped head (`functional.cached_divergence`). Where the head is
capped or trained, or another divergence is asked for, the base's last hidden states are kept instead, as the model
makes them: the head's product is taken anew, one product more, still with no base forward. Which of the two is chosen
here and told through `say`. Logits of the k likeliest tokens with a rest bucket are not kept: they take less room
(384 bytes a position for k = 64) but are not exact, and nothing here needs them yet.

A file is named by a hash of all that it depends on, in $HOLDFAST_CACHE or ~/.cache/holdfast: the base's weights and
configuration, the adapters that act in it, its head, the tokens, what is kept in which dtype, the precision it ran in.
Sequences stand for themselves, without padding, so neither batch size nor padding makes a cache stale. In a loop
without a session:

    cache = ReferenceCache.of(tap, reference, batches)          # made, or found; enter the host's autocast first
    base = CachedReference(cache, reference.head(tap))          # `cached_reference`
    numbers = cache.find(batch)                                 # a right-padded batch, such as `core.stream.padded`
    total, tokens = base.kl(hidden, tap.head(), numbers, mask)   # mask [B, T-1], as Supervision.mask
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ..core import fisher_cache
from ..core.distributed import barrier, is_sharded, rank
from ..core.errors import NotYetSupported, WrongSetup
from ..core.kept_task import CachedRows
from ..core.reference import Reference
from ..core.retain import sequences_of
from ..core.tap import Tap
from ..core.types import Batch
from ..functional.cached_divergence import STORABLE
from ..functional.divergence import Divergence
from . import cache_facts
from .cache_file import Facts, Stored
from .cache_making import Plan, write

__all__ = ["ReferenceCache", "Store"]

Store = Literal["auto", "statistics", "hidden"]
Say = Callable[[str], None]


class ReferenceCache:
    """What is kept of the base on the sequences of a pool, read from its file as it is asked for.

    Args:
        file: of a cache.
        expected: facts that it must have, as `facts` names them; those not given may be anything.

    Attributes:
        facts: what the cache depends on.

    Raises:
        WrongSetup: if it cannot be read, or belongs to another base, pool or setting; the message says what differs.
    """

    def __init__(self, file: Path, expected: Facts | None = None) -> None:
        self.file = file
        self._stored = Stored(file, {"format": cache_facts.FORMAT, **(expected or {})})
        self.facts = self._stored.facts
        self._ids, starts = self._stored.whole("ids").long(), self._stored.whole("starts").tolist()
        self._starts: list[int] = starts
        self._names = ["values"]
        if self.divergence_mask is not None:
            self._names += ["constants"] + ["weights"] * ("weight" in self.facts)
        self._numbers = {_key(self._ids[a:b]): number for number, (a, b) in enumerate(self._spans())}

    @classmethod
    def of(
        cls,
        tap: Tap,
        reference: Reference,
        batches: Sequence[Batch],
        *,
        divergence: Divergence | None = None,
        store: Store = "auto",
        dtype: torch.dtype = torch.float32,
        folder: Path | None = None,
        batch_size: int = 8,
        say: Say = logging.getLogger(__name__).info,
    ) -> ReferenceCache:
        """Return the cache of these batches, made now unless it is there; a collective call.

        Args:
            tap: on the student's model.
            reference: the frozen base.
            batches: the pool, with `input_ids` and `attention_mask`; padding and packing do not matter.
            divergence: what will be computed. Default: the full KL.
            store: what to keep; "auto" (default) keeps statistics where they are exact, else hidden states.
            dtype: of statistics, float32 (default; error of the gradient about 2e-6 / √KL) or float16 (2e-4 / √KL).
                Hidden states stay as the model makes them.
            folder: where the file is kept. Default: $HOLDFAST_CACHE, or ~/.cache/holdfast.
            batch_size: sequences that the base runs on at a time.
            say: hears what is kept and why, and how large it is.

        Raises:
            NotYetSupported: for statistics that would not be exact, for weights sharded by FSDP2, and for sequences so
                long that RoPE changes with the longest of a batch.
            WrongSetup: for a dtype that loses the KL, a pool without tokens, or a folder without room.
        """
        divergence = divergence or Divergence(mask="none")
        if any(is_sharded(parameter) for parameter in tap.model.parameters()):
            raise NotYetSupported(
                "The weights are sharded (FSDP2), so no process can say which base this is. Make the cache before "
                "fully_shard(model), and open it by its file: ReferenceCache(file)."
            )
        if dtype not in STORABLE:
            raise WrongSetup(f"A reference cache in {dtype} loses the gradient of a small KL: use float32 or float16.")
        sequences = [ids.cpu() for batch in batches for ids in sequences_of(batch)]
        if not sequences:
            raise WrongSetup("The pool has no sequence of two tokens or more, so there is nothing to keep.")
        if cache_facts.lengths_of(tap, reference).vary(longest := max(map(len, sequences))):
            raise NotYetSupported(
                f"The base's RoPE changes with the longest sequence of a batch, and these are of up to {longest:,} "
                "tokens, so what it says of one depends on those beside it. Keep shorter ones, or run it in every step."
            )
        reasons = cache_facts.inexact(tap.head(), reference.head(tap), divergence)
        if store == "statistics" and reasons:
            raise NotYetSupported(
                f"Statistics do not give this divergence: {'; '.join(reasons)}. With store='auto' or 'hidden' the "
                "base's hidden states are kept instead: no base forward either, one product more."
            )
        hidden = store == "hidden" or bool(reasons)
        plan = Plan(tap, reference, sequences, None if hidden else divergence, dtype)
        file = (folder or fisher_cache.folder()) / f"reference-{cache_facts.key(plan.facts)}.safetensors"
        why = ("; ".join(reasons) or "as asked for") if hidden else "one frozen head without a soft cap"
        try:
            if rank() == 0:
                found = file.is_file()
                if not found:
                    write(file, plan, batch_size)
                say(f"reference cache: {plan.describe()} ({why}); {'found' if found else 'made'}: {file}")
        finally:
            barrier()  # where the main process failed the others go on, find no file, and say so
        return cls(file, plan.facts)

    def __len__(self) -> int:
        return len(self._starts) - 1

    @property
    def divergence_mask(self) -> str | None:
        """Which KL the statistics give, "none" or "target"; None where hidden states are kept, which give any."""
        return None if self.facts["kept"] == "hidden" else str(self.facts["mask"])

    def find(self, batch: Batch) -> list[int]:
        """Return the numbers of a batch's rows, by their tokens.

        Args:
            batch: `input_ids` and `attention_mask`, padded on the right.

        Raises:
            WrongSetup: if a row is not in the cache, or is padded on the left; all such rows are named.
        """
        ids = batch["input_ids"].cpu()
        real = batch["attention_mask"].bool().cpu() if "attention_mask" in batch else torch.ones_like(ids).bool()
        numbers = [self._numbers.get(_key(row[kept]), -1) for row, kept in zip(ids, real, strict=True)]
        left = (~real[:, :-1] & real[:, 1:]).any(1).tolist()
        lost = [row for row, (number, moved) in enumerate(zip(numbers, left, strict=True)) if number < 0 or moved]
        if lost:
            raise WrongSetup(
                f"Rows {lost} of the batch are not in the reference cache {self.file} of {len(self)} sequences, or are "
                "padded on the left. Make the cache of the very pool that is drawn from, and pad on the right."
            )
        return numbers

    def rows(self, sequences: Sequence[int], mask: Tensor) -> CachedRows:
        """Read what is kept of the positions that `mask` names, in the order of `hidden[:, :-1][mask]`.

        Args:
            sequences: their numbers, one for each row of the mask.
            mask: bool, [B, T-1]: position t stands for what follows token t.

        Raises:
            WrongSetup: if the mask reaches beyond the end of a sequence, or is of another number of sequences.
        """
        places = [row.nonzero().squeeze(1) for row in mask.cpu()]
        spans = [(self._starts[number], self._starts[number + 1]) for number in sequences]
        faults = [
            f"row {i} has positions up to {int(place.max())}, its sequence (number {number}) {end - start - 1}"
            for i, (place, number, (start, end)) in enumerate(zip(places, sequences, spans, strict=False))
            if len(place) and place.max() >= end - start - 1
        ]
        if len(places) != len(spans) or faults:
            raise WrongSetup(
                f"The mask ({len(places)} rows) does not fit the {len(spans)} sequences: {'; '.join(faults)}. Pass the "
                "mask [B, T-1] of the same rows, padded on the right."
            )
        tensors: dict[str, list[Tensor]] = {name: [] for name in self._names}
        targets = []
        for number, (start, end), place in zip(sequences, spans, places, strict=True):
            at = start - number, end - number - 1  # a sequence of L tokens has L - 1 positions
            for name, found in tensors.items():
                found.append(self._stored.rows(name, *at)[place])
            targets.append(self._ids[start + 1 : end][place])
        kept = {name: torch.cat(found).to(mask.device) for name, found in tensors.items()}
        return CachedRows(
            kept["values"], kept.get("constants"), torch.cat(targets).to(mask.device), kept.get("weights")
        )

    def states(self, number: int) -> Tensor:
        """Read the hidden states of one sequence, one fewer than it has tokens, [T-1, H]; see `store`."""
        return self._stored.rows("values", self._starts[number] - number, self._starts[number + 1] - number - 1)

    def _spans(self) -> Iterator[tuple[int, int]]:
        return zip(self._starts[:-1], self._starts[1:], strict=True)


def _key(ids: Tensor) -> bytes:
    return hashlib.sha256(ids.to(torch.int32).numpy().tobytes()).digest()
