"""What the methods on the task need of the base: for each the statistics of a divergence, or the base's hidden states.

    forward KL, full                       Σ q (log q − log p)          linear in the student's logits: e0, c0
    forward KL, target masked              the same without the target  linear: e0, c0 of what is left
    ... with gamma, exclusion              w of the base alone           linear: e0, c0, w
    full KL with gamma or exclusion; reverse; Jensen-Shannon             not, or not exactly: hidden states

The last line's weights need the log-sum-exp without the target, which the full KL's statistics do not hold; the other
directions need the base's log-probability of every token. Statistics hold for one frozen head without a soft cap, so a
capped, trained or copied head asks for hidden states too. Two methods on the same tokens have an entry each, unless
they ask for the same. Read next: `task_cache`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from ..core.method import OutputMethod
from ..core.types import Positions
from ..functional.divergence import Divergence
from ..functional.head import Head
from .cache_facts import inexact
from .cached_rows import weighted

__all__ = ["Keeping", "Kind", "Kinds", "kinds_of"]


@dataclass(frozen=True)
class Keeping:
    """How the base is kept.

    Attributes:
        folder: where; None: one for this very base, in $HOLDFAST_CACHE or ~/.cache/holdfast.
        dtype: of statistics, float32 or float16; None: float32 (float64 for a model in float64).
        tokenizer: a hash of the tokenizer's, or that there is none.
    """

    folder: Path | None = None
    dtype: torch.dtype | None = None
    tokenizer: str = "not given"


class Kind(NamedTuple):
    """What one method needs of the base: statistics of a divergence, or hidden states (None), at some positions."""

    positions: Positions
    statistics: Divergence | None

    @property
    def name(self) -> str:
        """Of its folder.

        >>> Kind("completion", Divergence()).name, Kind("all", Divergence(gamma=1.0)).name, Kind("prompt", None).name
        ('completion-target', 'all-target-1.0-None', 'prompt-hidden')
        """
        if self.statistics is None:
            return f"{self.positions}-hidden"
        weights = f"-{float(self.statistics.gamma)}-{self.statistics.exclusion}" if weighted(self.statistics) else ""
        return f"{self.positions}-{self.statistics.mask}{weights}"

    @property
    def tensors(self) -> tuple[str, ...]:
        """What is kept of a position, by name."""
        if self.statistics is None:
            return ("values",)
        return ("values", "constants", "weights") if weighted(self.statistics) else ("values", "constants")

    def bytes_a_token(self, width: int, itemsize: int) -> int:
        """Return what a supervised token takes: a vector, and 8 bytes for each of its numbers.

        >>> Kind("completion", Divergence()).bytes_a_token(896, 2)
        1800
        """
        return width * itemsize + 8 * (len(self.tensors) - 1)


class Kinds(NamedTuple):
    """What is kept for some methods."""

    table: dict[tuple[Divergence, Positions], Kind]
    why_not: str  # nothing can be kept, since this is so
    why_hidden: list[str]  # what is kept as hidden states, and why


def kinds_of(methods: Sequence[OutputMethod], student: Head, base: Head) -> Kinds:
    """Return what is kept for methods on the task.

    Args:
        methods: of a session.
        student: its head.
        base: the base's head.
    """
    table: dict[tuple[Divergence, Positions], Kind] = {}
    why_hidden = []
    for method in methods:
        asked, positions = method.statistic(), getattr(method, "positions", None)
        if asked is None or positions is None:
            return Kinds({}, f"{method.name} asks more of the base than the sum of a divergence at known positions", [])
        reasons = inexact(student, base, asked)
        table[asked, positions] = Kind(positions, None if reasons else asked)
        if reasons:
            why_hidden.append(f"{method.name}: {'; '.join(reasons)}")
    return Kinds(table, "", why_hidden)
