"""Reference gradients: what a few retain batches say about the weights as they are, without a trace on the run.

By `autograd.grad` on the bare module: `.grad` is not touched, no reduce hook fires, dropout is off, random-number state
and training modes are restored. Groups of batches are shared out over the processes and their gradients summed once,
weighted by tokens, so that neither the world size nor the height of a batch changes them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from ..functional import named
from ..functional.head import Head
from ..functional.linear_divergence import linear_cross_entropy
from .distributed import all_reduce_sum, is_sharded, local, rank, world_size
from .errors import WrongSetup
from .packing import passes
from .reference import Reference
from .tap import Tap, evaluation
from .types import Batch, NamedTensors, ReferenceLoss, References, Supervision


class Gradients:
    """Takes reference gradients of one model.

    Args:
        model: the bare model.
        tap: the model's.
        reference: the frozen base; only the preference loss needs it.
    """

    def __init__(self, model: nn.Module, tap: Tap, reference: Reference | None) -> None:
        self.model, self.tap, self.reference = model, tap, reference
        self._sharded = any(is_sharded(p) for p in model.parameters())
        # the base's log-probabilities of a batch: it is frozen, so once; with the batch, since an id may be used again
        self._of_base: dict[int, tuple[Batch, Tensor]] = {}

    def forget(self) -> None:
        """Drop what is remembered of the base, which is another one after `Reference.load`."""
        self._of_base.clear()

    def __call__(
        self, params: NamedTensors, groups: Sequence[Sequence[Batch]], loss: ReferenceLoss, beta: float
    ) -> References:
        """Return one gradient for each group of batches, of the group's mean loss; see `Setup.references`."""
        device = next(iter(params.values())).device
        size = sum(local(p).numel() for p in params.values())
        rows = torch.zeros(len(groups), size, device=device)
        sums = torch.zeros(2, len(groups), dtype=torch.float64, device=device)  # losses, counts
        if loss == "likelihood":
            groups = [[chosen(batch) if is_preference(batch) else batch for batch in group] for group in groups]
        jobs = [(number, batch) for number, group in enumerate(groups) for batch in group]
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), evaluation(self.model):
            if self._sharded:
                self._in_step(params, jobs, rows, sums)
            else:
                mine = jobs[rank() :: world_size()]
                for number, batch in passes(mine) if loss == "likelihood" else mine:
                    sums[:, number] += _by_autograd(params, partial(self._loss, batch, loss, beta), rows[number])
        sums = all_reduce_sum(sums)
        rows = rows if self._sharded else all_reduce_sum(rows)
        return References(rows / sums[1].clamp(min=1).float()[:, None], sums[0] / sums[1].clamp(min=1), sums[1])

    def _in_step(self, params: NamedTensors, jobs: Sequence[tuple[int, Batch]], rows: Tensor, sums: Tensor) -> None:
        """FSDP2 gathers weights in every forward, so all processes work on one batch, each on some of its rows."""
        for number, batch in jobs:
            mine, weight = _own_rows(batch)
            sums[:, number] += self._by_backward(params, partial(self._likelihood, mine), rows[number], weight)

    def _by_backward(self, params: NamedTensors, loss: Callable[[], Tensor], row: Tensor, weight: float) -> Tensor:
        """Add to a row through `.grad`, the one place where FSDP2 puts gradients, and leave `.grad` as it was."""
        kept = {name: p.grad for name, p in self.model.named_parameters()}
        for p in self.model.parameters():
            p.grad = None
        sums = weight * loss()
        (sums[0] * world_size()).backward()  # type: ignore[no-untyped-call] # FSDP2 averages over processes
        for name, total in named.views(row, {name: local(p) for name, p in params.items()}).items():
            gradient = params[name].grad
            if gradient is not None:
                total.add_(local(gradient))
        for name, p in self.model.named_parameters():
            p.grad = kept[name]
        return sums.detach()

    # --- losses: [a sum over tokens or pairs, their number] -------------------------------------------------------

    def _loss(self, batch: Batch, loss: ReferenceLoss, beta: float) -> Tensor:
        if loss != "likelihood" and not is_preference(batch):
            raise WrongSetup(
                f"references={loss!r} reads preferences, and the retain data has none. Give rows with 'chosen' and "
                "'rejected', or use references='likelihood'."
            )
        return self._preference(batch, beta) if loss == "preference" else self._likelihood(batch)

    def _likelihood(self, batch: Batch) -> Tensor:
        supervision = Supervision.of(batch)
        mask = supervision.completion
        if self._sharded:  # FSDP2 gathers weights where the model runs as a whole
            logits = self.model(**self.tap.inputs(batch)).logits[:, :-1][mask]
            loss = torch.nn.functional.cross_entropy(logits.float(), supervision.targets[mask], reduction="sum")
        else:
            hidden = self.tap.run((), self.tap.inputs(batch)).hidden[:, :-1][mask]
            loss = linear_cross_entropy(hidden, self.tap.head(), supervision.targets[mask])
        return torch.stack([loss.double(), mask.sum().double()])

    def _preference(self, batch: Batch, beta: float) -> Tensor:
        """DPO's loss on pairs: -log σ(β · (margin of the student - margin of the base))."""
        if self.reference is None:
            raise WrongSetup("references='preference' needs a reference, and the session has none.")
        if self._sharded:
            raise WrongSetup("references='preference' is untested under FSDP2: use references='likelihood'.")
        call = self.tap.run((), self.tap.inputs(batch))
        if id(batch) not in self._of_base:
            with torch.no_grad():
                hidden, head = self.reference.hidden(self.tap, call), self.reference.head(self.tap)
                self._of_base[id(batch)] = batch, _log_probabilities(hidden, head, batch)
        gain = _log_probabilities(call.hidden, self.tap.head(), batch) - self._of_base[id(batch)][1]
        chosen, rejected = gain.chunk(2)
        loss = -torch.nn.functional.logsigmoid(beta * (chosen - rejected))
        return torch.stack([loss.sum().double(), torch.full_like(loss[0], len(loss)).double()])


def _by_autograd(params: NamedTensors, loss: Callable[[], Tensor], row: Tensor) -> Tensor:
    """Add the gradient of a sum to a row of [k, P]; return [the sum, the number of its terms]."""
    with torch.enable_grad():
        sums = loss()
        gradients = torch.autograd.grad(sums[0], list(params.values()), allow_unused=True)
    for total, gradient in zip(named.views(row, params).values(), gradients, strict=True):
        if gradient is not None:
            total.add_(gradient)
    return sums.detach()


def _own_rows(batch: Batch) -> tuple[Batch, float]:
    """Return this process's rows and their weight: 0 where there are fewer rows than processes, and one runs along."""
    mine = {key: value[rank() :: world_size()] for key, value in batch.items()}
    return (mine, 1.0) if len(mine["input_ids"]) else (batch, 0.0)


def is_preference(batch: Batch) -> bool:
    """Return whether a batch holds pairs: TRL's layout, chosen rows first and as many rejected rows after them."""
    return "completion_mask" in batch and "labels" not in batch


def chosen(batch: Batch) -> Batch:
    """Return the rows of a batch of pairs that hold the chosen answers."""
    half = len(batch["input_ids"]) // 2
    return {key: value[:half] for key, value in batch.items()}


def _log_probabilities(hidden: Tensor, head: Head, batch: Batch) -> Tensor:
    """Return the log-probability of each row's completion, [2B] in float32."""
    supervision = Supervision.of(batch)
    rows = zip(hidden[:, :-1], supervision.targets, supervision.completion, strict=True)
    return torch.stack([-linear_cross_entropy(h[mask], head, targets[mask]) for h, targets, mask in rows])
