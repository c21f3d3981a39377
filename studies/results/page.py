"""All result pages: which there are, and how they are written; read `sheet` next."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from . import alignguard, combinations, default, law_page, ogpsa, tmkl
from .comparisons import RESULTS
from .sheet import Sheet

PAGES: Mapping[str, Callable[[Path, bool], Sheet | None]] = {
    "tmkl": tmkl.sheet,
    "ogpsa": ogpsa.sheet,
    "alignguard": alignguard.sheet,
    "combinations": combinations.sheet,
    "default": default.sheet,
    "law": law_page.sheet,
}


def write_pages(results: Path = RESULTS, figures: bool = True) -> list[Path]:
    """Write every page that has a ledger, and return where they are; a page without runs is not written.

    Args:
        results: the folder with the ledgers, to which pages go.
        figures: whether figures are drawn too.
    """
    written = []
    for name, make in PAGES.items():
        sheet = make(results, figures)
        if sheet is None:
            print(f"{name}: no runs yet, no page")
            continue
        path = results / f"{name}.md"
        path.write_text(sheet.text(), encoding="utf-8")
        written.append(path)
    return written
