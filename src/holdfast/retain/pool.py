"""The pool: sequences on which the tuned model is to stay at the base, in files that a person can read and change.

    POOL/manifest.json                 of which base and tokenizer, how it was made, what was dropped
    POOL/sequences-<digest>.jsonl      one sequence a line: id, kind, source, text, input_ids, prompt_tokens

The manifest names the file of sequences and is renamed into place last, so a save that is killed leaves the old pool.
Whoever takes a line out of the file has taken it out of the pool. Read next: `making`, which samples one.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..core.digest import base_digest, tokenizer_digest
from ..core.types import IGNORED, Batch
from . import files
from .kept import KINDS, Kept, PoolError, id_of

__all__ = ["KINDS", "Kept", "Pool", "PoolError", "id_of"]


@dataclass(frozen=True)
class Pool:
    """Sequences in an order in which every stretch holds all kinds, and where they came from.

    Attributes:
        sequences: what is kept.
        manifest: base, tokenizer, settings, what was dropped; counts and digest are written anew by `save`.
    """

    sequences: tuple[Kept, ...]
    manifest: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.sequences)

    def __iter__(self) -> Iterator[Kept]:
        return iter(self.sequences)

    @property
    def digest(self) -> str:
        """A sha256 of every sequence in its order: what a cache of this pool belongs to."""
        told = [[kept.kind, kept.source, kept.input_ids, kept.prompt_tokens] for kept in self]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()

    @property
    def counts(self) -> dict[str, int]:
        """How many sequences there are of each kind, in the order of `KINDS`."""
        found = Counter(kept.kind for kept in self)
        return {kind: found[kind] for kind in KINDS if found[kind]}

    @property
    def edited(self) -> bool:
        """Whether the sequences are others than those that were saved with this manifest."""
        return str(self.manifest.get("digest", self.digest)) != self.digest

    def add(self, sequences: Iterable[Kept]) -> Pool:
        """A pool with these as well (`rows.sequences` makes them of a user's rows); what it has is counted, not added.

        >>> one = Kept(id_of([1, 2]), "own", "mine", "a b", (1, 2), 0)
        >>> twice = Pool(()).add([one, one])
        >>> len(twice), twice.manifest["dropped"]
        (1, {'own': {'duplicate': 1}})
        """
        new: dict[str, Kept] = {}
        there = {kept.id for kept in self}
        dropped = {kind: dict(why) for kind, why in self.manifest.get("dropped", {}).items()}
        for kept in sequences:
            if kept.id in there or kept.id in new:
                why = dropped.setdefault(kept.kind, {})
                why["duplicate"] = why.get("duplicate", 0) + 1
            else:
                new[kept.id] = kept
        return Pool(_mixed((*self.sequences, *new.values())), {**self.manifest, "dropped": dropped})

    def remove(self, ids: Collection[str]) -> Pool:
        """A pool without the sequences of these ids.

        Raises:
            PoolError: if one is not there.
        """
        there = {kept.id for kept in self}
        if missing := [id for id in ids if id not in there]:
            raise PoolError("The pool has no such sequences, so none was removed:", missing)
        return replace(self, sequences=tuple(kept for kept in self if kept.id not in ids))

    def filter(self, kinds: Collection[str]) -> Pool:
        """A pool of some kinds alone.

        Raises:
            PoolError: for a kind that the pool does not have.
        """
        if missing := [f"{kind!r} (there are: {', '.join(self.counts)})" for kind in kinds if kind not in self.counts]:
            raise PoolError("The pool has nothing of these kinds:", missing)
        return replace(self, sequences=tuple(kept for kept in self if kept.kind in kinds))

    def batches(self, pad: int, batch_size: int = 4, device: torch.device | str = "cpu") -> list[Batch]:
        """Batches padded on the right, in the order of the pool, as `core.retain.Retain` takes them.

        Args:
            pad: the token to pad with; it is neither attended to nor supervised.
            batch_size: sequences in a batch; the last may have fewer.
            device: where they go.

        Raises:
            PoolError: if the pool is empty or the batch size is not positive.
        """
        faults = [] if len(self) else ["the pool is empty; sample one, or add rows"]
        if batch_size < 1:
            faults.append(f"batch_size must be at least 1, got {batch_size}")
        if faults:
            raise PoolError("No batches can be made of the pool:", faults)
        made: list[Batch] = []
        for start in range(0, len(self), batch_size):
            rows = [kept.input_ids for kept in self.sequences[start : start + batch_size]]
            longest = max(map(len, rows))
            ids = torch.tensor([[*row, *[pad] * (longest - len(row))] for row in rows])
            mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
            batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, IGNORED)}
            made.append({name: tensor.to(device) for name, tensor in batch.items()})
        return made

    def check(self, *, tokenizer: Any = None, base: nn.Module | str | None = None) -> None:
        """Prove that the pool belongs to this tokenizer and base.

        Args:
            tokenizer: the one in use; None: not looked at.
            base: the model in use, or its `base_digest`; None: not looked at.

        Raises:
            PoolError: names all that differs.
        """
        of = self.manifest.get("tokenizer", {}), self.manifest.get("base", {})
        faults = []
        if tokenizer is not None:
            if of[0].get("sha256") != tokenizer_digest(tokenizer):
                faults.append(
                    f"its tokens are those of the tokenizer {of[0].get('name')!r}, not of {_name(tokenizer)!r}: the "
                    "same ids mean other text. Sample a pool with this tokenizer"
                )
            else:
                faults += [
                    f"sequence {kept.id}: its text was changed but not its input_ids, which are what is trained on. "
                    "Take the line out, and add the new text with Pool.add"
                    for kept in self
                    if tokenizer.decode(list(kept.input_ids)) != kept.text
                ]
        if base is not None:
            found = base if isinstance(base, str) else base_digest(base)
            if of[1].get("sha256") != found:
                faults.append(
                    f"it belongs to the base {of[1].get('name')!r} ({str(of[1].get('sha256'))[:12]}), and this one has "
                    f"other weights or another dtype ({found[:12]}). Sample a pool from this base; or, if the pool is "
                    "only text to you, load it without `base`"
                )
        if faults:
            raise PoolError("The pool cannot be used here:", faults)

    def save(self, folder: str | Path) -> Path:
        """Write the pool, whole or not at all; a pool that is there is replaced once the new one is complete.

        Raises:
            PoolError: if the folder has a manifest that is not a pool's.
        """
        manifest = {**self.manifest, "digest": self.digest, "counts": self.counts}
        files.write(Path(folder), self.sequences, manifest)
        return Path(folder)

    @classmethod
    def load(cls, folder: str | Path, *, tokenizer: Any = None, base: nn.Module | str | None = None) -> Pool:
        """Read a pool, and `check` that it belongs to the tokenizer and the base, where they are given.

        Raises:
            PoolError: names every fault of every line; nothing is loaded in part.
        """
        pool = cls(*files.read(Path(folder)))
        pool.check(tokenizer=tokenizer, base=base)
        return pool


def _mixed(sequences: Sequence[Kept]) -> tuple[Kept, ...]:
    """Sequences spread so that any stretch holds the kinds in their shares; those of a kind stay in their order."""
    total, seen = Counter(kept.kind for kept in sequences), Counter[str]()
    places = []
    for kept in sequences:
        seen[kept.kind] += 1
        places.append((seen[kept.kind] - 0.5) / total[kept.kind])
    order = sorted(range(len(sequences)), key=lambda i: (places[i], KINDS.index(sequences[i].kind)))
    return tuple(sequences[i] for i in order)


def _name(tokenizer: Any) -> str:
    return Path(str(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__)).name
