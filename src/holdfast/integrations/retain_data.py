"""Turns retain data in any of TRL's row formats, standard or conversational, into batches of tensors.

    text | messages | conversations              every token is supervised
    prompt, completion                           the completion is
    prompt, completion, label                    the completion, where the label is true; other rows are dropped
    prompt, completions, labels                  the steps up to the first wrong one
    chosen, rejected [, prompt]                  both completions; a batch of its own kind, without `labels`
    input_ids [, labels | completion_mask]       what the row says

Rows are tokenised as TRL's SFTTrainer and DPOTrainer do it (a test compares the tensors). Read next: `replay`.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..core.errors import WrongSetup
from ..core.types import IGNORED, Batch

Row = Mapping[str, Any]
Tokens = tuple[list[int], list[int]]  # ids and labels of one sequence
FORMATS = (
    "'text', 'messages', 'prompt' and 'completion' (with 'label' or not), 'prompt', 'completions' and 'labels', "
    "'chosen' and 'rejected' (with 'prompt' or not), or 'input_ids'"
)


def to_sets(
    retain: Iterable[Row] | Mapping[str, Iterable[Row]],
    tokenizer: Any,
    *,
    max_length: int | None = None,
    device: torch.device | str = "cpu",
    batch_size: int = 4,
) -> dict[str, list[Batch]]:
    """Return the batches of each retain set by its name; a plain list of rows is one set named `retain`.

    Args:
        retain: rows or batches as `to_batches` takes them, or several such by name.
        tokenizer: see `to_batches`, also for the rest.
        max_length: longer rows are cut on the right.
        device: where the batches go.
        batch_size: rows in a batch.

    Raises:
        WrongSetup: as `to_batches`, and for a named set without rows; the message names the set.
    """
    named = isinstance(retain, Mapping)
    sets: Mapping[str, Iterable[Row]] = retain if isinstance(retain, Mapping) else {"retain": retain}
    found: dict[str, list[Batch]] = {}
    for name, rows in sets.items():
        if isinstance(rows, str | Tensor):
            raise WrongSetup(
                f"Retain data is a mapping whose {name!r} is a {type(rows).__name__}: that is one row or one batch. "
                "Give a list of rows, or a mapping from the name of each set to its rows."
            )
        try:
            batches = to_batches(rows, tokenizer, max_length=max_length, device=device, batch_size=batch_size)
        except WrongSetup as error:
            raise WrongSetup(f"Retain set {name!r}: {error}" if named else str(error)) from error
        if named and not batches:
            raise WrongSetup(f"Retain set {name!r} has no rows. Give it some, or leave it out.")
        if batches:
            found[name] = batches
    return found


def to_batches(
    rows: Iterable[Row],
    tokenizer: Any,
    *,
    batch_size: int = 4,
    max_length: int | None = None,
    device: torch.device | str = "cpu",
) -> list[Batch]:
    """Return batches padded on the right; those of preference rows come last.

    A batch has `input_ids`, `attention_mask` and `labels`; one of preference rows has `completion_mask` in place of
    labels and 2B rows as TRL's DPO has them: prompt + chosen of all its pairs, then prompt + rejected. Rows without a
    supervised token (the prompt alone fills `max_length`, say) are dropped.

    Args:
        rows: ready batches of tensors (kept as they are), or rows, each in its own format of TRL's.
        tokenizer: with a chat template, if rows hold messages.
        batch_size: rows, or pairs, in a batch; a fixed number, so that a reference gradient does not depend on the
            host's.
        max_length: longer rows are cut on the right.
        device: where the batches go.

    Raises:
        WrongSetup: for a row of another format (the message names its keys), and if no row is left.
    """
    rows = list(rows)
    if ready := [row for row in rows if isinstance(row.get("input_ids"), Tensor) and row["input_ids"].dim() > 1]:
        if len(ready) < len(rows):
            raise WrongSetup("Retain data mixes rows with ready batches of tensors. Give one or the other.")
        return [{key: value.to(device) for key, value in row.items()} for row in ready]
    read = [_sequences(plain, tokenizer) for row in rows if (plain := plain_row(row)) is not None]
    cut = [tuple((ids[:max_length], labels[:max_length]) for ids, labels in each) for each in read]
    # the first token follows nothing, so a label on it alone supervises nothing
    kept = [each for each in cut if all(any(label != IGNORED for label in labels[1:]) for _, labels in each)]
    if rows and not kept:
        within = f" within max_length={max_length}" if max_length is not None else ""
        raise WrongSetup(
            f"Nothing is left of {len(rows)} retain rows to take a gradient of: {len(rows) - len(read)} have a false "
            f"label or no right step, and {len(read)} have no supervised token{within}. Give rows with a completion "
            "to keep" + (", or raise max_length." if within else ".")
        )
    pad = 0 if tokenizer is None else tokenizer.pad_token_id
    pad = tokenizer.eos_token_id if pad is None else pad
    batches: list[Batch] = []
    for size in (1, 2):  # one sequence a row, then pairs: they cannot share a batch
        of_kind = [each for each in kept if len(each) == size]
        for i in range(0, len(of_kind), batch_size):
            batches.append(_collate(of_kind[i : i + batch_size], pad, device))
    return batches


def plain_row(row: Row) -> Row | None:
    """Return a row in one of five formats, whichever it came in, or None if nothing of it is to be learned.

    The five: `input_ids`; `prompt`, `chosen`, `rejected`; `messages`; `prompt`, `completion`; `text`. A row that
    could be read in several ways is read in the first of these. Steps that were cut off are marked `unfinished`.

    >>> plain_row({"prompt": "2+2", "completions": [" = 4", " = 5"], "labels": [True, False]})
    {'prompt': '2+2', 'completion': ' = 4', 'unfinished': True}

    Raises:
        WrongSetup: for a row in no format, or with a prompt alone.
    """
    row = {key: value for key, value in row.items() if value is not None}  # what a table has where a row has nothing
    keys = set(row)
    if "conversations" in row:
        row = _of_trl("maybe_convert_to_chatml")(copy.deepcopy(row))  # it changes what it is given
    if "input_ids" in row or ("messages" in row and not {"chosen", "rejected"} <= keys):
        return row
    if {"chosen", "rejected"} <= keys:
        explicit = "prompt" in row and isinstance(row["prompt"], str) == isinstance(row["chosen"], str)
        return row if explicit else {**row, **_of_trl("maybe_extract_prompt")(row)}
    if {"prompt", "completions", "labels"} <= keys:
        return _right_steps(row)
    if {"prompt", "completion"} <= keys:
        if row.get("label", True) not in (True, False):
            raise WrongSetup(
                "A retain row with 'prompt', 'completion' and 'label' is an unpaired preference, whose label is true "
                f"or false, but it is {row['label']!r}. Leave the column out if it means something else."
            )
        return {key: row[key] for key in row if key != "label"} if row.get("label", True) else None
    if "text" in row:
        return row
    if "prompt" in row:
        raise WrongSetup(
            f"A retain row has a prompt alone (keys: {', '.join(sorted(keys))}), and there is nothing in it to take a "
            "gradient of. Add the 'completion' that is to be kept."
        )
    raise WrongSetup(f"A retain row has keys {sorted(keys)}. Give rows with {FORMATS}; or batches of tensors.")


def _right_steps(row: Row) -> Row | None:
    if not isinstance(row["prompt"], str):
        raise WrongSetup("A retain row with 'completions' has messages as its prompt. TRL's stepwise rows are strings.")
    right = len(list(takewhile(bool, row["labels"])))
    if not right:
        return None
    joined = {"prompt": row["prompt"], "completion": "".join(row["completions"][:right])}
    return joined if right == len(row["completions"]) else {**joined, "unfinished": True}


def _of_trl(name: str) -> Any:
    try:
        import trl.data_utils
    except ImportError as error:
        raise WrongSetup(
            f"Retain rows with 'conversations', or with 'chosen' and 'rejected' but no prompt, are for TRL's {name}, "
            "which is not installed: pip install 'holdfast[trl]', or write 'messages' or 'prompt' out."
        ) from error
    return getattr(trl.data_utils, name)


def _sequences(row: Row, tokenizer: Any) -> tuple[Tokens, ...]:
    """Return the row's one sequence, or the two of a preference."""
    if "input_ids" in row:
        return (_given(row),)
    if tokenizer is None:
        raise WrongSetup("Retain rows of text need a tokenizer: pass tokenizer=..., or ready batches of tensors.")
    if "chosen" in row:
        prompt, *wholes = (_encoded(row, part, tokenizer) for part in ((), ("chosen",), ("rejected",)))
    elif "completion" in row and "messages" not in row:
        prompt, *wholes = (_encoded(row, part, tokenizer) for part in ((), ("completion",)))
    elif "messages" in row:
        ids = _template(row, row["messages"], tokenizer)
        return ((ids, ids),)
    else:
        ids = list(tokenizer(_ended(row["text"], tokenizer))["input_ids"])
        return ((ids, ids),)
    # as in TRL: the completion begins where it parts from the prompt, whose end a template or tokenizer may change
    start = min(_shared(prompt, ids) for ids in wholes)
    return tuple((ids, [IGNORED] * start + ids[start:]) for ids in wholes)


def _shared(a: list[int], b: list[int]) -> int:
    return sum(1 for _ in takewhile(lambda two: two[0] == two[1], zip(a, b, strict=False)))


def _encoded(row: Row, part: Sequence[str], tokenizer: Any) -> list[int]:
    """Return the ids of the prompt alone, or of the prompt and one completion."""
    prompt = row["prompt"]
    if isinstance(prompt, str):
        ends = [row[key] if row.get("unfinished") else _ended(row[key], tokenizer) for key in part]
        return list(tokenizer("".join([prompt, *ends]))["input_ids"])
    messages = [*prompt, *(message for key in part for message in row[key])]
    return _template(row, messages, tokenizer, **({} if part else {"add_generation_prompt": True}))


def _template(row: Row, messages: Any, tokenizer: Any, **options: Any) -> list[int]:
    tools = row.get("tools")
    tools = json.loads(tools) if isinstance(tools, str) else tools
    options |= {"tools": tools or None, **row.get("chat_template_kwargs", {})}
    return list(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)["input_ids"])


def _ended(text: str, tokenizer: Any) -> str:
    end = tokenizer.eos_token
    return text if end is None or text.endswith(end) else text + end


def _given(row: Row) -> Tokens:
    """Read a tokenised row as TRL's SFT does: its labels, or else its masks; padding is taken out."""
    names = [
        key for key in ("input_ids", "labels", "completion_mask", "assistant_masks", "attention_mask") if key in row
    ]
    columns = {key: torch.as_tensor(row[key]).tolist() for key in names}
    if len({len(column) for column in columns.values()}) > 1:
        raise WrongSetup(
            f"A retain row has {names} of different lengths: {[len(column) for column in columns.values()]}."
        )
    ids, real = columns["input_ids"], columns.get("attention_mask", [1] * len(columns["input_ids"]))
    if (labels := columns.get("labels")) is None:
        masks = [columns[key] for key in ("completion_mask", "assistant_masks") if key in columns]
        labels = [token if all(bits) else IGNORED for token, *bits in zip(ids, *masks, strict=True)]
    kept = [(token, label) for token, label, is_real in zip(ids, labels, real, strict=True) if is_real]
    return [token for token, _ in kept], [label for _, label in kept]


def _collate(rows: Sequence[tuple[Tokens, ...]], pad: int, device: torch.device | str) -> Batch:
    sequences = [each for side in zip(*rows, strict=True) for each in side]  # all chosen ones, then all rejected

    def padded(lists: Iterable[list[int]], value: int) -> Tensor:
        return pad_sequence([torch.tensor(each) for each in lists], batch_first=True, padding_value=value).to(device)

    batch = {
        "input_ids": padded((ids for ids, _ in sequences), pad),
        "attention_mask": padded(([1] * len(ids) for ids, _ in sequences), 0),
    }
    labels = padded((labels for _, labels in sequences), IGNORED)
    return {**batch, "completion_mask": (labels != IGNORED).long()} if len(rows[0]) > 1 else {**batch, "labels": labels}
