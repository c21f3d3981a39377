"""One sequence of a pool, and what is wrong with one. Read next: `pool`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..core.errors import HoldfastError

__all__ = ["KINDS", "Kept", "PoolError", "id_of"]

KINDS = ("text", "chat", "prompts", "noise", "task", "own")
"""Free text, chat that the base invents, answers to built-in prompts, random tokens in the chat format, answers to the
task's prompts, the user's own rows."""


class PoolError(HoldfastError, ValueError):
    """What is wrong with a pool, or with what is to make one, all faults at once."""

    def __init__(self, what: str, faults: Sequence[str] = ()) -> None:
        self.faults = tuple(faults)
        super().__init__(what + "".join(f"\n  - {fault}" for fault in self.faults))


def id_of(input_ids: Iterable[int]) -> str:
    """The name of a sequence, the same for the same tokens.

    >>> id_of([1, 2, 3])
    '7c8f50592903'
    """
    return hashlib.sha256(" ".join(map(str, input_ids)).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Kept:
    """One sequence of a pool.

    Attributes:
        id: `id_of` its tokens.
        kind: one of `KINDS`.
        source: more narrowly: the kind of prompt, the system prompt, the user's file.
        text: the tokens as text, special ones included, for people to read.
        input_ids: what the models see.
        prompt_tokens: how many of them came before what is an answer; 0 for text.
    """

    id: str
    kind: str
    source: str
    text: str
    input_ids: tuple[int, ...]
    prompt_tokens: int
