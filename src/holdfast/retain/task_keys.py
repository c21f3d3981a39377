"""Tells the task's sequences apart by what the base's answer depends on, wherever in a batch they come.

    key = hash(tokens, positions, which next tokens are supervised, and what they are)

A row is known by its real tokens, so padding on the right, shuffling and the split of a step change nothing. Documents
packed into a row are known one by one where the model provably keeps them apart (`task_documents`), else by the whole
row. Where the longest row of a batch sets the frequencies of all (longrope), which ones it set is in the key as well.
What cannot be told by all that (images, embeddings, masks of an unknown shape, rows padded on the left, dynamic RoPE
beyond its length) is not kept: `sequences_in` says why. Read next: `task_cache`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.tap import Call
from .cache_facts import Lengths

__all__ = ["PASSED", "Pieces", "Sequences", "key_bytes", "pieces", "sequences_in"]

PASSED = ("input_ids", "attention_mask", "position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "seq_idx", "cache_position")
"""Tensors that a backbone may be called with: tokens, and what follows from tokens and positions."""
OF_LOSSES = ("num_items_in_batch", "labels", "shift_labels")
"""Tensors that hosts send through a backbone to a loss behind it: the base says the same whatever they are."""
BYTES = 16  # of a key: two of a billion sequences alike once in 10^20


class Sequences(NamedTuple):
    """What the base sees of a batch, in host memory."""

    ids: Tensor  # [B, T]
    lengths: list[int]  # real tokens of each row, which come first
    positions: Tensor  # [B, T]
    beyond: int = 0  # lengths that the longest row exceeds, at which the base's answer to every row is another one

    def starts(self, row: int) -> list[int]:
        """Return where the documents of a row begin.

        >>> Sequences(torch.zeros(1, 5), [5], torch.tensor([[0, 1, 0, 1, 2]])).starts(0)
        [0, 2]
        """
        real = self.positions[row, : self.lengths[row]]
        return sorted({0, *(real == 0).nonzero().flatten().tolist()})

    def packed_row(self) -> tuple[int, int, int] | None:
        """Return a row that holds several documents, and where the last longer one behind another begins and ends.

        Longer than a token, which alone says what it says behind another one like it.

        >>> Sequences(torch.zeros(1, 6), [6], torch.tensor([[0, 0, 0, 1, 2, 0]])).packed_row()
        (0, 2, 5)
        """
        for row, length in enumerate(self.lengths):
            behind = list(pairwise([*self.starts(row), length]))[1:]
            if behind:
                return row, *([span for span in behind if span[1] - span[0] > 1] or behind)[-1]
        return None


class Pieces(NamedTuple):
    """The sequences of a batch that have supervised tokens, in the order in which `hidden[:, :-1][mask]` has these."""

    keys: list[bytes]
    counts: list[int]  # supervised tokens of each

    def only(self, places: Sequence[int]) -> Pieces:
        """Return some of them."""
        return Pieces(*([column[i] for i in places] for column in self))  # type: ignore[arg-type]

    def rows_of(self, places: Sequence[int]) -> Tensor:
        """Return where the supervised tokens of some of them are among those of all."""
        ends = [0, *accumulate(self.counts)]
        return torch.cat([torch.arange(ends[i], ends[i + 1]) for i in places])


def sequences_in(call: Call, rows: int, lengths: Lengths = Lengths()) -> Sequences | str:
    """Return what the base sees in a forward of the student's, or why that cannot be told from tokens alone.

    Args:
        call: of the backbone.
        rows: of the batch.
        lengths: at which the base answers differently.
    """
    given = dict(call.kwargs)
    if call.args:
        given = {"input_ids": call.args[0], **given}
    known = PASSED + OF_LOSSES
    if unknown := [name for name, value in given.items() if isinstance(value, Tensor) and name not in known]:
        return f"the model is called with {unknown[0]}, on which the base's answer depends too"
    if len(call.args) > 1:
        return "the model's backbone is called with unnamed arguments"
    ids, real, positions = (given.get(name) for name in ("input_ids", "attention_mask", "position_ids"))
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point() or len(ids) != rows:
        return "the model's backbone is not called with token ids, row by row"
    if real is not None and (not isinstance(real, Tensor) or real.shape != ids.shape):
        return "the attention mask is not one of padding"
    if positions is not None and (not isinstance(positions, Tensor) or positions.dim() != 2):
        return "position ids have an axis too many"
    return _on_host(ids, real, positions, lengths)


def _on_host(ids: Tensor, real: Tensor | None, positions: Tensor | None, lengths: Lengths) -> Sequences | str:
    ids = ids.detach().cpu().long()
    columns = torch.arange(ids.shape[1]).expand_as(ids)
    kept = torch.ones_like(ids, dtype=torch.bool) if real is None else real.cpu().bool()
    at = columns if positions is None else positions.cpu().long().expand_as(ids)
    if (~kept[:, :-1] & kept[:, 1:]).any():
        return "rows are padded on the left: pad them on the right"
    longest = int(at.max()) + 1  # padding has positions too, and the model looks at all of them
    if lengths.grown(longest):
        return f"its longest row reaches {lengths.grows} positions, where dynamic RoPE begins to change its frequencies"
    return Sequences(ids, kept.sum(1).tolist(), at, lengths.beyond(longest))


def pieces(seen: Sequences, mask: Tensor, targets: Tensor, *, apart: bool) -> Pieces | str:
    """Return the sequences of a batch that have supervised tokens, or why they cannot be told apart.

    Args:
        seen: what the base sees.
        mask: bool, [B, T-1]: which next tokens are supervised.
        targets: next tokens, [B, T-1].
        apart: whether each document of a packed row is known by itself.
    """
    found, mask, targets = Pieces([], []), mask.cpu(), targets.cpu()
    stretched = f" beyond {seen.beyond}" if seen.beyond else ""
    for row, length in enumerate(seen.lengths):
        if mask[row, length:].any():
            return "tokens that follow padding are supervised"
        starts = seen.starts(row)
        whole = not apart and len(starts) > 1
        for start, end in pairwise([*([0] if whole else starts), length]):
            here = mask[row, start:end]
            if not (count := int(here.sum())):
                continue
            known = (seen.ids[row, start:end], seen.positions[row, start:end])
            asked = (here.nonzero(), targets[row, start:end][here])
            found.keys.append(_hash(("row" if whole else "document") + stretched, *known, *asked))
            found.counts.append(count)
    return found


def key_bytes(keys: Tensor) -> Iterator[bytes]:
    """Yield keys that were stored as a tensor of bytes, [S, 16]."""
    whole = keys.contiguous().numpy().tobytes()
    return (whole[at : at + BYTES] for at in range(0, len(whole), BYTES))


def _hash(kind: str, *tensors: Tensor) -> bytes:
    whole = hashlib.blake2b(kind.encode(), digest_size=BYTES)
    for tensor in tensors:
        whole.update(len(tensor).to_bytes(8, "little"))
        whole.update(tensor.long().contiguous().numpy().tobytes())
    return whole.digest()
