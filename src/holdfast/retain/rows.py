"""The user's own rows as sequences, in any of TRL's formats, and the prompts in them.

    text | messages | conversations | prompt, completion | prompt, chosen | chosen

Rows are tokenised as the trainers do it: a text ends in the tokenizer's end, a conversation is what its template says.
Read next: `pool`, whose `add` takes such sequences.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from .formats import Messages
from .kept import Kept, PoolError, id_of

__all__ = ["Prompt", "Row", "prompt_ids", "prompts", "read_rows", "sequences"]

Row = Mapping[str, Any]
Prompt = str | Messages
FORMATS = "'text', 'messages', 'conversations', 'prompt' and 'completion', or 'chosen' (with 'prompt' or not)"
ROLES = {"human": "user", "gpt": "assistant"}


def read_rows(path: str | Path) -> list[Row]:
    """The rows of a file of JSON lines.

    Raises:
        PoolError: names every line that is no JSON object.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise PoolError(f"{path} cannot be read ({error}). Give a UTF-8 file of JSON lines.") from None
    rows: list[Row] = []
    faults = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                faults.append(f"line {number}: not JSON ({error})")
                continue
            if isinstance(row, dict):
                rows.append(row)
            else:
                faults.append(f"line {number}: not a JSON object but {row!r:.40}")
    if not rows and not faults:
        faults = ["it is empty"]
    if faults:
        raise PoolError(f"{path} holds no rows that could be kept; correct these:", faults)
    return rows


def sequences(rows: Sequence[Row], tokenizer: Any, *, source: str = "rows", max_length: int = 1024) -> list[Kept]:
    """Rows as sequences of the kind `own`, in their order.

    Args:
        rows: each in a format of its own.
        tokenizer: of the base; with a chat template, if rows hold messages.
        source: what the pool says that they are.
        max_length: longer rows are cut on the right.

    Raises:
        PoolError: names every row that is in no format, or has fewer than two tokens.
    """
    made, faults = [], []
    for number, row in enumerate(rows, 1):
        try:
            ids, start = _tokens(row, tokenizer)
        except PoolError as error:
            faults.append(f"row {number}: {error}")
            continue
        except Exception as error:  # a chat template raises what it likes
            faults.append(f"row {number}: the chat template refuses it ({' '.join(str(error).split()):.80})")
            continue
        ids = ids[:max_length]
        if len(ids) < 2:
            faults.append(f"row {number}: it has {len(ids)} tokens, and nothing can be predicted in it")
        else:
            text = tokenizer.decode(ids)
            made.append(Kept(id_of(ids), "own", source, text, tuple(ids), min(start, len(ids))))
    if faults:
        raise PoolError("These rows cannot be kept:", faults)
    return made


def prompts(rows: Sequence[Row]) -> list[Prompt]:
    """The prompts of rows, texts or messages: a conversation's is all before its last answer.

    >>> prompts([{"prompt": "2 + 2"}, {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant"}]}])
    ['2 + 2', [{'role': 'user', 'content': 'Hi'}]]

    Raises:
        PoolError: names every row without one.
    """
    found: list[Prompt] = []
    faults = []
    for number, row in enumerate(rows, 1):
        messages = _messages(row)
        last = next((i for i in reversed(range(len(messages))) if messages[i].get("role") == "assistant"), 0)
        if row.get("prompt"):
            found.append(row["prompt"])
        elif messages[:last]:
            found.append(list(messages[:last]))
        else:
            faults.append(f"row {number} has no prompt (keys: {', '.join(sorted(row))})")
    if faults:
        raise PoolError("These rows have no prompt that the base could answer:", faults)
    return found


def prompt_ids(prompt: Prompt, tokenizer: Any) -> list[int]:
    """A prompt as tokens, ready to be answered: in the chat template, if there is one."""
    if isinstance(prompt, str) and not tokenizer.chat_template:
        return list(tokenizer(prompt).input_ids)
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    return _template(messages, tokenizer, add_generation_prompt=True)


def _tokens(row: Row, tokenizer: Any) -> tuple[list[int], int]:
    """The tokens of a row, and how many of them are prompt."""
    row = {key: value for key, value in row.items() if value is not None}
    answer = row.get("completion", row.get("chosen"))
    if isinstance(row.get("text"), str):
        return list(tokenizer(_ended(row["text"], tokenizer)).input_ids), 0
    if "prompt" in row and isinstance(row["prompt"], str) and isinstance(answer, str):
        prompt = list(tokenizer(row["prompt"]).input_ids)
        whole = list(tokenizer(_ended(row["prompt"] + answer, tokenizer)).input_ids)
        return whole, _shared(prompt, whole)
    if "prompt" in row and _is_chat(row["prompt"]) and answer is not None and _is_chat(answer):
        prompt = _template(row["prompt"], tokenizer, add_generation_prompt=True)
        whole = _template([*row["prompt"], *answer], tokenizer)
        return whole, _shared(prompt, whole)
    if messages := _messages(row):
        return _template(messages, tokenizer), 0
    if "prompt" not in row and isinstance(answer, str) and "chosen" in row:
        return list(tokenizer(_ended(answer, tokenizer)).input_ids), 0
    raise PoolError(f"it has the keys {', '.join(sorted(row)) or 'none'}; give {FORMATS}")


def _messages(row: Row) -> list[Mapping[str, Any]]:
    """The conversation of a row, or nothing: all of it, the chosen one where there is a choice."""
    if _is_chat(row.get("messages")):
        return list(row["messages"])
    if _is_chat(row.get("conversations")):
        return [
            message
            if "role" in message
            else {"role": ROLES.get(message.get("from", ""), message.get("from")), "content": message.get("value")}
            for message in row["conversations"]
        ]
    return list(row["chosen"]) if "prompt" not in row and _is_chat(row.get("chosen")) else []


def _is_chat(value: object) -> bool:
    return isinstance(value, Sequence) and bool(value) and all(isinstance(message, Mapping) for message in value)


def _template(messages: Messages, tokenizer: Any, **options: bool) -> list[int]:
    if not tokenizer.chat_template:
        raise PoolError("it holds messages, and the tokenizer has no chat template. Give text")
    text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    return sum(1 for _ in takewhile(lambda two: two[0] == two[1], zip(a, b, strict=False)))


def _ended(text: str, tokenizer: Any) -> str:
    end = tokenizer.eos_token
    return text if end is None or text.endswith(end) else text + end
