"""Runs the base on a pool once and writes down what the cache keeps of it.

Sequences run in batches of like lengths, padded on the right; what comes of each goes to its place in the file, so
neither the pool's hidden states nor its statistics are ever in memory together. Read next: `cache_file`.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from ..core.errors import WrongSetup
from ..core.reference import Reference
from ..core.stream import padded
from ..core.tap import Call, Tap
from ..functional.divergence import Divergence
from . import cache_facts
from .cache_file import Facts, Writer, size
from .cached_rows import hidden_rows, statistics_rows, weighted

__all__ = ["Plan", "autocast_of", "check_room", "write"]

LEFT = 5_000_000_000  # bytes of a disk that a cache leaves free, or a twentieth of a smaller disk


class Plan:
    """What will be kept of the base, and the facts that it depends on.

    Args:
        tap: on the student's model.
        reference: the frozen base.
        sequences: token ids, at least one sequence, each of two tokens or more.
        statistics_of: the KL whose statistics are kept; None keeps hidden states.
        dtype: of the statistics.

    Attributes:
        layout: dtype and shape of every tensor of the file.
        facts: what it depends on.
    """

    def __init__(
        self,
        tap: Tap,
        reference: Reference,
        sequences: Sequence[Tensor],
        statistics_of: Divergence | None,
        dtype: torch.dtype,
    ) -> None:
        self.tap, self.reference, self.sequences, self.statistics_of = tap, reference, sequences, statistics_of
        self.head = reference.head(tap)
        first = self.hidden(sequences[:1])
        self.dtype = dtype if statistics_of else first.dtype
        positions = sum(len(ids) - 1 for ids in sequences)
        self.layout: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "values": (self.dtype, (positions, first.shape[-1])),
            "ids": (torch.int32, (positions + len(sequences),)),
            "starts": (torch.int64, (len(sequences) + 1,)),
        }
        if statistics_of:
            self.layout["constants"] = (torch.float64, (positions,))
            if weighted(statistics_of):
                self.layout["weights"] = (torch.float64, (positions,))
        self.facts: Facts = {
            "format": cache_facts.FORMAT,
            "kept": "statistics" if statistics_of else "hidden",
            "mask": statistics_of.mask if statistics_of else "any",
            "dtype": str(self.dtype).removeprefix("torch."),
            "autocast": cache_facts.autocast(autocast_of(first.device)),
            **(cache_facts.weight(statistics_of) if statistics_of else {}),
            **cache_facts.of_tokens(sequences),
            **cache_facts.of_base(tap, reference),
        }

    def describe(self) -> str:
        """Say what is kept, and how large it is."""
        positions = self.layout["values"][1][0]
        kept = "statistics of the base" if self.statistics_of else "hidden states of the base"
        return (
            f"{kept} in {self.facts['dtype']} at {positions:,} positions of {len(self.sequences):,} sequences, "
            f"{size(self.layout) / 1e6:,.1f} MB, {size(self.layout) / positions:,.0f} bytes a position"
        )

    def hidden(self, sequences: Sequence[Tensor]) -> Tensor:
        """Return the base's last hidden states on sequences, padded on the right."""
        device = self.head.weight.device
        inputs = self.tap.inputs(padded(sequences, device))
        return self.reference.hidden(self.tap, Call(torch.empty(0), (), inputs, autocast_of(device)))

    def rows(self, hidden: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return what is kept of positions, by the name of its tensor.

        Raises:
            WrongSetup: for statistics that float16 cannot hold.
        """
        if not self.statistics_of:
            return {"values": hidden_rows(hidden, targets).values}
        kept = statistics_rows(hidden, self.head, targets, self.statistics_of, self.dtype)
        if kept.values.dtype != self.dtype:
            raise WrongSetup("The head's mean weights do not fit float16: keep them in float32 (dtype=torch.float32).")
        return {
            name: tensor
            for name, tensor in (("values", kept.values), ("constants", kept.constants), ("weights", kept.weights))
            if tensor is not None
        }


def autocast_of(device: torch.device) -> tuple[str, torch.dtype, bool]:
    """Return the precision that is in force on a device, as `Call.autocast` has it."""
    return device.type, torch.get_autocast_dtype(device.type), torch.is_autocast_enabled(device.type)


def write(file: Path, plan: Plan, batch_size: int) -> None:
    """Run the base on all sequences and keep what the plan says.

    Raises:
        WrongSetup: if the disk has no room for it.
    """
    starts = list(accumulate((len(ids) for ids in plan.sequences), initial=0))
    by_length = sorted(range(len(plan.sequences)), key=lambda number: len(plan.sequences[number]))
    check_room(file.parent, size(plan.layout))
    with Writer(file, plan.layout, plan.facts) as writer:
        writer.put("starts", 0, torch.tensor(starts))
        writer.put("ids", 0, torch.cat(list(plan.sequences)).to(torch.int32))
        for at in range(0, len(by_length), batch_size):
            numbers = by_length[at : at + batch_size]
            hidden = plan.hidden([plan.sequences[number] for number in numbers])
            for number, states in zip(numbers, hidden, strict=True):
                ids, row = plan.sequences[number].to(states.device), starts[number] - number
                for name, tensor in plan.rows(states[: len(ids) - 1], ids[1:]).items():
                    writer.put(name, row, tensor)


def check_room(folder: Path, needed: int) -> None:
    """Raise if a disk has no room for so many bytes, with some left for what else a run writes.

    Raises:
        WrongSetup: then; the message says what there is.
    """
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    total, _, free = shutil.disk_usage(there)
    left = min(LEFT, total // 20)
    if free < needed + left:
        raise WrongSetup(
            f"The reference cache takes {needed / 1e9:.1f} GB, and {there} has {free / 1e9:.1f} GB left, of which "
            f"{left / 1e9:.1f} GB stay free for checkpoints. Make room, set HOLDFAST_CACHE to another folder, or run "
            "the base in every step: cache=False."
        )
