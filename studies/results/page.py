"""All result pages: which there are, and how they are written; read `sheet` next."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from . import alignguard, combinations, default, law_page, ogpsa, sampled, tmkl
from .choose import evidence, headlines, quote
from .comparisons import RESULTS, ROOT
from .sheet import Sheet

PAGES: Mapping[str, Callable[[Path, bool], Sheet | None]] = {
    "tmkl": tmkl.sheet,
    "ogpsa": ogpsa.sheet,
    "alignguard": alignguard.sheet,
    "combinations": combinations.sheet,
    "default": default.sheet,
    "sampled": sampled.sheet,
    "law": law_page.sheet,
}


def write_pages(results: Path = RESULTS, figures: bool = True) -> list[Path]:
    """Write every page that has a ledger, and what others quote of them; a page without runs is not written.

    Args:
        results: the folder with the ledgers, to which pages go.
        figures: whether figures are drawn too.
    """
    sheets = {}
    for name, make in PAGES.items():
        if sheet := make(results, figures):
            sheets[name] = sheet
            (results / f"{name}.md").write_text(sheet.text(), encoding="utf-8")
        else:
            print(f"{name}: no runs yet, no page")
    if results == RESULTS:  # the project's own, which its README and docs quote
        quote(ROOT / "README.md", headlines(sheets, "docs/results"))
        quote(ROOT / "docs" / "choose.md", evidence(results))
    return [results / f"{name}.md" for name in sheets]
