"""The base on the task's own sequences, once: from the second epoch on its KL costs no forward of it.

    KL(base ‖ student) = c0 − s h·e0 + logsumexp(z):    (e0, c0) of a token do not change from one epoch to the next

What a sequence needs is made the first time that it comes (or ahead, by `holdfast cache build`), kept under a key of
its tokens, and read whenever it comes again. Which methods this gives exactly, and what is kept for the others, is in
`task_kinds`; how a sequence is known again in `task_keys` and `task_documents`; how it is kept in `task_making`. What
cannot be kept runs as always, and says so once.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

from torch import Tensor

from ..core import fisher_cache
from ..core.distributed import barrier, is_sharded, rank
from ..core.errors import NotYetSupported
from ..core.kept_task import CachedRows
from ..core.method import OutputMethod
from ..core.reference import Reference
from ..core.tap import Call, Tap
from ..core.types import Batch, Outputs, Positions, Supervision
from ..functional.divergence import Divergence
from . import cache_facts
from .cached_rows import divergence_from
from .task_documents import Documents
from .task_folder import refuse_place
from .task_keys import PASSED, Pieces, pieces, sequences_in
from .task_kinds import Keeping, kinds_of
from .task_making import Making, Precision, Run

__all__ = ["TaskCache"]

Found = dict[Positions, Pieces]
log = logging.getLogger(__name__)


class TaskCache:
    """What is kept of the base for a session's output methods on the task stream; `core.kept_task.KeptTask`.

    Args:
        tap: on the student's model.
        reference: the frozen base.
        methods: those on the task stream.
        keeping: where and how.

    Raises:
        NotYetSupported: if the weights are sharded, so that no process can say which base this is.
        WrongSetup: if nothing can be written where it is to be kept.
    """

    def __init__(
        self, tap: Tap, reference: Reference, methods: Sequence[OutputMethod], keeping: Keeping = Keeping()
    ) -> None:
        if any(is_sharded(parameter) for parameter in tap.model.parameters()):
            raise NotYetSupported(
                "The weights are sharded (FSDP2), so no process can say which base this is. Train with DDP, or without "
                "cache=..."
            )
        self._told: set[str] = set()
        self._tap, self._reference, self._keeping = tap, reference, keeping
        self._table, self._why_not, why_hidden = kinds_of(methods, tap.head(), reference.head(tap))
        self._kinds = list(dict.fromkeys(self._table.values()))
        self._positions: list[Positions] = [kind.positions for kind in self._kinds]
        if self._why_not:
            self._positions = list({getattr(method, "positions", "completion") for method in methods})
            self._tell(f"nothing is kept, the base runs in every step: {self._why_not}")
        else:
            refuse_place(keeping.folder or fisher_cache.folder())
        self._making = Making(tap, reference, self._kinds, keeping, self._tell)
        self._documents = Documents(tap, reference, self._tell)
        self._lengths = cache_facts.lengths_of(tap, reference)
        for why in why_hidden:
            self._tell(f"the base's hidden states are kept, not statistics, at one product with the head more ({why})")
        if why_hidden and keeping.dtype is not None:
            asked = str(keeping.dtype).removeprefix("torch.")
            self._tell(f"dtype={asked} is of statistics alone: hidden states are kept as the model makes them")

    @property
    def folder(self) -> Path | None:
        """Where it is kept; None until the first micro-batch, which tells the precision, if no folder was given."""
        return self._making.place

    # --- what a session asks for ----------------------------------------------------------------------------------

    def of_task(self, task: Outputs, call: Call | None) -> Outputs:
        """Return what methods see of a micro-batch, with `kept_sum` where it can be had; see `KeptTask`."""
        if not len(task.hidden):  # a share of the sequences is drawn, and none of these was
            return task
        if self._making.folder is not None:
            self._making.folder.write(if_due=True)
        found = self._known(call, task.supervision, lambda: task.run_reference()[0])
        if isinstance(found, str):
            if not self._why_not:
                self._tell(f"a batch is not kept, the base runs on it: {found}")
            for positions in self._positions:
                self._making.ran_for = self._making.ran_for + task.supervision.mask(positions).sum()
            return task
        return replace(task, kept_sum=partial(self._sum, task, found), kept_rows=partial(self._rows, task, found))

    def _sum(
        self, task: Outputs, found: Found, divergence: Divergence, positions: Positions, chunk_rows: int | None
    ) -> Tensor:
        """Return the divergence of the student from the base, summed over the tokens at these positions."""
        own = task.hidden[:, :-1][task.supervision.mask(positions)]
        if not len(own):
            return own.sum().float()  # 0, connected to the graph
        rows, base = self._rows(task, found, divergence, positions), self._making.base
        return divergence_from(own, task.head, rows, base, divergence, of=self.folder, chunk_rows=chunk_rows)

    def _rows(self, task: Outputs, found: Found, divergence: Divergence, positions: Positions) -> CachedRows:
        """Return what is kept of the tokens at these positions, made now where it is not there."""
        kind, mask, making = self._table[divergence, positions], task.supervision.mask(positions), self._making
        targets, wanted = task.supervision.targets[mask], found[positions]
        if not wanted.keys:
            return CachedRows(task.hidden.new_zeros(0, making.base.head.weight.shape[1]), None, targets)
        if kind.statistics is not None:
            making.base.refuse_other(task.head, self.folder)
        assert making.folder is not None  # `_known` has opened it
        return making.rows(making.folder, kind, wanted, mask, targets, lambda: task.run_reference()[0])

    def ran_for(self) -> Tensor | int:
        """Return for how many supervised tokens the base had to run since the last call; of each kind apart."""
        count, self._making.ran_for = self._making.ran_for, 0
        return count

    def write(self) -> None:
        """Write down what has come since the last time."""
        if self._making.folder is not None:
            self._making.folder.write()

    def forget(self) -> None:
        """Tell anew which base it is: the reference was restored from a checkpoint."""
        self._making.close()

    def describe(self) -> str:
        """Say what is kept, where, what it costs, and what was told on the way; or why nothing is."""
        if self._why_not:
            return f"nothing is kept of the base on the task: {self._why_not}"
        costs = [f"{kind.name} {self._making.bytes_a_token(kind):,} bytes a supervised token" for kind in self._kinds]
        folder = self._making.folder
        there = f"; {sum(map(len, folder.shards.values())):,} sequences are there" if folder is not None else ""
        where = self.folder or f"a folder of its own in {fisher_cache.folder()}"
        said = (
            "the base on the task's sequences: runs on what is new, and what it says is kept in "
            f"{where} ({', '.join(costs)}{there})"
        )
        return "; ".join([said, *sorted(self._told)])

    # --- ahead of training ----------------------------------------------------------------------------------------

    def build(self, batches: Iterable[Batch], precision: Precision) -> None:
        """Keep the base on all of these batches ahead of training.

        Args:
            batches: every sequence that training will see, as its host batches them.
            precision: that the host trains in, as `Call.autocast` has it.

        Raises:
            NotYetSupported: if the methods, or a batch, cannot be kept.
        """
        if self._why_not:
            raise NotYetSupported(f"There is nothing to build: {self._why_not}.")
        folder = self._making.open(precision)
        for batch in batches:
            given = {name: batch[name] for name in PASSED if name in batch}
            call = Call(batch["input_ids"].new_empty(0), (), self._tap.inputs(given) | given, precision)
            supervision, run = Supervision.of(batch), cache(partial(self._reference.hidden, self._tap, call))
            found = self._known(call, supervision, run)
            if isinstance(found, str):
                raise NotYetSupported(
                    f"A batch cannot be kept: {found}. Do not build ahead: with cache=... training keeps what can be "
                    "kept, and runs the base on the rest."
                )
            for kind in self._kinds:
                mask = supervision.mask(kind.positions)
                targets = supervision.targets[mask]
                self._making.make(folder, kind, found[kind.positions], mask, targets, run, ahead=True)
        folder.write()
        barrier()
        for_these_data = self._keeping.folder is not None  # one that `cache=True` finds is for any
        if rank() == 0 and for_these_data and not self._lengths.switches:  # else batches of other rows need more
            folder.mark(self._kinds)

    # --- what is known of a batch ---------------------------------------------------------------------------------

    def _known(self, call: Call | None, supervision: Supervision, run: Run) -> Found | str:
        """Return the sequences of a batch, for all positions that are asked for; or why they cannot be told."""
        if self._why_not:
            return self._why_not
        if call is None:
            return "its rows cannot be told apart"
        seen = sequences_in(call, len(supervision.targets), self._lengths)
        if isinstance(seen, str):
            return seen
        self._making.open(call.autocast)
        apart, found = self._documents.apart(seen, call, run), Found()
        for positions in dict.fromkeys(self._positions):
            those = pieces(seen, supervision.mask(positions), supervision.targets, apart=apart)
            if isinstance(those, str):
                return those
            found[positions] = those
        return found

    def _tell(self, what: str) -> None:
        if what not in self._told and rank() == 0:
            log.warning("cache: %s.", what)
        self._told.add(what)
