"""Pages of HTML: templates in which whatever a ledger says is text, and files that are written whole or not at all.

Read next: `holdfast.analysis.report`, `holdfast.analysis.ledger_page` and `holdfast.analysis.drift_report`, the pages.
"""

from __future__ import annotations

import os
from pathlib import Path

import jinja2

__all__ = ["pages", "write_whole"]


def pages() -> jinja2.Environment:
    """The templates: what is shown is escaped, and what a template needs and does not get is an error."""
    return jinja2.Environment(
        loader=jinja2.PackageLoader("holdfast.analysis"), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip


def write_whole(path: str | Path, text: str) -> Path:
    """Write beside the place of a file, then move it there; folders are made.

    >>> import tempfile
    >>> write_whole(Path(tempfile.mkdtemp()) / "deep" / "page.html", "all of it").read_text()
    'all of it'
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8", errors="replace")  # half a surrogate pair is no reason to fail
        return part.replace(path)
    finally:
        part.unlink(missing_ok=True)
