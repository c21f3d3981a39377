"""Multiple choice: the choice that the model finds likeliest a token, right or wrong, without generation.

    chosen = argmax over choices of  1/T Σ_t log p(choice_t | question, choice_<t)

The choices are not listed in the question, so no letter has to be followed (HellaSwag and ARC are scored so). Dividing
by the number of tokens keeps long choices from losing for their length. Read next: `holdfast.drift.scoring`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from holdfast.drift.entry import JSON
from holdfast.drift.json_lines import read_json_lines
from holdfast.drift.probe import Answer, Found, Probe, ProbeError, Tick, digest_of
from holdfast.drift.score import Score
from holdfast.drift.scoring import VERSION, Row, answer_ids, log_probabilities, paced

if TYPE_CHECKING:
    from holdfast.drift.models import Models

__all__ = ["MultipleChoice"]

KEYS = ("question", "choices", "answer", "category", "id")


@dataclass(frozen=True)
class _Item:
    id: str
    question: str
    choices: tuple[str, ...]
    answer: int
    category: str


class MultipleChoice(Probe):
    """The share of questions whose right choice is the likeliest a token.

    Args:
        name: of the questions, as in `multiple_choice.name`.
        rows: each with `question`, `choices` (at least two different texts), `answer` (its place from 0, its letter
            from A, or its text), and optional `category` and `id`; sorted by id, so that their order does not matter.
            Longer questions than the model can read lose their beginning.

    Raises:
        ProbeError: names every row that cannot be used; when measuring, every question whose choices the tokenizer
            writes alike or without tokens.
    """

    note = (
        "Accuracy of the choice with the highest mean log-probability a token after the question alone. A model may "
        "know the answer and not find its wording likely; the change between sides says more than the level."
    )

    def __init__(self, name: str, rows: Iterable[Mapping[str, object]]) -> None:
        self._take(name, enumerate(rows, 1), "row")

    @classmethod
    def read(cls, path: str | Path, name: str = "", limit: int | None = None) -> MultipleChoice:
        """Read questions, or the first few, from a UTF-8 file of JSON lines; named after the file without a name.

        Raises:
            ProbeError: names every line that cannot be used.
        """
        rows = read_json_lines(path, limit)
        probe = cls.__new__(cls)
        probe._take(name or Path(path).stem, rows, "line")
        return probe

    def _take(self, name: str, rows: Iterable[tuple[int, object]], unit: str) -> None:
        """Check and keep the rows, or raise with all faults."""
        faults: list[str] = []
        items: dict[str, tuple[int, _Item]] = {}
        for number, row in rows:
            found = list(_faults(row))
            if not found and isinstance(row, Mapping):
                item = _item(row)
                first, _ = items.setdefault(item.id, (number, item))
                if first != number:
                    found.append(f"its id {item.id!r:.40} is also that of {unit} {first} (no id: same text)")
            faults += [f"{unit} {number}: {fault}" for fault in found]
        if not isinstance(name, str) or not name.strip():
            faults.append(f"the questions need a name, got {name!r:.40}")
        if not items and not faults:
            faults.append("there are no questions")
        if faults:
            raise ProbeError(f"The questions of {name!r} cannot be asked; correct these {unit}s:", faults)
        self.of, self.name = name, f"multiple_choice.{name}"
        self.items = [item for _, (_, item) in sorted(items.items())]

    @property
    def size(self) -> int:
        """One choice for each question."""
        return len(self.items)

    @property
    def identity(self) -> Mapping[str, JSON]:
        """Questions, and how choices are scored."""
        return {"questions": digest_of([list(asdict(item).values()) for item in self.items]), "scoring": VERSION}

    def measure(self, models: Models, side: str, tick: Tick) -> Found:
        """Score every choice, and compare the likeliest with the right one."""
        written = [[answer_ids(models, item.question, choice) for choice in item.choices] for item in self.items]
        if faults := [
            f"{item.question!r:.60}: {', '.join(map(repr, item.choices)):.80}"
            for item, choices in zip(self.items, written, strict=True)
            if len({tuple(ids) for _, ids in choices}) < len(choices) or not all(ids for _, ids in choices)
        ]:
            raise ProbeError("The tokenizer writes some choices alike, or without tokens: none can be chosen:", faults)
        rows = [Row.answer(*one) for choices in written for one in choices]
        scored = iter(log_probabilities(models, side, rows, done=paced(tick, self.size, len(rows))))
        chosen = []
        for item in self.items:
            means = [fmean(next(scored)) for _ in item.choices]
            chosen.append(means.index(max(means)))
        return self._found(chosen)

    def _found(self, chosen: list[int]) -> Found:
        items = tuple(float(choice == item.answer) for choice, item in zip(chosen, self.items, strict=True))
        instrument = f"likeliest choice a token on {self.of}, {self.size} questions {self.identity['questions']}"
        categories = tuple(item.category for item in self.items)
        score = Score(
            fmean(items), items=items, categories=categories if any(categories) else None, instrument=instrument
        )
        answers = tuple(
            Answer(
                item.id,
                item.question,
                item.choices[choice],
                "right" if right else "wrong",
                item.choices[item.answer],
                item.category,
                instrument,
            )
            for item, choice, right in zip(self.items, chosen, items, strict=True)
        )
        return Found({self.name: score}, answers)


def _faults(row: object) -> Iterator[str]:
    """What is wrong with one row by itself."""
    if isinstance(row, Exception):
        yield f"not JSON ({row})"
        return
    if not isinstance(row, Mapping):
        yield f"not a JSON object but {row!r:.40}"
        return
    for key in sorted(map(str, row.keys() - set(KEYS))):
        close = get_close_matches(key, KEYS, 1)
        yield f"unknown key {key!r}" + (f"; did you mean {close[0]!r}?" if close else f" (known: {', '.join(KEYS)})")
    for key in ("question", *(key for key in ("category", "id") if key in row)):
        if not isinstance(value := row.get(key), str) or not value.strip():
            yield f"{key} must be a text that is not empty, got {value!r:.40}" if key in row else f"{key} is missing"
    choices = row.get("choices")
    texts = list(choices) if isinstance(choices, list | tuple) else []
    if len(texts) < 2 or not all(isinstance(text, str) and text.strip() for text in texts):
        yield f"choices must be at least two texts that are not empty, got {choices!r:.40}"
    elif len({text.strip() for text in texts}) < len(texts):
        yield f"choices must differ, got {texts!r:.60}"
    elif len(places := _places(row.get("answer"), texts)) != 1:
        what = "could be two choices, a letter and a text: give its place from 0" if places else "is none of them"
        yield f"answer {row.get('answer')!r:.40} {what} (choices: {texts!r:.60})"


def _places(answer: object, choices: list[str]) -> set[int]:
    """Which choices an answer can mean: by place from 0, by letter from A, or by its text."""
    if isinstance(answer, int) and not isinstance(answer, bool):
        return {answer} & set(range(len(choices)))
    if not isinstance(answer, str):
        return set()
    return {place for place, text in enumerate(choices) if answer == text or answer == chr(ord("A") + place)}


def _item(row: Mapping[str, object]) -> _Item:
    """A row without faults."""
    choices = tuple(str(choice) for choice in row["choices"])  # type: ignore[attr-defined]
    question, (answer,) = str(row["question"]), _places(row["answer"], list(choices))
    id = str(row["id"]) if "id" in row else digest_of([question, list(choices)])
    return _Item(id, question, choices, answer, str(row.get("category", "")))
