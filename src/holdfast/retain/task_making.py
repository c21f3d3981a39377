"""Keeps what the base says of sequences: its folder, opened when the precision is known, and what is not there made.

    facts of the base, precision, tokenizer, dtype  ->  the folder        key of a sequence  ->  its rows, made or read

Read next: `task_folder`, where they lie, and `task_cache`, which knows the sequences of a batch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..core import fisher_cache
from ..core.distributed import rank
from ..core.errors import WrongSetup
from ..core.kept_task import CachedRows
from ..core.reference import Reference
from ..core.tap import Tap
from ..functional.softmax_blocks import wide_dtype
from . import cache_facts
from .cache_file import Facts
from .cached_rows import BaseHead, hidden_rows, statistics_rows
from .task_folder import TaskFolder
from .task_keys import Pieces
from .task_kinds import Keeping, Kind

__all__ = ["Making", "Precision", "Run"]

FORMAT = 2
Run = Callable[[], Tensor]
Precision = tuple[str, torch.dtype, bool]
log = logging.getLogger(__name__)


class Making:
    """What is kept of a base, for some kinds of need.

    Args:
        tap: on the student's model.
        reference: the frozen base.
        kinds: what is kept.
        keeping: where and how.
        tell: hears what a user should know, once each.

    Attributes:
        base: the base's head.
        folder: the open one; None until the precision is known.
        ran_for: for how many supervised tokens the base had to run.
    """

    def __init__(
        self, tap: Tap, reference: Reference, kinds: Sequence[Kind], keeping: Keeping, tell: Callable[[str], None]
    ) -> None:
        self._tap, self._reference, self._kinds, self._keeping, self._tell = tap, reference, kinds, keeping, tell
        self.base = BaseHead(reference.head(tap))
        exact = self.base.head.weight.dtype == torch.float64
        self._dtype = keeping.dtype or (torch.float64 if exact else torch.float32)
        self._dtypes: dict[Kind, torch.dtype] = {}  # as they were read
        self.folder: TaskFolder | None = None
        self._autocast = ""  # that it was opened for
        self.ran_for: Tensor | int = 0

    @property
    def place(self) -> Path | None:
        """Where it is kept; None as long as that depends on the precision."""
        return self.folder.path if self.folder is not None else self._keeping.folder

    def bytes_a_token(self, kind: Kind) -> int:
        """Return what a supervised token takes: as it was read, or is expected."""
        weight = self.base.head.weight
        expected = weight.dtype if kind.statistics is None else self._dtype  # hidden states are in the model's own
        return kind.bytes_a_token(weight.shape[1], self._dtypes.get(kind, expected).itemsize)

    def open(self, precision: Precision) -> TaskFolder:
        """Return the folder, opened for the first precision that comes.

        Raises:
            WrongSetup: if it is of something else, or another precision comes later.
        """
        autocast = cache_facts.autocast(precision)
        if self.folder is None:
            facts: Facts = {
                "format": FORMAT,
                "dtype": str(self._dtype).removeprefix("torch."),
                "autocast": autocast,
                "tokenizer": self._keeping.tokenizer,
                **cache_facts.of_base(self._tap, self._reference),
            }
            own = fisher_cache.folder() / f"task-{cache_facts.key(facts)[:24]}"
            self.folder, self._autocast = TaskFolder(self._keeping.folder or own, facts, self._kinds), autocast
            if rank() == 0:
                log.info("cache: what the base says of the task is kept in %s", self.place)
        if autocast != self._autocast:
            raise WrongSetup(
                f"The model ran with autocast {autocast}, and before with autocast {self._autocast}, in which the base "
                f"is kept in {self.place}: it says something else now. Run every micro-batch in the same precision, or "
                "train without cache=..."
            )
        return self.folder

    def close(self) -> None:
        """Write what is in memory; the next folder may be of another base."""
        if self.folder is not None:
            self.folder.write()
        self.folder, self.base = None, BaseHead(self._reference.head(self._tap))

    def rows(
        self, folder: TaskFolder, kind: Kind, wanted: Pieces, mask: Tensor, targets: Tensor, run: Run
    ) -> CachedRows:
        """Return what is kept of sequences, made now where it is not there; arguments as for `make`."""
        self.make(folder, kind, wanted, mask, targets, run)
        kept = folder.shards[kind].read(wanted.keys)
        self._dtypes[kind] = kept["values"].dtype
        numbers = {name: kept[name].to(mask.device, wide_dtype(mask)) for name in kind.tensors[1:]}
        return CachedRows(kept["values"].to(mask.device), numbers.get("constants"), targets, numbers.get("weights"))

    def make(
        self,
        folder: TaskFolder,
        kind: Kind,
        wanted: Pieces,
        mask: Tensor,
        targets: Tensor,
        run: Run,
        *,
        ahead: bool = False,
    ) -> None:
        """Run the base if any of these sequences is not there, and keep what it says of those.

        Args:
            folder: the open one.
            kind: what is kept.
            wanted: the sequences of a batch.
            mask: their supervised tokens, bool, [B, T-1].
            targets: these, [N].
            run: runs the base on the batch, [B, T, H].
            ahead: whether the folder is built, and new ones are no mistake.
        """
        shards = folder.shards[kind]
        if not (lost := shards.missing(wanted.keys)):
            return
        if not ahead:
            folder.refuse_new(kind, len(lost), len(wanted.keys))
        with torch.no_grad():
            index = wanted.rows_of(lost).to(mask.device)
            hidden, following = run()[:, :-1][mask][index], targets[index]
            shards.put(wanted.only(lost), self._said(kind, hidden, following))
        self.ran_for = self.ran_for + len(index)

    def _said(self, kind: Kind, hidden: Tensor, targets: Tensor) -> CachedRows:
        if kind.statistics is None:
            return hidden_rows(hidden, targets)
        rows = statistics_rows(hidden, self.base.head, targets, kind.statistics, self._dtype)
        if rows.values.dtype != self._dtype:
            self._tell(
                "some of the head's mean weights do not fit float16 (too small or too large), and are kept in float32, "
                "at twice the room"
            )
        return rows
