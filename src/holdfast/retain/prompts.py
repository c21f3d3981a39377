"""The built-in prompts: what people ask of a model, of many kinds, written for this project and shipped with it.

They are there to be answered by the base, not to measure anything; none is near one of DriftCheck's (a test says so).
Read next: `sources`.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files

__all__ = ["BuiltIn", "built_in"]


@dataclass(frozen=True)
class BuiltIn:
    """One prompt, and its kind: facts, writing, code, maths, advice, text tasks, languages, talk, refusable."""

    kind: str
    text: str


def built_in() -> tuple[BuiltIn, ...]:
    """All built-in prompts.

    >>> built_in()[0]
    BuiltIn(kind='facts', text='What is the capital of Portugal?')
    """
    kind, found = "", []
    for line in (files("holdfast.retain") / "prompts.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            kind = line.strip("[]")
        elif line and not line.startswith("#"):
            found.append(BuiltIn(kind, line))
    return tuple(found)
