"""The host's token loss and a divergence to the base from one pass over the head, with the host none the wiser.

    Σ_t CE_t + ρ Σ_t D_t,    ρ = (what the method's sum weighs) / (what a token of the host's loss weighs)

Two losses that each form the logits take five products of hidden states and head (under TRL, which forms its own twice,
six); together they take three, and no tensor of tokens x vocabulary exists on the way. The model runs `headless` for
one forward, and the host goes on from its output as always: it divides, scales and logs. The gradient of the sum is
finished in the pass and goes back through the host's own arithmetic, so that must weigh a token as ρ supposes; this is
checked at every backward pass.

It is done where it provably changes nothing (`one_pass_conditions`). Otherwise host and method each compute their own,
as without this, and `explain()` says why. Read next: `functional.chunked`, the engine.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ..core.errors import NotYetSupported, WrongSetup
from ..core.method import OutputMethod
from ..core.reference import Reference
from ..core.session import Session
from ..core.tap import Tap
from ..core.types import IGNORED, Batch, Outputs, TokenCounts
from ..functional.divergence import Divergence
from ..functional.head import Head
from ..functional.linear_divergence import CrossEntropyWithDivergence, linear_cross_entropy_with_divergence
from .headless import Rows, headless
from .one_pass_conditions import choose, fault_of_batch, fault_of_hooks, faults_of_host, is_sft, unproved
from .one_pass_kept import pass_with_kept


class MicroBatch(NamedTuple):
    """What a trainer knows when it is about to compute the loss of a micro-batch."""

    batch: Batch
    counts: TokenCounts | None
    items: Any  # the host's own count of the step's tokens, if it has one
    host_factor: float


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
        methods = {place: method for place, method in session._active(OutputMethod) if method.on == "task"}
        self._place, faults = choose(methods)
        self.why_not = "no method is on the task's tokens"
        if not methods:
            return
        self.why_not = "; ".join([*faults_of_host(trainer), *faults]) if wanted else "it is off (one_pass=False)"
        if not self.why_not:
            self._tap, self._sft = cast(Tap, session.tap), is_sft(trainer)
            self.why_not = unproved(session, self._tap, self._alone, fused=self._sft)
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

    @contextmanager
    def over(self, micro: MicroBatch) -> Iterator[Mapping[int, Tensor]]:
        """Return the context of a host's loss; what it yields has the sum of the method's divergence afterwards."""
        sums: dict[int, Tensor] = {}
        why = self.why_not or fault_of_hooks(self._tap) or fault_of_batch(micro.batch)
        if why:
            self._tell(why)
            yield sums
            return
        self._session._begin()  # may run the model as it is
        with headless(self._tap, lambda hidden, labels: self._both(hidden, labels, micro, sums), fused=self._sft):
            yield sums

    def _tell(self, why: str) -> None:
        if not self.why_not and why not in self._told:
            self._told.add(why)
            self._session.notes.append(f"Micro-batches that take two passes over the head all the same: {why}.")
            warnings.warn(f"A micro-batch takes two passes over the head: {why}.", stacklevel=2)

    def _alone(self, hidden: Tensor, labels: Tensor) -> Rows:
        return in_one_pass(hidden, labels, self._tap.head())[0]

    def _both(self, hidden: Tensor, labels: Tensor, micro: MicroBatch, sums: dict[int, Tensor]) -> Rows:
        """Compute what the host reads of each position, and the method's sum."""
        task = self._session.take(micro.batch, micro.counts, host_factor=micro.host_factor)
        if hidden.shape != task.hidden.shape or hidden.shape[:-1] != labels.shape:
            raise NotYetSupported(
                f"The head was given hidden states of shape {list(hidden.shape)}, where the backbone returned "
                f"{list(task.hidden.shape)} and labels are {list(labels.shape)}: some positions were left out on the "
                "way. Attach with one_pass=False."
            )
        ratio = self._weight(task) * self._tokens_per_weight(labels, micro)
        method, place = self._method, cast(int, self._place)
        divergence, chunk_rows = method.statistic(), getattr(method, "chunk_rows", None)
        if task.kept_rows is not None and divergence is not None:  # the base need not run
            kept = task.kept_rows(divergence, "completion")
            base_head = cast(Reference, self._session.reference).head(self._tap)
            found = pass_with_kept(task.hidden, labels, task.head, kept, base_head, divergence, ratio, chunk_rows)
            rows, sums[place] = parted(found, labels, ratio)
            return rows
        base = task.reference_hidden, task.reference_head
        rows, sums[place] = in_one_pass(task.hidden, labels, task.head, base, divergence, ratio, chunk_rows)
        return rows

    def _weight(self, task: Outputs) -> float:
        """Return what the method multiplies its sum by, asked of the method itself."""
        total = torch.zeros((), requires_grad=True)
        state = self._session._begin()[cast(int, self._place)]
        with torch.enable_grad(), torch.autocast(task.hidden.device.type, enabled=False):
            loss = self._method.loss(state, replace(task, kept_sum=lambda *_: total))
        (weight,) = torch.autograd.grad(loss, total, allow_unused=True)
        return 0.0 if weight is None else weight.item()

    def _tokens_per_weight(self, labels: Tensor, micro: MicroBatch) -> float:
        """Return 1 / what the host multiplies a token's loss by: its count of tokens, over processes if it says so."""
        trainer = self._trainer
        items = micro.items if self._sft or trainer.model_accepts_loss_kwargs else None
        count = float((labels[:, 1:] != IGNORED).sum() if items is None else items)
        several = trainer.args.average_tokens_across_devices and items is not None
        return (max(count, 1.0) if self._sft else count) / (trainer.accelerator.num_processes if several else 1)


def in_one_pass(
    hidden: Tensor,
    labels: Tensor,
    head: Head,
    base: tuple[Tensor, Head] | None = None,
    divergence: Divergence | None = None,
    ratio: float = 0.0,
    chunk_rows: int | None = None,
) -> tuple[Rows, Tensor]:
    """Return log-probabilities and statistics of every position, and a divergence from a base, summed.

    Args:
        hidden: of the student, [B, T, H].
        labels: [B, T], `IGNORED` where a token is not asked for.
        head: the student's.
        base: the base's hidden states and head; None: no divergence.
        divergence: the member of the family.
        ratio: the weight of the sum over the weight of a token's loss, in what the caller makes of the two.
        chunk_rows: as in `linear_divergence`.
    """
    found = linear_cross_entropy_with_divergence(
        hidden[:, :-1],
        None if base is None else base[0][:, :-1],
        head,
        labels[:, 1:],
        divergence,
        ratio,
        reference_head=None if base is None else base[1],
        chunk_rows=chunk_rows,
        statistics=True,
    )
    return parted(found, labels, ratio)


def parted(found: CrossEntropyWithDivergence, labels: Tensor, ratio: float) -> tuple[Rows, Tensor]:
    """Return what a pass found as its two readers want it: the host by position, the method as a sum."""
    assert found.statistics is not None  # asked for
    values, entropy, top1 = found.statistics
    mask = labels[:, 1:] != IGNORED
    losses, total = _Parts.apply(found.loss, values, found.divergence, mask, ratio)
    return Rows(-losses, entropy, top1, mask), total


class _Parts(torch.autograd.Function):
    """Parts one loss, Σ_t CE_t + ρ Σ_t D_t, into each CE_t and Σ_t D_t for two readers, and their gradients into one.

    Every CE_t must get one and the same gradient c, and Σ_t D_t must get ρ c: then the gradient of the loss is c.
    """

    @staticmethod
    def forward(
        ctx: Any, loss: Tensor, values: Tensor, divergence: Tensor, mask: Tensor, ratio: float
    ) -> tuple[Tensor, Tensor]:
        ctx.ratio = ratio
        ctx.save_for_backward(mask)
        return values.clone(), divergence.clone()

    @staticmethod
    def backward(ctx: Any, of_values: Tensor, of_divergence: Tensor) -> tuple[Tensor | None, ...]:
        of_rows = of_values[ctx.saved_tensors[0]]
        if not len(of_rows):
            return of_divergence.new_zeros(()), None, None, None, None
        scale = of_rows[0]
        apart = torch.stack([(of_rows - scale).abs().amax(), (ctx.ratio * scale - of_divergence).abs()])
        if not bool((apart <= 1e-3 * torch.stack([scale, of_divergence]).abs()).all()):
            raise WrongSetup(
                "The host weighs its tokens otherwise than the pass that computed its loss together with a method's "
                f"supposed: a token by {scale.item():.3g} (and up to {apart[0].item():.2g} more), the method's sum by "
                f"{of_divergence.item():.3g} where {(ctx.ratio * scale).item():.3g} was expected. Something between "
                "compute_loss and backward scales one of the two. Attach with one_pass=False."
            )
        return scale, None, None, None, None
