"""Retain sequences that no method ever sees, and how far the student has drifted from the base on them.

    drift = (1/N) Σ_t KL(base_t || student_t)      over the N next tokens of all held-out sequences, in nats a token

Exact over the whole vocabulary, in evaluation mode, in the weights' own precision and without gradients; nothing is
drawn, so measuring changes nothing in a run. Each process measures its share. What the base says of the sequences is
kept in host memory after the first time. A user may measure something else (`drift_by`).

Read next: `budget`, which holds a drift below a budget.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..functional.divergence import Divergence
from ..functional.linear_divergence import linear_divergence
from .distributed import all_reduce_sum, gather, rank, world_size
from .errors import WrongSetup
from .gradients import is_preference
from .reference import Reference
from .retain import sequences_of
from .stream import digest, padded
from .tap import Tap, evaluation
from .types import Batch

SEQUENCES = 32  # about so many are held out, where there are enough
LARGEST_SHARE = 4  # one row in so many at most, where there are few
ROWS = 8  # of a pass
FULL_KL = Divergence(mask="none")
Measure = Callable[[nn.Module], float]
"""Says how far a model has drifted, in a unit of its own: 0 is not at all, and what is below counts as 0."""


def drift_by(measure: Measure, model: nn.Module) -> float:
    """Return what a user's measure says of the model: in evaluation mode, without gradients, leaving no trace.

    All processes must call it; they get the mean of what it says in each, so they go on alike.

    >>> drift_by(lambda model: len(model.weight) - 1.5, nn.Linear(1, 4)), drift_by(lambda model: -1.0, nn.Linear(1, 4))
    (2.5, 0.0)
    """
    device = next(model.parameters()).device
    with torch.no_grad(), evaluation(model), torch.random.fork_rng([device] if device.type == "cuda" else []):
        found = torch.tensor(float(measure(model)), dtype=torch.float64, device=device)
    return max(all_reduce_sum(found).item() / world_size(), 0.0)


def hold_out(
    sets: Mapping[str, Sequence[Batch]], names: Collection[str] = ()
) -> tuple[dict[str, list[Batch]], list[Tensor]]:
    """Part the retain data into what methods may use, set by set, and sequences that are only measured.

    Every k-th row of a set is held out, the same ones in every run; of a preference pair its chosen answer.

    Args:
        sets: batches by name of their set.
        names: of the sets to hold out from; the others stay whole. Empty, or none of them there: from all.

    Raises:
        WrongSetup: if there are too few rows to hold any out.

    >>> rows = {"text": [{"input_ids": torch.arange(24).view(8, 3)}]}
    >>> rest, held = hold_out(rows)
    >>> [ids.tolist() for ids in held], len(rest["text"][0]["input_ids"])
    ([[9, 10, 11], [21, 22, 23]], 6)
    """
    kept = [name for name in sets if name in names] or list(sets)
    total = sum(_rows(batch) for name in kept for batch in sets[name])
    apart = max(LARGEST_SHARE, total // SEQUENCES)
    rest = {name: list(batches) for name, batches in sets.items()}
    held: list[Tensor] = []
    for name in kept:
        rest[name], place = [], 0
        for batch in sets[name]:
            numbers = range(_rows(batch))
            own = [row for row in numbers if (place + row) % apart == apart - 1]
            others = [row for row in numbers if row not in own]
            place += len(numbers)
            if own:
                held += sequences_of(_only(batch, own))
            if others:
                rest[name].append(_only(batch, others) if own else batch)
    if len(held) < 2:
        raise WrongSetup(
            f"strength='auto' measures drift on retain sequences that nothing trains on, one row in {LARGEST_SHARE}, "
            f"and {total} retain rows leave {len(held)}. Give at least {2 * LARGEST_SHARE} rows in a set, better "
            f"{SEQUENCES * LARGEST_SHARE} or more; or a fixed strength."
        )
    return rest, held


class HeldOut:
    """Measures the student's drift on held-out sequences.

    Args:
        sequences: token ids, the same on every process.
        tap: the student's.
        reference: the frozen base.

    Attributes:
        sequences: as given.
        tokens: how many of theirs are predicted.
        digest: of the sequences in their order: a run that is resumed must have the same.

    Raises:
        WrongSetup: if the processes have different sequences.
    """

    def __init__(self, sequences: Sequence[Tensor], tap: Tap, reference: Reference) -> None:
        self.sequences, self.tokens = list(sequences), sum(len(ids) - 1 for ids in sequences)
        self.digest = digest(self.sequences)
        if len(set(gather(self.digest))) > 1:
            raise WrongSetup(
                "The processes have different retain sequences to measure drift on, so each would find a strength of "
                "its own. Give all of them the same rows: retain=..."
            )
        own = sorted(sequences[rank() :: world_size()], key=len)
        self._parts = [own[start : start + ROWS] for start in range(0, len(own), ROWS)]
        self._tap, self._reference = tap, reference
        self._base: list[Tensor] = []  # hidden states of each part, once they are known

    def resume(self, measured: str | None) -> None:
        """Go on with the sequences of a run that was saved; the base was loaded anew, so what was kept of it is not it.

        Args:
            measured: `digest` of that run; None: it is not known.

        Raises:
            WrongSetup: if those were others.
        """
        if measured not in (None, self.digest):
            raise WrongSetup(
                "The run measured its drift on other retain sequences than are held out now, so its budget would mean "
                "something else from here on. Give it the same retain rows or the same pool."
            )
        self._base = []

    def describe(self) -> str:
        """Return what is measured, as `explain()` shows it."""
        return (
            f"drift measured, KL(base || student) on {len(self.sequences)} retain sequences, held out "
            f"({self.tokens:,} tokens, evaluation mode, no gradient; base: {self._reference.description})"
        )

    @torch.no_grad()
    def drift(self) -> float:
        """Return the drift of the weights as they are, the same on every process, which all must call it."""
        device = next(self._tap.model.parameters()).device
        total = torch.zeros((), dtype=torch.float64, device=device)
        with evaluation(self._tap.model), torch.autocast(device.type, enabled=False):
            for number, part in enumerate(self._parts):
                total += self._sum(number, padded(part, device))
        return all_reduce_sum(total).item() / self.tokens

    def _sum(self, number: int, batch: Batch) -> Tensor:
        """Return the KL summed over the tokens of a part."""
        call, real = self._tap.run((), self._tap.inputs(batch)), batch["attention_mask"][:, 1:].bool()
        if len(self._base) == number:
            self._base.append(self._reference.hidden(self._tap, call)[:, :-1][real].cpu())
        return linear_divergence(
            call.hidden[:, :-1][real],
            self._base[number].to(call.hidden.device),
            self._tap.head(),
            batch["input_ids"][:, 1:][real],
            FULL_KL,
            reference_head=self._reference.head(self._tap),
        )


def _rows(batch: Batch) -> int:
    return len(batch["input_ids"]) // (2 if is_preference(batch) else 1)


def _only(batch: Batch, rows: Sequence[int]) -> Batch:
    """Return the batch of these rows, or pairs; what is the same for all rows stays as it is."""
    count = len(batch["input_ids"])
    places = [*rows, *(count // 2 + row for row in rows)] if is_preference(batch) else list(rows)
    return {key: value[places] if value.dim() and len(value) == count else value for key, value in batch.items()}
