"""The base on the task's own sequences, once: from the second epoch on its KL costs no forward of it.

    KL(base ‖ student) = c0 − s h·e0 + logsumexp(z):    (e0, c0) of a token do not change from one epoch to the next

What a sequence needs is made the first time that it comes (or ahead, by `holdfast cache build`), kept under a key of
its tokens, and read whenever it comes again. Which methods this gives exactly, and what is kept for the others, is in
`task_kinds`; where it lies in `task_folder`; how a sequence is known again in `task_keys`. What cannot be kept runs as
always, and says so once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import torch
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
from ..functional.softmax_blocks import wide_dtype
from . import cache_facts
from .cache_file import Facts
from .cached_rows import BaseHead, divergence_from, hidden_rows, statistics_rows
from .task_folder import TaskFolder
from .task_keys import PASSED, Pieces, Sequences, pieces, sequences_in
from .task_kinds import Keeping, Kind, kinds_of

__all__ = ["TaskCache"]

FORMAT = 1
Run = Callable[[], Tensor]
Precision = tuple[str, torch.dtype, bool]
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
    """

    def __init__(
        self, tap: Tap, reference: Reference, methods: Sequence[OutputMethod], keeping: Keeping = Keeping()
    ) -> None:
        if any(is_sharded(parameter) for parameter in tap.model.parameters()):
            raise NotYetSupported(
                "The weights are sharded (FSDP2), so no process can say which base this is. Train with DDP, or without "
                "cache=..."
            )
        self._tap, self._reference, self._keeping = tap, reference, keeping
        self._base = BaseHead(reference.head(tap))
        weight = self._base.head.weight
        self._dtype = keeping.dtype or (torch.float64 if weight.dtype == torch.float64 else torch.float32)
        self._kinds, self._why_not, why_hidden = kinds_of(methods, tap.head(), self._base.head)
        self._folder: TaskFolder | None = None
        self._documents_apart: bool | None = None
        self._building = False
        self._ran_for = 0
        self._told: set[str] = set()
        if self._why_not:
            self._tell(f"nothing is kept, the base runs in every step: {self._why_not}")
        for why in why_hidden:
            self._tell(f"the base's hidden states are kept, not statistics, at one product with the head more ({why})")

    @property
    def folder(self) -> Path | None:
        """Where it is kept; None until the first micro-batch, which tells the precision, if no folder was given."""
        return self._folder.path if self._folder is not None else self._keeping.folder

    # --- what a session asks for ----------------------------------------------------------------------------------

    def of_task(self, task: Outputs, call: Call | None) -> Outputs:
        """Return what methods see of a micro-batch, with `kept_sum` where it can be had; see `KeptTask`."""
        if self._why_not:
            return task
        seen = "its rows cannot be told apart" if call is None else sequences_in(call, len(task.hidden))
        if call is None or isinstance(seen, str):
            self._tell(f"a batch is not kept, the base runs on it: {seen}")
            return task
        self._open(call.autocast)
        found = self._pieces(seen, task.supervision, call, lambda: task.run_reference()[0])
        if found is None:
            return task
        return replace(task, kept_sum=partial(self._sum, task, found), kept_rows=partial(self._rows_of, task, found))

    def _sum(
        self,
        task: Outputs,
        found: Mapping[Positions, Pieces],
        divergence: Divergence,
        positions: Positions,
        chunk_rows: int | None,
    ) -> Tensor:
        """Return the divergence of the student from the base, summed over the tokens at these positions."""
        mask = task.supervision.mask(positions)
        own = task.hidden[:, :-1][mask]
        if not len(own):
            return own.sum().float()  # 0, connected to the graph
        rows = self._rows_of(task, found, divergence, positions)
        return divergence_from(own, task.head, rows, self._base, divergence, of=self.folder, chunk_rows=chunk_rows)

    def _rows_of(
        self, task: Outputs, found: Mapping[Positions, Pieces], divergence: Divergence, positions: Positions
    ) -> CachedRows:
        """Return what is kept of the tokens at these positions, made now where it is not there."""
        kind, mask = self._kinds[divergence, positions], task.supervision.mask(positions)
        targets, wanted = task.supervision.targets[mask], found[positions]
        if not wanted.keys:
            return CachedRows(task.hidden.detach()[:, :-1][mask], None, targets)
        if kind.statistics is not None:
            self._base.refuse_other(task.head, self.folder)
        self._make(kind, wanted, mask, targets, lambda: task.run_reference()[0])
        assert self._folder is not None  # it is open
        kept = self._folder.shards[kind].read(wanted.keys)
        numbers = {name: kept[name].to(mask.device, wide_dtype(mask)) for name in kind.tensors[1:]}
        return CachedRows(kept["values"].to(mask.device), numbers.get("constants"), targets, numbers.get("weights"))

    def ran_for(self) -> int:
        """Return for how many supervised tokens the base had to run since the last call."""
        count, self._ran_for = self._ran_for, 0
        return count

    def write(self) -> None:
        """Write down what has come since the last time."""
        if self._folder is not None:
            self._folder.write()

    def forget(self) -> None:
        """Tell anew which base it is: the reference was restored from a checkpoint."""
        self.write()
        self._folder, self._base = None, BaseHead(self._reference.head(self._tap))

    def describe(self) -> str:
        """Say what is kept, where, and what it costs; or why nothing is."""
        if self._why_not:
            return f"nothing is kept of the base on the task: {self._why_not}"
        width, size = self._base.head.weight.shape[1], self._dtype.itemsize
        kinds = dict.fromkeys(self._kinds.values())
        costs = [f"{kind.name} {kind.bytes_a_token(width, size):,} bytes a supervised token" for kind in kinds]
        shards = self._folder.shards.values() if self._folder is not None else ()
        there = f"; {sum(map(len, shards)):,} sequences are there" if shards else ""
        where = self.folder or "a folder of its own, which the log names"
        return (
            "the base on the task's sequences: runs on what is new, and what it says is kept in "
            f"{where} ({', '.join(costs)}{there})"
        )

    # --- what is made ---------------------------------------------------------------------------------------------

    def build(self, batches: Iterable[Batch], precision: Precision) -> Iterator[int]:
        """Keep the base on all of these batches ahead of training; yields how many sequences each has, as it is done.

        Args:
            batches: every sequence that training will see, as its host batches them.
            precision: that the host trains in, as `Call.autocast` has it.

        Raises:
            NotYetSupported: if the methods, or a batch, cannot be kept.
        """
        if self._why_not:
            raise NotYetSupported(f"There is nothing to build: {self._why_not}.")
        folder, self._building = self._open(precision), True
        for batch in batches:
            given = {name: batch[name] for name in PASSED if name in batch}
            call = Call(torch.empty(0), (), self._tap.inputs(given) | given, precision)
            supervision, run = Supervision.of(batch), cache(partial(self._reference.hidden, self._tap, call))
            seen = sequences_in(call, len(batch["input_ids"]))
            found = None if isinstance(seen, str) else self._pieces(seen, supervision, call, run)
            if found is None:
                why = seen if isinstance(seen, str) else "; ".join(sorted(self._told))
                raise NotYetSupported(f"A batch cannot be kept: {why}. Train without cache=...")
            for kind in dict.fromkeys(self._kinds.values()):
                mask = supervision.mask(kind.positions)
                self._make(kind, found[kind.positions], mask, supervision.targets[mask], run)
            yield max(len(each.keys) for each in found.values())
        folder.write()
        barrier()
        if rank() == 0 and self._keeping.folder is not None:  # one that `cache=True` finds is for any data
            folder.mark(whole=True)

    def _make(self, kind: Kind, wanted: Pieces, mask: Tensor, targets: Tensor, run: Run) -> None:
        """Run the base if any of these sequences is not there, and keep what it says of those."""
        assert self._folder is not None  # opened by whoever calls this
        shards = self._folder.shards[kind]
        if not (lost := shards.missing(wanted.keys)):
            return
        if self._folder.whole and not self._building:
            raise self._folder.refuse(kind, wanted, lost)
        with torch.no_grad():
            index = wanted.rows_of(lost).to(mask.device)
            hidden, following = run()[:, :-1][mask][index], targets[index]
            rows = hidden_rows(hidden, following)
            if kind.statistics is not None:
                rows = statistics_rows(hidden, self._base.head, following, kind.statistics, self._dtype)
        shards.put(wanted.only(lost), rows)
        self._ran_for += len(index)

    # --- what is known of a batch ---------------------------------------------------------------------------------

    def _pieces(
        self, seen: Sequences, supervision: Supervision, call: Call, run: Run
    ) -> dict[Positions, Pieces] | None:
        """Return the sequences of a batch, for all positions that are asked for; None if they cannot be told."""
        apart, found = self._apart(seen, call, run), dict[Positions, Pieces]()
        for positions in {kind.positions for kind in self._kinds.values()}:
            those = pieces(seen, supervision.mask(positions), supervision.targets, apart=apart)
            if isinstance(those, str):
                self._tell(f"a batch is not kept, the base runs on it: {those}")
                return None
            found[positions] = those
        return found

    def _apart(self, seen: Sequences, call: Call, run: Run) -> bool:
        """Return whether the base says of a packed document what it says of it alone; tried on the first one."""
        packed = seen.packed_row()
        if packed is not None and self._documents_apart is None:
            row, start, end = packed
            among = run()[row, start:end].float()
            here = {"input_ids": seen.ids, "position_ids": seen.positions}
            inputs = self._tap.inputs({name: t[row : row + 1, start:end].to(among.device) for name, t in here.items()})
            alone = self._reference.hidden(self._tap, Call(torch.empty(0), (), inputs, call.autocast))[0]
            coarse = call.autocast[2] or alone.dtype in (torch.float16, torch.bfloat16)
            gap = (among - alone.float()).norm() / alone.float().norm()
            self._documents_apart = bool(gap <= (5e-2 if coarse else 1e-3))
            if not self._documents_apart:
                self._tell(
                    "documents in one row see each other in this model (its attention does not mind where position ids "
                    "begin anew, or was given a mask), so whole rows are kept: pack them once, not in every epoch"
                )
        return packed is None or bool(self._documents_apart)

    # --- which folder ---------------------------------------------------------------------------------------------

    def _open(self, precision: Precision) -> TaskFolder:
        """Open the folder, once the precision is known."""
        if self._folder is None:
            kinds = list(dict.fromkeys(self._kinds.values()))
            facts: Facts = {
                "format": FORMAT,
                "kept": ", ".join(sorted(kind.name for kind in kinds)),
                "dtype": str(self._dtype).removeprefix("torch."),
                "autocast": cache_facts.autocast(precision),
                "tokenizer": self._keeping.tokenizer,
                **cache_facts.of_base(self._tap, self._reference),
            }
            own = fisher_cache.folder() / f"task-{cache_facts.key(facts)[:24]}"
            self._folder = TaskFolder(self._keeping.folder or own, facts, kinds)
            if rank() == 0:
                log.info("cache: %s", self.describe())
        return self._folder

    def _tell(self, what: str) -> None:
        if what not in self._told and rank() == 0:
            log.warning("cache: %s.", what)
        self._told.add(what)
