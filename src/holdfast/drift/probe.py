"""A probe is one measurement: it asks one side of a comparison, and says what it found, item by item in one order.

    probe.measure(models, "base", tick) -> Found          the same items, the same order, for every side

A new measurement is one file in `probes/` with one class. What it returns for the base and for a tuned model is
compared pair by pair, so a probe must give the same items for both, and must not depend on the order of its rows or on
how many are done at a time. Standard library only. Read next: `holdfast.drift.models`, what a probe may ask.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from holdfast.drift.entry import JSON
from holdfast.drift.score import Score

if TYPE_CHECKING:
    from holdfast.drift.models import Models

__all__ = ["BASE", "Answer", "Found", "Probe", "ProbeError", "Tick", "digest_of"]

BASE = "base"
"""The side before tuning."""
Tick: TypeAlias = Callable[[int], None]
"""Called with the number of items that were just finished, for a progress bar."""


class ProbeError(ValueError):
    """What is wrong with what a probe is to measure, all faults at once."""

    def __init__(self, what: str, faults: Sequence[str] = ()) -> None:
        self.faults = tuple(faults)
        super().__init__(what + "".join(f"\n  - {fault}" for fault in self.faults))


@dataclass(frozen=True)
class Answer:
    """One answer of one side, for people to read beside the other side's.

    Attributes:
        id: of the item; the same for every side.
        prompt: what was asked, without template.
        text: what was answered.
        verdict: what was made of it: a label of `holdfast.drift.refusal`, or `right` and `wrong`.
        expected: what a good answer is: `refuse`, `comply`, or the answer itself.
        category: what it is about.
        instrument: what gave the verdict, with its version.
        why: the instrument's reason, if it has one.
    """

    id: str
    prompt: str
    text: str
    verdict: str
    expected: str = ""
    category: str = ""
    instrument: str = ""
    why: str = ""


@dataclass(frozen=True)
class Found:
    """What a probe found on one side: scores by name, and answers to read."""

    scores: Mapping[str, Score]
    answers: tuple[Answer, ...] = field(default=())

    def to_record(self) -> dict[str, object]:
        """As JSON's own types."""
        return {
            "scores": {name: score.to_record() for name, score in self.scores.items()},
            "answers": [asdict(answer) for answer in self.answers],
        }

    @classmethod
    def from_record(cls, record: Mapping[str, object]) -> Found:
        """The inverse of `to_record`.

        >>> found = Found({"refusal": Score(1.0, items=(1,))}, (Answer("a", "Who?", "Me.", "compliance"),))
        >>> Found.from_record(json.loads(json.dumps(found.to_record()))) == found
        True
        """
        scores, answers = record["scores"], record["answers"]
        if not isinstance(scores, Mapping) or not isinstance(answers, list):
            raise ProbeError(f"This is not what a probe found: {record!r:.80}")
        return cls(
            {name: Score.from_record(score) for name, score in scores.items()},
            tuple(Answer(**answer) for answer in answers),
        )


class Probe(ABC):
    """One measurement over fixed items.

    Attributes:
        name: what the ledger and the command line call it; unique among the probes of one run.
        note: what a reader must know about this measurement and its limits, in a sentence or two, for the report.
    """

    name: str
    note: str = ""

    @abstractmethod
    def measure(self, models: Models, side: str, tick: Tick) -> Found:
        """Measure one side, with the same items in the same order for every side.

        Args:
            models: what answers; `models.on(side)` is the context in which it does.
            side: `BASE` or the name of a tuned model.
            tick: to be called as items are finished; `size` in all.
        """

    def unfit(self, models: Models) -> str:
        """Why this probe would say nothing of these models, to be told in its place; empty if it is fit."""
        return ""

    @property
    @abstractmethod
    def size(self) -> int:
        """How many items there are for one side."""

    @property
    @abstractmethod
    def identity(self) -> Mapping[str, JSON]:
        """All that could change a score, models apart: a finished measurement is used again only under the same."""


def digest_of(value: JSON) -> str:
    """A short digest of a value that JSON can hold: names items and settings in an instrument.

    >>> digest_of(["What is 2 + 2?"])
    '643b33561b99'
    """
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:12]
