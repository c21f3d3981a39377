"""Exact answers: greedy generation, and the answer is right or it is not.

    text:    the whole answer, apart from case, white space and a full stop at its end
    number:  what stands after `####`, or else the last number of the answer (as GSM8K is read)

Rates saturate where probabilities still differ, and a tuned model that explains more, or less, before it answers may
seem to have lost a skill that it has: read the answers that changed. Read next: `holdfast.drift.probe`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from holdfast.drift.entry import JSON
from holdfast.drift.json_lines import read_json_lines
from holdfast.drift.probe import Answer, Found, Probe, ProbeError, Tick, digest_of
from holdfast.drift.score import Score

if TYPE_CHECKING:
    from holdfast.drift.models import Models

__all__ = ["ExactAnswer", "Match", "Question"]

Match = Literal["text", "number"]
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")


@dataclass(frozen=True)
class Question:
    """What is asked, the right answer, and what it is about."""

    prompt: str
    answer: str
    category: str = ""


class ExactAnswer(Probe):
    """The share of questions whose greedy answer is exactly right.

    Args:
        name: of the questions, as in `exact_answer.name`.
        questions: sorted by their text, so that their order does not matter.
        match: how answers are read; see the module. None: `number` if every right answer has `####` or is a number.
        max_new_tokens: where answers are cut off.

    Raises:
        ProbeError: names every question that is empty, given twice, or has no number to compare.
    """

    note = "An answer that is right in other words counts as wrong; so does one that was cut off before it came."

    def __init__(
        self, name: str, questions: Iterable[Question], match: Match | None = None, max_new_tokens: int = 64
    ) -> None:
        self.of, self.name, self.max_new_tokens = name, f"exact_answer.{name}", max_new_tokens
        self.questions = sorted(questions, key=lambda question: (question.prompt, question.answer))
        faults = [] if self.questions else ["there are no questions"]
        faults += [f"{q!r:.80} has an empty prompt or answer" for q in self.questions if not (q.prompt and q.answer)]
        pairs = zip(self.questions, self.questions[1:], strict=False)
        faults += [f"{one.prompt!r:.60} is asked twice" for one, two in pairs if one.prompt == two.prompt]
        if match not in (None, *get_args(Match)):
            faults.append(f"match must be one of {', '.join(get_args(Match))}, got {match!r}")
        told = all("####" in q.answer or _is_number(q.answer) for q in self.questions)
        self.match: Match = match or ("number" if told else "text")
        if self.match == "number":
            faults += [f"{q.answer!r:.60} has no number" for q in self.questions if _number(q.answer) is None]
        if faults:
            raise ProbeError(f"The questions of {name!r} cannot be asked:", faults)

    @classmethod
    def read(
        cls, path: str | Path, name: str = "", match: Match | None = None, max_new_tokens: int = 256,
        limit: int | None = None,
    ) -> ExactAnswer:  # fmt: skip
        """Read questions, or the first few, from JSON lines: `prompt` (or `question`), `answer`, optional `category`.

        Raises:
            ProbeError: names every line that cannot be used.
        """
        faults, found = list[str](), list[Question]()
        for number, row in read_json_lines(path, limit):
            try:
                found.append(_question(row))
            except ValueError as error:
                faults.append(f"line {number}: {error}")
        if faults:
            raise ProbeError(f"{path} cannot be used; correct these lines:", faults)
        return cls(name or Path(path).stem, found, match, max_new_tokens)

    @property
    def size(self) -> int:
        """One answer for each question."""
        return len(self.questions)

    @property
    def identity(self) -> Mapping[str, JSON]:
        """Questions, how they are read, and the length of answers."""
        questions = digest_of([list(asdict(question).values()) for question in self.questions])
        return {"questions": questions, "match": self.match, "max_new_tokens": self.max_new_tokens}

    def measure(self, models: Models, side: str, tick: Tick) -> Found:
        """Ask and compare."""
        replies = models.ask([question.prompt for question in self.questions], side, self.max_new_tokens, tick)
        right = [self.is_right(q.answer, reply.text) for q, reply in zip(self.questions, replies, strict=True)]
        instrument = f"exact {self.match}, {self.max_new_tokens} tokens, on {self.of} {self.identity['questions']}"
        grouped = any(question.category for question in self.questions)
        items = tuple(map(float, right))
        score = Score(
            math.fsum(items) / len(items),
            items=items,
            categories=tuple(question.category for question in self.questions) if grouped else None,
            instrument=instrument,
        )
        verdicts = ["right" if ok else "wrong" for ok in right]
        answers = tuple(
            Answer(digest_of(q.prompt), q.prompt, reply.text, verdict, q.answer, q.category, instrument)
            for q, reply, verdict in zip(self.questions, replies, verdicts, strict=True)
        )
        return Found({self.name: score}, answers)

    def is_right(self, expected: str, said: str) -> bool:
        """Whether an answer is the expected one.

        >>> ask = ExactAnswer("sums", [Question("2 + 2?", "4")])
        >>> ask.match, ask.is_right("4", "2 + 2 is 4."), ask.is_right("4", "4, or 5")
        ('number', True, False)
        """
        if self.match == "number":
            return _number(expected) == _number(said)
        return _plain(expected) == _plain(said)


def _question(row: object) -> Question:
    if not isinstance(row, Mapping):
        raise ValueError(f"not a JSON object but {row!r:.60}")
    texts = {"prompt": row.get("prompt", row.get("question")), "answer": row.get("answer")}
    texts |= {"category": row["category"]} if "category" in row else {}
    if faults := [
        f"{key} must be a text, got {value!r:.40}" for key, value in texts.items() if not isinstance(value, str)
    ]:
        raise ValueError("; ".join(faults))
    return Question(**texts)


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).removesuffix(".")


def _number(text: str) -> float | None:
    """The number after `####`, or the last one."""
    _, marked, after = text.rpartition("####")
    found = NUMBER.findall(after if marked else text)
    return float((found[0] if marked else found[-1]).replace(",", "")) if found else None


def _is_number(text: str) -> bool:
    return NUMBER.fullmatch(text.strip()) is not None
