"""The divergence from a base that is not there: its cache in place of its forward.

    with statistics   Σ_t c0 − s h·e0 + logsumexp(z)         two products with the head, as a cross-entropy
    with hidden states  Σ_t D(softmax(W0 h0), softmax(W h))  three, as `linear_divergence` with the base at hand

Both read only the sequences that are asked for. `keep` is what a host hands to its session: the retain stream calls it
before the first step and then reads `total`, or `hidden` where several divergences are asked for. Read `cache` first.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..core.distributed import is_sharded, rank
from ..core.errors import NotYetSupported, WrongSetup
from ..core.reference import Reference
from ..core.tap import Tap
from ..functional.divergence import Divergence
from ..functional.head import Head
from .cache import ReferenceCache
from .cache_facts import inexact, lengths_of, of_head, weight
from .cached_rows import BaseHead, divergence_from

__all__ = ["CachedReference", "TokenSum", "keep"]

LARGEST = 4 * 2**30
"""Bytes of a cache that is made unasked; a larger one costs more reading and disk than a base forward is worth."""
log = logging.getLogger(__name__)


def keep(
    tap: Tap, reference: Reference, sequences: Sequence[Tensor], divergence: Divergence | None
) -> CachedReference | None:
    """Return what is kept of the base on the sequences of a session's retain stream; `core.reference.Keep`.

    Args:
        tap: on the student's model; enter the host's autocast first.
        reference: the frozen base.
        sequences: token ids; their places are their numbers.
        divergence: the only one that will be asked for; None: any may be, so hidden states are kept.

    Returns:
        None where the file would be too large, or the base would say something else of a sequence beside others than
        these: then it runs in every step, and the log says so.

    Raises:
        WrongSetup: if the file cannot be written.
    """
    head = reference.head(tap)
    dtype = torch.float64 if head.weight.dtype == torch.float64 else torch.float32
    if lengths_of(tap, reference).vary(longest := max(map(len, sequences))):
        if rank() == 0:
            log.warning(
                f"The base runs on the retain sequences in every step: its RoPE changes with the longest sequence of a "
                f"batch, and they are of up to {longest:,} tokens. Shorter ones can be kept."
            )
        return None
    needed = sum(len(ids) - 1 for ids in sequences) * head.weight.shape[1] * dtype.itemsize
    if needed > LARGEST:
        if rank() == 0:
            log.warning(
                f"The base runs on the retain sequences in every step: to keep what it says of all "
                f"{len(sequences):,} would take {needed / 1e9:.1f} GB. A smaller pool is cheaper."
            )
        return None
    try:
        cache = ReferenceCache.of(
            tap, reference, [{"input_ids": ids[None]} for ids in sequences], divergence=divergence,
            store="auto" if divergence is not None else "hidden", dtype=dtype,
        )  # fmt: skip
    except OSError as error:
        raise WrongSetup(
            f"What the base says of the retain sequences cannot be kept ({error}). Set HOLDFAST_CACHE to a folder that "
            "can be written to, or run the base in every step: cache=False."
        ) from error
    return CachedReference(cache, head, divergence)


class TokenSum(NamedTuple):
    """A sum over tokens, which carries the gradient, and their number: what a session divides and counts."""

    total: Tensor
    tokens: int


class CachedReference:
    """The frozen base of a pool, by its cache.

    Args:
        cache: of the pool.
        head: the base's, `reference.head(tap)`: frozen, and the one that the cache was made with.
        divergence: what `kl` computes. Default: the full KL.

    Raises:
        NotYetSupported: if the cache keeps statistics, and they do not give this divergence.
        WrongSetup: if they are those of the other KL, or the cache was made with another head.
    """

    def __init__(
        self,
        cache: ReferenceCache,
        head: Head,
        divergence: Divergence | None = None,
    ) -> None:
        self.cache = cache
        self.divergence = divergence or Divergence(mask="none")
        self._head = BaseHead(head)
        if not is_sharded(head.weight) and of_head(head) != cache.facts["head"]:
            raise WrongSetup(
                f"{cache.file} was made with another head than this one, so its KL would be to another base. Pass "
                "reference.head(tap) of the base that the cache is of, or make the cache anew: ReferenceCache.of(...)."
            )
        if cache.divergence_mask is None:
            return
        if reasons := inexact(head, head, self.divergence):
            raise NotYetSupported(
                f"{cache.file} keeps statistics, which do not give this divergence: {'; '.join(reasons)}. Keep hidden "
                "states: ReferenceCache.of(..., store='hidden')."
            )
        if cache.divergence_mask != self.divergence.mask:
            raise WrongSetup(
                f"{cache.file} keeps the statistics of the KL with mask={cache.divergence_mask!r}, and "
                f"mask={self.divergence.mask!r} is asked for. Make another: ReferenceCache.of(..., divergence=...)."
            )
        if (there := cache.facts.get("weight")) != (here := weight(self.divergence).get("weight")):
            raise WrongSetup(
                f"{cache.file} keeps statistics with the weights {there}, and {here} is asked for. Make another: "
                "ReferenceCache.of(..., divergence=...)."
            )

    @property
    def whole(self) -> bool:
        """Whether hidden states are kept, which give any divergence."""
        return self.cache.divergence_mask is None

    def describe(self) -> str:
        """Say what is kept, and where."""
        kept = "hidden states" if self.whole else "exact statistics of the KL"
        return f"{kept} at {self.cache.facts['positions']:,} positions in {self.cache.file}"

    def hidden(self, numbers: Sequence[int], device: torch.device) -> Tensor:
        """Return the base's hidden states of these sequences, padded on the right with zeros, [B, T, H].

        Nothing follows the last token of a sequence, so there they are zero too.
        """
        states = [self.cache.states(number) for number in numbers]
        padded = pad_sequence(states, batch_first=True)
        return torch.nn.functional.pad(padded, (0, 0, 0, 1)).to(device)

    def total(self, hidden: Tensor, head: Head, numbers: Sequence[int], mask: Tensor, chunk_rows: int | None) -> Tensor:
        """Return the divergence of a student from the base, summed over the positions of `mask`; see `kl`."""
        return self.kl(hidden, head, numbers, mask, chunk_rows).total

    def kl(
        self, hidden: Tensor, head: Head, sequences: Sequence[int], mask: Tensor, chunk_rows: int | None = None
    ) -> TokenSum:
        """Return the divergence of the student from the base, summed over the positions of `mask`.

        Args:
            hidden: the student's last hidden states, [B, T, H], of rows padded on the right.
            head: the student's.
            sequences: numbers of the rows in the cache (`ReferenceCache.find`).
            mask: bool, [B, T-1]: which next tokens count.
            chunk_rows: rows of logits that exist at once, as in `linear_divergence`.

        Raises:
            NotYetSupported: if the cache keeps statistics, and the student's head is trained or is not the base's.
            WrongSetup: if the mask does not fit the sequences.
        """
        own, kept = hidden[:, :-1][mask], self.cache.rows(sequences, mask)
        total = divergence_from(own, head, kept, self._head, self.divergence, of=self.cache.file, chunk_rows=chunk_rows)
        return TokenSum(total, len(own))
