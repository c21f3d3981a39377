"""Texts as the drift report shows them: long ones cut, digests shortened, nested settings laid out flat.

Read next: `holdfast.analysis.drift_report`, the page.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from holdfast.drift.entry import JSON

LONGEST = 600
"""Characters shown of a text."""


def cut(text: str) -> str:
    """A text of bearable length, with a mark where it was cut.

    >>> cut("a" * 700)[LONGEST - 1 :]
    'a… [cut; 700 characters in all]'
    """
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}… [cut; {len(text):,} characters in all]"


def short(text: str) -> str:
    """A digest by its first twelve places; any other text as it is.

    >>> short("9ac6b6ab8b1d9ac6b6ab8b1d"), short("lab-aligned")
    ('9ac6b6ab8b1d…', 'lab-aligned')
    """
    return f"{text[:12]}…" if re.fullmatch(r"[0-9a-f]{16,}", text) else text


def leaves(value: JSON, path: str = "") -> Iterable[tuple[str, str]]:
    """Every plain value in nested JSON, with the way to it.

    >>> list(leaves({"base": {"name": "lab", "layers": [2, 3]}}))
    [('base name', 'lab'), ('base layers 1', '2'), ('base layers 2', '3')]
    """
    if isinstance(value, Mapping):
        for name, part in value.items():
            yield from leaves(part, f"{path} {name}".strip())
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for place, part in enumerate(value, 1):
            yield from leaves(part, f"{path} {place}".strip())
    else:
        yield path, str(value)
