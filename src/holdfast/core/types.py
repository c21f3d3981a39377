"""What passes between a host, the session and its methods: batches, outputs, weights, steps. Shapes stand in comments.

Letters: B sequences, T tokens of a sequence, N supervised tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import Tensor

from ..functional import named
from ..functional.divergence import Divergence
from ..functional.fisher import Kind, Labels
from ..functional.head import Head
from ..functional.subspace import Reduce, alone
from .distributed import all_reduce_sum, world_size
from .errors import WrongSetup
from .kept_task import CachedRows
from .layers import DenseUpdate, LowRankUpdate

if TYPE_CHECKING:
    from ..functional.packed_fishers import LayerFisher

NamedTensors = dict[str, Tensor]
State = NamedTensors
Auto: TypeAlias = Any
"""The word "auto" as a strength: Any to a type checker, so that it lets hooks multiply, which never see the word."""
Batch = Mapping[str, Tensor]
Positions = Literal["completion", "prompt", "all"]
ReferenceLoss = Literal["likelihood", "chosen_and_rejected", "preference"]
IGNORED = -100


@dataclass(frozen=True)
class Supervision:
    """Which next tokens a batch asks for, and whether each belongs to the completion or to the prompt.

    Attributes:
        targets: token ids to be predicted, [B, T-1].
        completion: where the host's own loss looks, bool [B, T-1].
        prompt: real tokens of the same document where it does not, bool [B, T-1].
    """

    targets: Tensor
    completion: Tensor
    prompt: Tensor

    @classmethod
    def of(cls, batch: Batch) -> Supervision:
        """Read the masks of a batch from `labels` (SFT) or from `completion_mask` (DPO).

        Padding is never supervised, and neither is the first token of a packed document (position 0 again): it does
        not follow from the last token of its neighbour.

        Raises:
            WrongSetup: if the batch has neither, or no `input_ids`.
        """
        if "input_ids" not in batch or not ("labels" in batch or "completion_mask" in batch):
            raise WrongSetup(
                "An output method needs target tokens, but the batch lacks 'input_ids' or has neither 'labels' nor "
                f"'completion_mask' (keys: {', '.join(sorted(batch))}). Pass labels with -100 on unsupervised tokens."
            )
        ids = batch["input_ids"]
        if "labels" in batch:
            completion = batch["labels"][..., 1:] != IGNORED
        else:
            completion = batch["completion_mask"][..., 1:].bool()
        real = torch.ones_like(ids, dtype=torch.bool)
        if (mask := batch.get("attention_mask")) is not None and mask.dim() == 2:
            real = mask.bool()
        follows = real[..., 1:] & real[..., :-1]
        if (positions := batch.get("position_ids")) is not None:
            starts = positions == 0
            follows = follows & ~starts.expand_as(ids)[..., 1:]
        return cls(targets=ids[..., 1:], completion=completion, prompt=follows & ~completion)

    def mask(self, positions: Positions) -> Tensor:
        """Return the boolean mask [B, T-1] of the named positions."""
        if positions == "completion":
            return self.completion
        return self.prompt if positions == "prompt" else self.prompt | self.completion


def sequences(batch: Batch) -> Tensor:
    """Count the sequences of a batch as its host counts examples: rows, the documents of packed rows, or pairs.

    >>> row = torch.tensor([[7, 8, 5, 6, 9]])
    >>> sequences({"input_ids": row, "labels": row, "position_ids": torch.tensor([[0, 1, 0, 1, 2]])})
    tensor(2)
    """
    ids = batch["input_ids"]
    if (positions := batch.get("position_ids")) is not None:
        positions = positions.expand_as(ids)
        starts = (positions[:, :-1] == 0) & (positions[:, 1:] == 1)  # padding may be given position 0 too
        found = starts.sum(1).clamp(min=1).sum()
    else:
        found = torch.tensor(len(ids), device=ids.device)
    return found if "labels" in batch else found // 2  # preferences: chosen rows, then as many rejected ones


@dataclass(frozen=True)
class TokenCounts:
    """How many completion and prompt tokens an optimizer step has, over all micro-batches and processes.

    Attributes:
        completion: where the host's own loss looks.
        prompt: where it does not.
        sequences: of the step; see `sequences`.
        micro_batches: of the step, on this process.
    """

    completion: float
    prompt: float
    sequences: int
    micro_batches: int

    @classmethod
    def of(cls, batches: Iterable[Batch]) -> TokenCounts:
        """Count the supervised tokens of one optimizer step; a collective call when there are several processes."""
        total, micro_batches = torch.zeros(3, dtype=torch.int64), 0
        device = total.device
        for batch in batches:
            micro_batches += 1
            supervision = Supervision.of(batch)
            device = supervision.targets.device
            here = [supervision.completion.sum(), supervision.prompt.sum(), sequences(batch)]
            total = total.to(device) + torch.stack(here)
        if world_size() > 1 and torch.distributed.get_backend() == "nccl" and device.type == "cpu":
            total = total.to(torch.device("cuda", torch.cuda.current_device()))
        completion, prompt, examples = all_reduce_sum(total).tolist()
        return cls(completion, prompt, examples, micro_batches)

    def over(self, positions: Positions) -> float:
        """Return the normaliser of the named positions: the number of their tokens in the whole step."""
        return {"completion": self.completion, "prompt": self.prompt, "all": self.completion + self.prompt}[positions]


KeptSum: TypeAlias = Callable[[Divergence, Positions, "int | None"], Tensor]
"""(divergence, positions, chunk_rows) -> its sum over the tokens there, from what is kept of the base."""


def _unheard(name: str, value: Tensor | float) -> None:
    pass


@dataclass(frozen=True)
class Rows:
    """Supervised rows of one micro-batch, flattened: hidden states of both models and the tokens they predict."""

    hidden: Tensor  # [N, H], carries gradient
    reference_hidden: Tensor  # [N, H]
    targets: Tensor  # [N]


@dataclass(frozen=True)
class Outputs:
    """What an output method sees of one micro-batch.

    The reference runs when a method first asks for it, and once. `per_token(positions)` turns a sum over this
    micro-batch's rows into its share of the mean over the whole optimizer step, with the host's own factors for
    devices and accumulation in it: multiply a token sum by it and nothing else. `kept_sum(divergence, positions,
    chunk_rows)` is there where so much is kept of the base that it need not run: the sum of a method's `statistic()`
    over its rows; `kept_rows(divergence, positions)` is what it is made of, for a host that sums in a pass of its own.
    """

    hidden: Tensor  # [B, T, H]
    head: Head
    supervision: Supervision
    counts: TokenCounts
    host_factor: float
    run_reference: Callable[[], tuple[Tensor, Head]]
    log: Callable[[str, Tensor], None] = _unheard
    kept_sum: KeptSum | None = None
    kept_rows: Callable[[Divergence, Positions], CachedRows] | None = None

    @cached_property
    def _reference(self) -> tuple[Tensor, Head]:
        return self.run_reference()

    @property
    def reference_hidden(self) -> Tensor:
        """Hidden states of the reference on the same batch, [B, T, H], without gradient."""
        return self._reference[0]

    @property
    def reference_head(self) -> Head:
        """The reference's own head: the original one where the student trains a copy."""
        return self._reference[1]

    def rows(self, positions: Positions) -> Rows:
        """Return the supervised rows of the named positions."""
        mask = self.supervision.mask(positions)
        return Rows(self.hidden[:, :-1][mask], self.reference_hidden[:, :-1][mask], self.supervision.targets[mask])

    def per_token(self, positions: Positions) -> float:
        """Return host factor / number of tokens in the step (0 where the step has none)."""
        count = self.counts.over(positions)
        return self.host_factor / count if count else 0.0


@dataclass(frozen=True)
class FisherSpec:
    """How the Fisher of the base model on a retain set is estimated.

    Attributes:
        kind: `kronecker`, `diagonal` (of the Kronecker factors) or `samples`, exact.
        labels: `data`: the responses as they stand (empirical Fisher); `model`: tokens drawn from the model in their
            places.
        rows: at most so many rows of the set, its first ones.
        keep: eigenvectors kept on each side of a layer, or the rank that an example's gradient is kept in.
    """

    kind: Kind = "kronecker"
    labels: Labels = "data"
    rows: int = 256
    keep: int = 64


@dataclass(frozen=True)
class Weights:
    """What a weight method sees: its selected trainable parameters, and the weight updates they form.

    Attributes:
        params: the selected parameters.
        updates: of the layers that they belong to.
        number: of the optimizer step, from 0.
        log: adds a quantity to the step's metrics.
    """

    params: NamedTensors
    updates: Sequence[LowRankUpdate | DenseUpdate] = ()
    number: int = 0
    log: Callable[[str, Tensor | float], None] = field(default=_unheard, repr=False)


@dataclass(frozen=True)
class Step:
    """What a gradient method sees: the direction that the optimizer subtracts, or has subtracted, from the parameters.

    Attributes:
        direction: with `apply_to="gradient"` the accumulated, averaged, unscaled and not yet clipped gradients; with
            `apply_to="update"` what the optimizer's step took off, parameters before minus parameters after.
        params: all selected parameters; those without a gradient are not in `direction`.
        number: of the optimizer step, from 0.
        log: adds a quantity to the step's metrics.
        metric: makes the optimizer's diagonal metric, `apply_to="update"` only (see `core.update.metric`).
        reduce: sums a small tensor over the processes that hold other parts of the parameters (FSDP2).
    """

    direction: NamedTensors
    params: NamedTensors
    number: int
    log: Callable[[str, Tensor | float], None] = field(repr=False)
    metric: Callable[[], NamedTensors] | None = field(default=None, repr=False)
    reduce: Reduce = field(default=alone, repr=False)


@dataclass(frozen=True)
class References:
    """Gradients of the mean losses of k groups of retain batches.

    Attributes:
        rows: [k, P] in float32, columns in the order of the selected parameters (the local part of them under FSDP2).
        losses: mean losses, nats per token or per pair, [k] in float64.
        counts: tokens or pairs, [k] in float64.
    """

    rows: Tensor
    losses: Tensor
    counts: Tensor


@dataclass(frozen=True)
class Setup:
    """What `init` sees: the selected parameters, retain batches, and reference gradients on demand.

    Attributes:
        params: the selected parameters (their local parts under FSDP2).
        updates: the weight updates that they form.
        retain: the next n retain batches, the sets in turn.
        draw: from each retain set, by name, its next batches with at least so many rows (at most the whole set); with
            True its first ones, the same at every call.
        references: one gradient for each group of batches, of its mean loss: `likelihood` (nats per supervised token;
            of a preference pair only the chosen answer), `chosen_and_rejected` (both answers' tokens) or `preference`
            (DPO's loss with the given beta, per pair). Averaged over all processes, in float32, with dropout off;
            `.grad` and the random-number state stay as they were.
        fishers: for each named retain set (all of them, if none is named) the Fisher of each layer of `updates`, at the
            base weights and with a mean eigenvalue of 1; methods that ask for the same share the tensors.
        generator: to draw from.
        step: number of the coming optimizer step.
        previous: the method's state until now; None at the first call.
        reduce: as in `Step`.
    """

    params: NamedTensors
    updates: Sequence[LowRankUpdate | DenseUpdate]
    retain: Callable[[int], list[Batch]]
    draw: Callable[[int, bool], dict[str, list[Batch]]]
    references: Callable[[Sequence[Sequence[Batch]], ReferenceLoss, float], References]
    fishers: Callable[[tuple[str, ...], FisherSpec], dict[str, dict[str, LayerFisher]]]
    generator: torch.Generator
    step: int
    previous: State | None = None
    reduce: Reduce = alone

    def gradients(self, batches: Sequence[Batch]) -> NamedTensors:
        """Return the gradient of the mean next-token loss over batches: one group's likelihood, by name."""
        return named.views(self.references([batches], "likelihood", 0.0).rows[0], self.params)
