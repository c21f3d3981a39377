"""The retain stream: sequences beside the task's own, on which the student is held to the base.

    L = strength · (1/N) Σ_t D(base_t, student_t),   t over the N retain tokens of the whole optimizer step

How many sequences a step has follows from its task sequences and from `share`; they are drawn at its first micro-batch,
dealt out to the processes, and run in parts beside the micro-batches. So neither accumulation nor the number of
processes changes which sequences a step sees, or what a token of theirs weighs. The host's forward, its loss and its
random numbers are left alone. The sequences are always the same ones, so what the base says of them may be kept
(`Keep`), and then it runs once before the first step and never again. Read next: `session`, which runs it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..functional.head import Head
from .distributed import gather, rank, refuse_reentrant, world_size
from .errors import WrongSetup
from .method import OutputMethod
from .reference import Keep, KeptBase, Reference
from .retain import Retain
from .tap import Call, Tap
from .types import Batch, KeptSum, Outputs, Supervision, TokenCounts


class RetainStream:
    """Runs student and reference on the retain sequences of each step, once for all methods that read them.

    Args:
        methods: that read the retain stream.
        tap: the student's.
        reference: the frozen base.
        retain: the pool, the same on every process.
        seed: of the order of the sequences and of dropout.
        keep: keeps what the base says of the pool; None: the base runs in every step.

    Attributes:
        digest: of the sequences in their order: a run that is resumed must have the same.

    Raises:
        WrongSetup: if the methods ask for different shares or sets, or the processes have different sequences.
    """

    def __init__(
        self,
        methods: Sequence[OutputMethod],
        tap: Tap,
        reference: Reference,
        retain: Retain,
        seed: int,
        keep: Keep | None = None,
    ) -> None:
        if len({(method.share, method.data, method.cache) for method in methods}) > 1:
            raise WrongSetup(
                f"{' and '.join(m.describe() for m in methods)} differ in share, data or cache, and a step has one "
                "set of retain sequences for all. Give them the same; strengths may differ."
            )
        self.share = methods[0].share
        self._tap, self._reference, self._retain, self._seed = tap, reference, retain, seed
        self._pool = retain.sequences(methods[0].data)
        self.digest = digest(self._pool)
        if len(set(gather(self.digest))) > 1:
            raise WrongSetup(
                "The processes have different retain sequences, so each would hold the model to something else. Give "
                "all of them the same rows: retain=..., or a pool that was sampled before (holdfast retain sample)."
            )
        asked = {method.statistic() for method in methods}
        self._statistic = asked.pop() if len(asked) == 1 else None
        self._keep = keep if methods[0].cache else None
        self._kept: KeptBase | None = None
        self._parts: list[list[int]] = []  # sequences of the micro-batches still to come
        self._counts = TokenCounts(0, 0, 0, 0)
        self._checked = False

    def describe(self) -> str:
        """Return which sequences join a step, as `explain()` shows it."""
        return (
            f"{self.share:.0%} of a step's sequences come from the pool of {len(self._pool):,}, all their tokens count"
        )

    def of_base(self) -> str:
        """Return where the base's side comes from, as `explain()` shows it."""
        if self._kept is not None:
            return f"the base on the retain sequences: read from {self._kept.describe()}"
        if self._keep is not None:
            return "the base on the retain sequences: runs once, before the first step, and what it says is kept"
        return "reference forward on the retain sequences"

    def resume(self, digest: str | None) -> None:
        """Go on with the sequences of a run that was saved; the base was loaded anew, so what was kept of it is not it.

        Raises:
            WrongSetup: if those were others.
        """
        if digest not in (None, self.digest):
            raise WrongSetup(
                "The run was saved with other retain sequences than it has now, so going on would hold the model to "
                "something else. Give it the same rows or the same pool: one that was sampled by itself lies in "
                "$HOLDFAST_CACHE or ~/.cache/holdfast, and the log of the first run names it."
            )
        self._kept = None

    def outputs(self, task: Call, counts: TokenCounts, number: int, *, step: int, host_factor: float) -> Outputs:
        """Run the student on the part of a micro-batch, and return what methods see of it.

        Args:
            task: the student's forward of the micro-batch, whose precision is repeated.
            counts: of the whole optimizer step.
            number: of the micro-batch in its step, from 0.
            step: number of the optimizer step.
            host_factor: as in `Session.loss`.

        Raises:
            WrongSetup: if the step has more micro-batches than were counted.
            NeverSupported: under reentrant gradient checkpointing in several processes.
        """
        if world_size() > 1 and not self._checked:
            refuse_reentrant(task.hidden)
            self._checked = True
        if self._keep is not None and self._kept is None:
            with task.autocasting():  # in the precision that the host trains in
                self._kept = self._keep(self._tap, self._reference, self._pool, self._statistic)
            self._keep = None if self._kept is None else self._keep
        if number == 0:
            self._draw(counts)
        if not self._parts:
            raise WrongSetup(
                f"session.loss() ran {number + 1} times in a step whose session.count(micro_batches) saw "
                f"{counts.micro_batches}. Count all micro-batches of the step, and call session.gradients_ready() "
                "after its last one."
            )
        numbers = self._parts.pop(0)
        batch = padded([self._pool[number] for number in numbers], task.hidden.device)
        real = batch["attention_mask"][:, 1:].bool()
        # without sequences methods run all the same, on nothing, so that every process logs the same quantities
        nothing = replace(task, hidden=task.hidden[:0, :1].detach())
        call = self._student(batch, task, hash((self._seed, step, number, rank()))) if len(real) else nothing
        return Outputs(
            hidden=call.hidden,
            head=self._tap.head(),
            supervision=Supervision(batch["input_ids"][:, 1:], real, torch.zeros_like(real)),
            counts=self._counts,
            host_factor=host_factor,
            run_reference=cache(partial(self._base, call, numbers)),
            kept_sum=self._sum(call, numbers, real),
        )

    def finish(self) -> None:
        """Check that the whole step was run.

        Raises:
            WrongSetup: if micro-batches that were counted have not come.
        """
        left, self._parts = len(self._parts), []
        if left:
            raise WrongSetup(
                f"session.count() saw {left} more micro-batches than session.loss() ran on, so retain sequences of "
                "this step were left out of its mean. Call session.loss(batch, counts) for each of them."
            )

    def _draw(self, counts: TokenCounts) -> None:
        """Draw the sequences of a step, the same on every process, and deal out this one's to its micro-batches."""
        drawn = self._retain.places(beside(counts.sequences, self.share), len(self._pool), self._seed)
        tokens = sum(len(self._pool[number]) - 1 for number in drawn)
        own, parts = drawn[rank() :: world_size()], max(counts.micro_batches, 1)
        cuts = [len(own) * i // parts for i in range(parts + 1)]
        self._parts = [own[start:end] for start, end in pairwise(cuts)]
        self._counts = TokenCounts(tokens, 0, len(drawn), parts)

    def _student(self, batch: Batch, task: Call, seed: int) -> Call:
        device = task.hidden.device
        with task.autocasting(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)  # dropout draws, and the host must find its random numbers as it left them
            return self._tap.run((), self._tap.inputs(batch))

    def _base(self, call: Call, numbers: Sequence[int]) -> tuple[Tensor, Head]:
        """Return the base's hidden states and head for a forward of the student's, which may be of nothing."""
        head = self._reference.head(self._tap)
        if not numbers:
            return call.hidden.new_zeros(0, 1, head.weight.shape[1]), head
        if self._kept is not None and self._kept.whole:
            return self._kept.hidden(numbers, call.hidden.device), head
        return self._reference.hidden(self._tap, call), head

    def _sum(self, call: Call, numbers: Sequence[int], mask: Tensor) -> KeptSum | None:
        kept, head = self._kept, self._tap.head()
        if kept is None or kept.whole or not numbers:
            return None
        # the pool is kept for the one divergence that all ask for, and every token of a sequence counts
        return lambda divergence, positions, chunk_rows: kept.total(call.hidden, head, numbers, mask, chunk_rows)


def beside(sequences: int, share: float) -> int:
    """Return how many retain sequences join so many of the task, that they be `share` of all; at least one.

    >>> beside(12, 0.25), beside(16, 0.2), beside(1, 0.25)
    (4, 4, 1)
    """
    return max(1, int(sequences * share / (1 - share) + 0.5))


def padded(sequences: Sequence[Tensor], device: torch.device) -> Batch:
    """Return sequences as rows of one batch, padded on the right; of none, a batch without rows."""
    none = torch.zeros(0, 1, dtype=torch.int64, device=device)
    ids = pad_sequence([each.to(device) for each in sequences], batch_first=True) if sequences else none
    lengths = torch.tensor([len(each) for each in sequences], dtype=torch.int64, device=device)
    real = torch.arange(ids.shape[1], device=device) < lengths[:, None]
    return {"input_ids": ids, "attention_mask": real.long()}


def digest(sequences: Sequence[Tensor]) -> str:
    """Return a hash of sequences in their order, by which two processes, or a run and its resumption, are compared."""
    whole = hashlib.sha256()
    for ids in sequences:
        whole.update(f"{ids.tolist()}".encode())
    return whole.hexdigest()
