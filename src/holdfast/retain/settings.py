"""How a pool is made: how many sequences, of which sources, how long, and the seed. Read next: `making`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from typing import Any

from .formats import SYSTEM
from .kept import KINDS, PoolError

__all__ = ["MIX", "Settings", "quotas"]

MIX: Mapping[str, float] = {"text": 0.2, "chat": 0.25, "prompts": 0.25, "noise": 0.3, "task": 0.2, "own": 0.25}
"""Shares of the kinds; those of `task` and `own` count where the caller gives prompts or rows."""


@dataclass(frozen=True)
class Settings:
    """How a pool is made.

    Attributes:
        n: sequences.
        mix: shares by kind, of `KINDS`; they need not add up to one. Empty: `MIX`.
        max_tokens: the longest answer, or text; what the base invents as a user's words may have half of it.
        temperature: of sampling; 1 is the base's own distribution.
        seed: the same gives the same pool on one machine, with the same `batch_size`.
        batch_size: sequences that are sampled at a time.
        systems: system prompts for chat and noise, beside none at all.
        answer_noise: sample whole answers to random tokens; False: their first token, at next to no cost.
        max_length: prompts that are longer are left out, and rows cut.

    Raises:
        PoolError: names every fault at once.
    """

    n: int = 256
    mix: Mapping[str, float] = field(default_factory=dict)
    max_tokens: int = 128
    temperature: float = 1.0
    seed: int = 0
    batch_size: int = 64
    systems: Sequence[str] = SYSTEM
    answer_noise: bool = False
    max_length: int = 1024

    def __post_init__(self) -> None:
        whole = ("n", "max_tokens", "batch_size", "max_length")
        faults = [
            f"{name} must be a whole number of at least 1, got {value!r}"
            for name in whole
            if type(value := getattr(self, name)) is not int or value < 1
        ]
        if not (isinstance(self.temperature, int | float) and 0 < self.temperature < math.inf):
            faults.append(f"temperature must be above 0, got {self.temperature!r}: a pool is sampled")
        if type(self.seed) is not int:
            faults.append(f"seed must be a whole number, got {self.seed!r}")
        for kind, share in self.mix.items():
            if kind not in KINDS:
                close = get_close_matches(kind, KINDS, 1)
                known = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(KINDS)}"
                faults.append(f"mix has no kind {kind!r}; {known}")
            if not (isinstance(share, int | float) and 0 <= share < math.inf):
                faults.append(f"mix: the share of {kind} must be a number of at least 0, got {share!r}")
        if self.mix and not any(share for share in self.mix.values()):
            faults.append("mix: every share is 0, so nothing would be sampled")
        if isinstance(self.systems, str):
            faults.append("systems must be several system prompts, not one text")
        if faults:
            raise PoolError("The pool cannot be made with these settings:", faults)

    def shares(self, available: Iterable[str]) -> dict[str, float]:
        """The shares of the kinds that there is something for: those given, or of `MIX`."""
        mix = self.mix or MIX
        return {kind: mix[kind] for kind in KINDS if mix.get(kind) and kind in set(available)}

    def record(self) -> dict[str, Any]:
        """What a manifest says of them."""
        return {**asdict(self), "mix": dict(self.mix or MIX), "systems": list(self.systems)}


def quotas(n: int, shares: Mapping[str, float]) -> dict[str, int]:
    """How many of n each kind gets: the whole part of its share, and one more for those with the largest rest.

    >>> quotas(8, {"text": 0.5, "chat": 0.3, "noise": 0.2})
    {'text': 4, 'chat': 2, 'noise': 2}
    """
    whole = sum(shares.values())
    exact = {kind: n * share / whole for kind, share in shares.items()}
    found = {kind: int(value) for kind, value in exact.items()}
    rest = sorted(exact, key=lambda kind: found[kind] - exact[kind])
    for kind in rest[: n - sum(found.values())]:
        found[kind] += 1
    return found
