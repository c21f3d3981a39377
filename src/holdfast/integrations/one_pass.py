"""The host's token loss and a divergence to the base from one pass over the head, with the host none the wiser.

    Σ_t CE_t + ρ Σ_t D_t,    ρ = (what the method's sum weighs) / (what a token of the host's loss weighs)

Two losses that each form the logits take five products of hidden states and head (under TRL, which forms its own twice,
six); together they take three, and no tensor of tokens x vocabulary exists on the way. The model runs `headless` for
one forward, and the host goes on from its output as always: it divides, scales and logs. The gradient of the sum is
finished in the pass and goes back through the host's own arithmetic, so that must weigh a token as ρ supposes; this is
checked at every backward pass.

It is done where it changes nothing else (`one_pass_conditions`). Otherwise host and method each compute their own, as
without this, and `explain()` says why. Processes need not agree: whatever they wait for each other in comes before.
Read next: `functional.chunked`, the engine; `one_pass_parts`, how one gradient serves two readers.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from ..core.method import OutputMethod
from ..core.reference import Reference
from ..core.session import Session
from ..core.tap import Tap
from ..core.task_stream import Taken
from ..core.types import Batch, Outputs, TokenCounts
from ..functional.divergence import Divergence
from ..functional.head import Head
from ..functional.linear_divergence import CrossEntropyWithDivergence, linear_cross_entropy_with_divergence
from .headless import headless, headless_in_trl
from .one_pass_conditions import (
    choose,
    fault_of_batch,
    fault_of_hooks,
    faults_of_host,
    is_sft,
    is_unchanged,
    unproved,
)
from .one_pass_kept import pass_with_kept
from .one_pass_labels import StepLabels
from .one_pass_parts import by_position, summed


@dataclass
class MicroBatch:
    """What a trainer knows when it is about to compute the loss of a micro-batch, and what comes of its forward.

    Attributes:
        batch: the micro-batch.
        counts: of the whole optimizer step.
        items: the host's own count of the step's tokens, if it has one.
        host_factor: as in `Session.loss`.
        taken: the forward, with the sum of the method's divergence, where one pass computed it.
    """

    batch: Batch
    counts: TokenCounts | None
    items: Any
    host_factor: float
    taken: Taken | None = None


class OnePass:
    """Computes a trainer's token loss together with the divergence of one of its session's methods.

    Args:
        trainer: whose loss it is.
        session: the trainer's.
        wanted: whether the user wants it.

    Attributes:
        why_not: why every micro-batch takes two passes; empty where they take one.
    """

    def __init__(self, trainer: Any, session: Session, wanted: bool = True) -> None:
        self._trainer, self._session, self._told = trainer, session, set[str]()
        self._labels = StepLabels()
        self._first_step: int | None = None
        methods = {place: method for place, method in session._active(OutputMethod) if method.on == "task"}
        self._place, faults = choose(methods)
        self.why_not = "no method is on the task's tokens"
        if not methods:
            return
        self.why_not = "; ".join([*faults_of_host(trainer), *faults]) if wanted else "it is off (one_pass=False)"
        if not self.why_not:
            self._tap, self._sft = cast(Tap, session.tap), is_sft(trainer)
            self.why_not = unproved(session, self._tap, lambda: self._without_logits(None), fused=self._sft)
        session.notes.append(self.describe())

    def describe(self) -> str:
        """Return what is computed in one pass, or why nothing is, as `explain()` shows it."""
        if self.why_not:
            return f"Two passes over the head, one for the host's loss and one for a method's: {self.why_not}."
        return (
            f"One pass over the head: the host's loss and {self._method.name} come from the same logits, of a few rows "
            "at a time; outputs.logits of a training forward are empty (one_pass=False: two passes)."
        )

    @property
    def _method(self) -> OutputMethod:
        return cast(OutputMethod, self._session.budgets.acting[cast(int, self._place)])

    # --- a step ---------------------------------------------------------------------------------------------------

    def read(self, batches: Sequence[Batch], items: Any) -> None:
        """Read what must be known of a step's labels, once for all of its micro-batches."""
        if not self.why_not:
            self._labels.read(batches, items)

    @contextmanager
    def over(self, micro: MicroBatch) -> Iterator[None]:
        """Return the context of a host's loss; `micro.taken` has the sum of the method's divergence afterwards."""
        why = self.why_not or ("" if self._sft else fault_of_hooks(self._tap))
        if why := why or fault_of_batch(micro.batch, self._labels.of):
            self._tell(why)
            yield
            return
        with self._without_logits(micro):
            yield
        if micro.taken is None:
            self._give_up("in training the model's forward makes its loss in another way than in evaluation")

    def _tell(self, why: str) -> None:
        if not self.why_not and why not in self._told:
            self._told.add(why)
            self._session.notes.append(f"Micro-batches that take two passes over the head all the same: {why}.")
            warnings.warn(f"A micro-batch takes two passes over the head: {why}.", stacklevel=2)

    def _give_up(self, why: str) -> None:
        notes, place = self._session.notes, self._session.notes.index(self.describe())
        self.why_not = why
        notes[place] = self.describe()
        warnings.warn(f"Every micro-batch takes two passes over the head: {why}.", stacklevel=2)

    # --- the pass -------------------------------------------------------------------------------------------------

    def _without_logits(self, micro: MicroBatch | None) -> AbstractContextManager[None]:
        """Return the context of a forward whose loss comes from here; without a micro-batch it is the host's alone."""
        parted = by_position if self._sft else summed

        def alone(hidden: Tensor, labels: Tensor, *, waits: bool = True) -> Any:
            found = over_positions(hidden, labels, self._tap.head(), statistics=self._sft)
            return parted(found, labels, 0.0, waits=waits)[0]

        def read(hidden: Tensor, labels: Tensor) -> Any:
            if micro is None:
                return alone(hidden, labels)
            micro.taken = self._session.take(micro.batch, micro.counts, host_factor=micro.host_factor)
            task, waits = micro.taken.task, self._waits(hidden.device)
            if not is_unchanged(hidden, task.hidden):  # a method reads what the backbone returned, so it has its own
                self._tell("what enters the head is not what the backbone returned")
                return alone(hidden, labels, waits=waits)
            ratio = self._weight(task) * self._tokens_per_weight(micro)
            part, total = parted(self._both(task, labels, ratio), labels, ratio, waits=waits)
            micro.taken.sums[cast(int, self._place)] = total
            return part

        return headless_in_trl(self._tap, read) if self._sft else headless(self._tap, read)

    def _both(self, task: Outputs, labels: Tensor, ratio: float) -> CrossEntropyWithDivergence:
        """Compute the host's loss with the method's divergence: of the base as it runs, or as it is kept."""
        divergence, chunk_rows = self._method.statistic(), getattr(self._method, "chunk_rows", None)
        hidden, head, statistics = task.hidden, task.head, self._sft
        if task.kept_rows is None or divergence is None:
            base = task.reference_hidden, task.reference_head
            return over_positions(hidden, labels, head, base, divergence, ratio, chunk_rows, statistics=statistics)
        kept = task.kept_rows(divergence, "completion")
        base_head = cast(Reference, self._session.reference).head(self._tap)
        return pass_with_kept(
            hidden, labels, head, kept, base_head, divergence, ratio, chunk_rows, statistics=statistics
        )

    def _waits(self, device: torch.device) -> bool:
        """Say whether the check in backward waits: where it costs nothing, and in the first step, which proves most."""
        step = self._session.step
        self._first_step = step if self._first_step is None else self._first_step
        return device.type != "cuda" or step == self._first_step

    def _weight(self, task: Outputs) -> float:
        """Return what the method multiplies its sum by, asked of the method itself."""
        total = torch.zeros((), requires_grad=True)
        state = self._session.begin()[cast(int, self._place)]
        with torch.enable_grad(), torch.autocast(task.hidden.device.type, enabled=False):
            loss = self._method.loss(state, replace(task, kept_sum=lambda *_: total))
        (weight,) = torch.autograd.grad(loss, total, allow_unused=True)
        return 0.0 if weight is None else weight.item()

    def _tokens_per_weight(self, micro: MicroBatch) -> float:
        """Return 1 / what the host multiplies a token's loss by: its count of tokens, over processes if it says so."""
        trainer, own = self._trainer, micro.items is None
        own = own or not (self._sft or trainer.model_accepts_loss_kwargs)
        count = self._labels.of(micro.batch).tokens if own else self._labels.number(micro.items)
        several = trainer.args.average_tokens_across_devices and not own
        return (max(count, 1.0) if self._sft else count) / (trainer.accelerator.num_processes if several else 1)


def over_positions(
    hidden: Tensor,
    labels: Tensor,
    head: Head,
    base: tuple[Tensor, Head] | None = None,
    divergence: Divergence | None = None,
    ratio: float = 0.0,
    chunk_rows: int | None = None,
    *,
    statistics: bool = False,
) -> CrossEntropyWithDivergence:
    """Return cross-entropy + ratio · divergence over all positions that predict another.

    Args:
        hidden: of the student, [B, T, H].
        labels: [B, T], `IGNORED` where a token is not asked for.
        head: the student's.
        base: the base's hidden states and head; None: no divergence.
        divergence: the member of the family.
        ratio: the weight of the sum over the weight of a token's loss, in what the caller makes of the two.
        chunk_rows: as in `linear_divergence`.
        statistics: whether entropy and the likeliest tokens are asked for too.
    """
    return linear_cross_entropy_with_divergence(
        hidden[:, :-1],
        None if base is None else base[0][:, :-1],
        head,
        labels[:, 1:],
        divergence,
        ratio,
        reference_head=None if base is None else base[1],
        chunk_rows=chunk_rows,
        statistics=statistics,
    )
