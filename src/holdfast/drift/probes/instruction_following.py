"""Instruction following: answers to instructions that a program can check, such as "use no commas" (arXiv 2311.07911).

    prompt_strict       the share of prompts of which every instruction is followed
    instruction_strict  the share of instructions that are followed
    ..._loose           the same where the first or last line, or asterisks, may be in the way

Answers are our own greedy ones; the checkers are lm-eval's, with what is random in them seeded. Read next:
`holdfast.drift.probes.lm_eval`, which asks any task of lm-eval.
"""

from __future__ import annotations

import inspect
import os
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..entry import JSON
from ..json_lines import read_json_lines
from ..probe import Answer, Found, Probe, ProbeError, Tick, digest_of
from ..score import Score
from .lm_eval_host import lm_eval_part

if TYPE_CHECKING:
    from ..models import Models

__all__ = ["NEEDS_PUNKT", "InstructionFollowing"]

NEEDS_PUNKT = ("change_case:capital_word_frequency", "length_constraints:number_sentences")
"""Instructions whose checkers split sentences or words with NLTK's data, which lm-eval downloads; holdfast does not."""


class InstructionFollowing(Probe):
    """The shares of prompts and of instructions that are followed, strictly and loosely.

    Args:
        rows: as in IFEval: `key`, `prompt`, `instruction_id_list` and `kwargs`, one mapping for each instruction.
        max_new_tokens: where answers are cut off.
        skip: leave out rows that need NLTK's data where it is missing, and say in `note` how many.

    Raises:
        ProbeError: names every row that cannot be checked.
    """

    name = "instruction_following"

    def __init__(self, rows: Iterable[Mapping[str, Any]], max_new_tokens: int = 1280, skip: bool = False) -> None:
        self._set({f"row {place}": row for place, row in enumerate(rows)}, max_new_tokens, skip)

    @classmethod
    def read(
        cls, path: str | Path, max_new_tokens: int = 1280, skip: bool = False, limit: int | None = None
    ) -> InstructionFollowing:
        """From a file of JSON lines.

        Args:
            path: of the file.
            max_new_tokens: where answers are cut off.
            skip: leave out rows that need NLTK's data where it is missing.
            limit: so many rows at most, from the first on.

        Raises:
            ProbeError: names every line that is not a row, or cannot be checked.
        """
        rows: dict[str, Any] = {f"line {number}": row for number, row in read_json_lines(path, limit)}
        made = cls.__new__(cls)
        made._set(rows, max_new_tokens, skip)
        return made

    def _set(self, rows: Mapping[str, Any], max_new_tokens: int, skip: bool) -> None:
        faults = [] if rows else ["there are no rows"]
        if max_new_tokens < 1:
            faults.append(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        with _checking():
            checkers = _checkers()
            for where, row in rows.items():
                faults += [f"{where}: {fault}" for fault in _faults(row, checkers)]
        keys = [str(row["key"]) for row in rows.values() if isinstance(row, Mapping) and "key" in row]
        faults += [f"the key {key} is there twice" for key in sorted({key for key in keys if keys.count(key) > 1})]
        if faults:
            raise ProbeError("These instructions cannot be checked:", faults)
        unchecked = {} if _has_punkt() else {where: found for where, row in rows.items() if (found := _punkt(row))}
        if unchecked and (not skip or len(unchecked) == len(rows)):
            raise ProbeError(
                f"{len(unchecked)} of {len(rows)} rows need NLTK's sentence data, which is not here. Fetch it "
                "with: python -m nltk.downloader punkt_tab. Or leave these rows out with skip=True:",
                [f"{where}: {', '.join(found)}" for where, found in unchecked.items()],
            )
        self.rows: list[dict[str, Any]] = [dict(row) for where, row in rows.items() if where not in unchecked]
        self.max_new_tokens = max_new_tokens
        with _checking():
            drawn = [str(row["key"]) for row in self.rows if _draws(row, checkers)]
        self.note = " ".join(_notes(len(unchecked), len(rows), drawn))

    @property
    def size(self) -> int:
        """Prompts."""
        return len(self.rows)

    @property
    def identity(self) -> Mapping[str, JSON]:
        """The rows, where answers are cut, and the versions of what checks them."""
        return {"probe": self.name, "instrument": self.instrument, "max_new_tokens": self.max_new_tokens}

    @property
    def instrument(self) -> str:
        """The checkers and what they read languages and words with, and a digest of the rows."""
        parts = ", ".join(f"{part} {version(part)}" for part in ("langdetect", "nltk"))
        return f"IFEval of lm-eval {lm_eval_part().__version__}, {parts}, {digest_of(self.rows)}"

    def measure(self, models: Models, side: str, tick: Tick) -> Found:
        """Ask every prompt, and check every answer."""
        replies = models.ask([row["prompt"] for row in self.rows], side, self.max_new_tokens, tick)
        told = [(row, reply.text) for row, reply in zip(self.rows, replies, strict=True)]
        with _checking():
            check = _ifeval("utils").process_results
            checked = [_check(check, row, text) for row, text in told]
        ids = [name for row in self.rows for name in row["instruction_id_list"]]
        scores = {}
        for kind in ("strict", "loose"):
            prompts = [float(found[f"prompt_level_{kind}_acc"]) for found in checked]
            each = [float(one) for found in checked for one in found[f"inst_level_{kind}_acc"]]
            scores[f"{self.name}.prompt_{kind}"] = _share(prompts, self.instrument)
            scores[f"{self.name}.instruction_{kind}"] = _share(each, self.instrument, ids)
        pairs = zip(told, checked, strict=True)
        return Found(scores, tuple(self._answer(row, text, found) for (row, text), found in pairs))

    def _answer(self, row: Mapping[str, Any], text: str, found: Mapping[str, Any]) -> Answer:
        pairs = zip(row["instruction_id_list"], found["inst_level_strict_acc"], strict=True)
        missed = [name for name, followed in pairs if not followed]
        return Answer(
            id=str(row["key"]),
            prompt=row["prompt"],
            text=text,
            verdict="wrong" if missed else "right",
            expected=", ".join(row["instruction_id_list"]),
            category=row["instruction_id_list"][0].split(":")[0],
            instrument=self.instrument,
            why=f"not followed: {', '.join(missed)}" if missed else "",
        )


def _share(items: Sequence[float], instrument: str, categories: Sequence[str] | None = None) -> Score:
    kinds = None if categories is None else tuple(categories)
    return Score(sum(items) / len(items), items=tuple(items), categories=kinds, instrument=instrument)


def _notes(left_out: int, rows: int, drawn: Sequence[str]) -> Iterator[str]:
    yield "Answers that are cut off count as they are; whether an answer is a good one is not asked."
    if left_out:
        yield f"{left_out} of {rows} rows were left out, as checking them needs NLTK's data (punkt_tab)."
    if drawn:
        yield f"In rows {', '.join(drawn)} lm-eval's checker takes a random letter (seeded) for one that is none."


# ---- rows ----------------------------------------------------------------------------------------------------------
def _faults(row: Any, checkers: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with a row; its instructions are built once, as the checkers test their arguments there."""
    if not isinstance(row, Mapping):
        yield f"not a row of IFEval but {row!r:.80}"
        return
    if missing := [part for part in ("key", "prompt", "instruction_id_list", "kwargs") if part not in row]:
        yield f"has no {', '.join(missing)}"
        return
    names, kwargs = row["instruction_id_list"], row["kwargs"]
    if not isinstance(row["prompt"], str) or not row["prompt"].strip():
        yield "the prompt is empty"
    if not isinstance(names, list) or not isinstance(kwargs, list) or len(names) != len(kwargs) or not names:
        yield "needs at least one instruction, and as many kwargs as instructions"
        return
    for name, given in zip(names, kwargs, strict=True):
        if name not in checkers:
            close = get_close_matches(str(name), checkers, n=1)
            yield f"there is no instruction {name!r}.{f' Did you mean {close[0]!r}?' if close else ''}"
        elif not isinstance(given, Mapping):
            yield f"the kwargs of {name} are {given!r:.40}, not a mapping"
        else:
            yield from _argument_faults(checkers[name], name, _known(given))


def _argument_faults(checker: Any, name: str, given: Mapping[str, Any]) -> Iterator[str]:
    """An argument that is missing, empty or 0 would be drawn at random by lm-eval, so it must be there."""
    wanted = [part for part in inspect.signature(checker.build_description).parameters if part != "self"]
    faults = [f"{name} needs {part}" for part in wanted if not given.get(part)]
    faults += [f"{name} takes no {part}" for part in given if part not in wanted]
    if not faults:
        try:
            checker(name).build_description(**given)
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            faults.append(f"{name} cannot be built: {type(error).__name__}: {error}")
    yield from faults


def _known(given: Mapping[str, Any]) -> dict[str, Any]:
    """Without the nulls that IFEval's own files have for the arguments of other instructions."""
    return {part: value for part, value in given.items() if value is not None}


def _punkt(row: Mapping[str, Any]) -> list[str]:
    return [name for name in row["instruction_id_list"] if name in NEEDS_PUNKT]


def _draws(row: Mapping[str, Any], checkers: Mapping[str, Any]) -> bool:
    """Whether a checker draws something, although all arguments are there: a letter, where `#` was given for one."""
    before = random.getstate()
    for name, given in zip(row["instruction_id_list"], row["kwargs"], strict=True):
        checkers[name](name).build_description(**_known(given))
    return random.getstate() != before


# ---- lm-eval's checkers --------------------------------------------------------------------------------------------
def _check(check: Any, row: Mapping[str, Any], text: str) -> Mapping[str, Any]:
    random.seed(0)  # a row's result must not depend on the rows before it
    found: Mapping[str, Any] = check(row, [text])
    return found


def _ifeval(module: str) -> Any:
    """A module of lm-eval's IFEval, imported as if by a second process, so that it downloads nothing."""
    lm_eval_part(".tasks")
    rank = os.environ.get("LOCAL_RANK")
    os.environ["LOCAL_RANK"] = "1"
    try:
        return lm_eval_part(f".tasks.ifeval.{module}")
    finally:
        if rank is None:
            del os.environ["LOCAL_RANK"]
        else:
            os.environ["LOCAL_RANK"] = rank


def _checkers() -> Mapping[str, Any]:
    found: Mapping[str, Any] = _ifeval("instructions_registry").INSTRUCTION_DICT
    return found


def _has_punkt() -> bool:
    data = _ifeval("instructions_util").nltk.data
    try:
        data.find("tokenizers/punkt_tab/english")
    except LookupError:
        return False
    return True


@contextmanager
def _checking() -> Iterator[None]:
    """Seeds what checkers draw, languages included, and leaves the caller's random numbers as they were."""
    factory = _ifeval("instructions").langdetect.DetectorFactory
    before, state = factory.seed, random.getstate()
    factory.seed = 0
    random.seed(0)
    try:
        yield
    finally:
        factory.seed = before
        random.setstate(state)
