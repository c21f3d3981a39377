"""Mixes retain rows into the task data: replay, the baseline that every projection is compared with.

    share s of the rows:  each row is drawn from the retain data with probability s, from the task data with 1 - s

Nothing is protected here but by training on it (Robins, "Catastrophic forgetting, rehearsal and pseudorehearsal",
1995). The rows of both stay in order and whole; a trainer shuffles them. Read next: `retain_data`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..core.errors import WrongSetup
from .retain_data import Row, plain_row

if TYPE_CHECKING:
    from datasets import Dataset

COLUMNS: Mapping[str, tuple[str, ...]] = {
    "tokenised": ("input_ids", "labels", "completion_mask", "assistant_masks", "attention_mask"),
    "preference": ("prompt", "chosen", "rejected"),
    "messages": ("messages",),
    "prompt + completion": ("prompt", "completion"),
    "text": ("text",),
}
ALONG = ("tools", "chat_template_kwargs")  # what goes to the chat template with the messages


def mix(
    task: Dataset,
    retain: Dataset | Iterable[Row] | Mapping[str, Dataset],
    *,
    share: float,
    seed: int = 0,
    text_field: str = "text",
) -> Dataset:
    """Return the task data with retain rows among it, about `share` of all rows.

    Every task row is in it once; retain rows come in a random order and repeat as often as they are needed.

    Args:
        task: rows to train on, in a TRL format.
        retain: rows in the same format, or in one that converts without loss: messages that end with the assistant's,
            or a prompt with a completion of messages; several sets by name are put together.
        share: of the rows that are retain rows, between 0 and 1.
        seed: of the draws and of the order of the retain rows.
        text_field: where the task keeps its text (SFTConfig's `dataset_text_field`).

    Raises:
        WrongSetup: for a share that is none, and for formats that do not go together; the message names both.
    """
    from datasets import interleave_datasets

    if not 0 < share < 1:
        raise WrongSetup(f"The share of replayed rows must lie between 0 and 1, got {share}. Try 0.3.")
    if not len(task):
        raise WrongSetup("There are no task rows to mix retain rows into.")
    task = _explicit(task)
    sets = retain if isinstance(retain, Mapping) else {"retain": retain}
    rows = [row for each in sets.values() for row in each]
    converted = [new for row in rows if (new := converted_row(row, task[0], text_field)) is not None]
    if not converted:
        raise WrongSetup(f"Of {len(rows)} retain rows none can be replayed. Give rows with a completion to keep.")
    kept = _with_features_of(task, converted)
    # `first_exhausted`, on retain rows so many that it is the task that runs out: each task row then comes exactly
    # once. `all_exhausted` would repeat the task until the last retain row was seen, `..._without_replacement` would
    # never repeat a retain row. By Chernoff's bound, n task rows are not drawn within (2n + 400) / (1 - share) draws
    # with a probability below e^-50.
    enough, order = math.ceil((2 * len(task) + 400) / (1 - share)), kept.shuffle(seed=seed)
    repeated = order.select([i % len(order) for i in range(enough)])
    return interleave_datasets(
        [task, repeated], probabilities=[1 - share, share], seed=seed, stopping_strategy="first_exhausted"
    )


def converted_row(row: Row, like: Row, text_field: str = "text") -> dict[str, Any] | None:
    """Return a retain row in the format of a task row, or None if nothing of it is to be learned.

    >>> said = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    >>> converted_row({"messages": said}, {"prompt": said[:1], "completion": said[1:]})["completion"]
    [{'role': 'assistant', 'content': 'Hello.'}]

    Raises:
        WrongSetup: if the one cannot be had from the other without loss.
    """
    plain = plain_row(row)
    if plain is None or "unfinished" in plain:  # TRL would end the answer where its steps were cut off
        return None
    wanted, has = _format(like, text_field), _format(plain)
    found = {column: plain[column] for column in COLUMNS[has.kind] if column in plain}
    if (has.kind, wanted.kind) == ("prompt + completion", "messages") and has.conversational:
        found = {"messages": [*found["prompt"], *found["completion"]]}
    elif (has.kind, wanted.kind) == ("messages", "prompt + completion") and wanted.conversational:
        said = found["messages"]
        if len(said) < 2 or said[-1]["role"] != "assistant":
            raise WrongSetup(
                "A retain row's messages cannot be split into prompt and completion: the last of its "
                f"{len(said)} messages must be the assistant's answer to those before. Leave such rows out."
            )
        found = {"prompt": said[:-1], "completion": said[-1:]}
    elif has != wanted:
        raise WrongSetup(
            f"Retain rows of {has} cannot be replayed among task rows of {wanted}: neither can be made from the other "
            f"without loss. {wanted.advice} Or leave replay out and protect with a method, which reads any format."
        )
    elif wanted.kind == "text":
        found = {text_field: found["text"]}
    for key in ALONG:
        if key in plain:
            found[key] = plain[key]
    if ("chat_template_kwargs" in found) != (like.get("chat_template_kwargs") is not None):
        raise WrongSetup(
            "Either the task rows or the retain rows have 'chat_template_kwargs', and the others have none: mixed, "
            "they would be rendered differently. Give the column to both or to neither."
        )
    return found


@dataclass(frozen=True)
class _Format:
    kind: str
    conversational: bool
    columns: tuple[str, ...] = ()  # of tokenised rows: what they are masked by

    def __str__(self) -> str:
        if self.kind in ("prompt + completion", "preference"):
            return f"{self.kind} ({'messages' if self.conversational else 'strings'})"
        return f"{self.kind} ({', '.join(self.columns)})" if self.columns else self.kind

    @property
    def advice(self) -> str:
        if self.kind == "preference":
            return "Give retain rows with 'chosen' and 'rejected': DPO trains on nothing else."
        return f"Give retain rows of {self}."


def _format(row: Row, text_field: str = "text") -> _Format:
    here = {key for key, value in row.items() if value is not None}
    if "input_ids" in here:
        return _Format("tokenised", False, tuple(name for name in COLUMNS["tokenised"] if name in here))
    if here >= {"chosen", "rejected"}:
        return _Format("preference", not isinstance(row["chosen"], str))
    if here & {"messages", "conversations"}:
        return _Format("messages", True)
    if here >= {"prompt", "completion"}:
        return _Format("prompt + completion", not isinstance(row["prompt"], str))
    if text_field in here:
        return _Format("text", False)
    raise WrongSetup(
        f"Task rows have keys {', '.join(sorted(here))}, which is no format that retain rows can be mixed into. Give "
        f"{text_field!r}, 'messages', 'prompt' and 'completion', or, for DPO, 'chosen' and 'rejected'."
    )


def _explicit(task: Dataset) -> Dataset:
    """Rename and split what TRL would rename and split itself, so that both parts of the mixture are alike."""
    from trl.data_utils import extract_prompt, maybe_convert_to_chatml

    columns = set(task.column_names)
    if "conversations" in columns and "input_ids" not in columns:
        return task.map(maybe_convert_to_chatml, remove_columns="conversations")
    if {"chosen", "rejected"} <= columns and "prompt" not in columns:
        return task.map(extract_prompt)
    return task


def _with_features_of(task: Dataset, rows: list[dict[str, Any]]) -> Dataset:
    """Make a table of retain rows whose columns have the task's types; fields that only the task has are empty."""
    from datasets import Dataset, Features

    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = Dataset.from_dict({key: [row.get(key) for row in rows] for key in columns})
    types = Features({key: task.features.get(key, table.features[key]) for key in columns})
    try:
        return table.cast(types)
    except (TypeError, ValueError) as error:
        raise WrongSetup(
            f"Retain rows have other fields than the task rows: {table.features} there, {task.features} in the task. "
            "Write both with the same fields in their messages."
        ) from error
