"""Files of JSON lines, read so that every fault can be told with its line. Standard library only."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

__all__ = ["json_lines", "read_json_lines"]


def json_lines(text: str) -> Iterator[tuple[int, object]]:
    r"""Number and value of every line that is not blank; what is no JSON comes as the error that says so.

    >>> [(number, type(value).__name__) for number, value in json_lines('{"a": 1}\n\nnonsense')]
    [(1, 'dict'), (3, 'JSONDecodeError')]
    """
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: U+2028 is allowed inside a JSON string
        if line.strip():
            try:
                yield number, json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                yield number, error


def read_json_lines(path: str | Path, limit: int | None = None) -> list[tuple[int, object]]:
    """The same of a UTF-8 file, or of the first lines of it that are not blank.

    Raises:
        ProbeError: if it cannot be read as text.
    """
    from holdfast.drift.probe import ProbeError

    try:
        return list(islice(json_lines(Path(path).read_text(encoding="utf-8-sig")), limit))
    except (OSError, UnicodeDecodeError) as error:
        raise ProbeError(f"{path} cannot be read ({error}). Give a UTF-8 file of JSON lines.") from None
