"""Pages that are written by a command say what it would write now."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from scripts import bench_tables, tree

PAGES = sorted((Path(__file__).parents[1] / "docs").glob("**/*.md"))


def test_the_tree_in_the_readme_is_that_of_the_source(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tree.py", "--check"])
    with pytest.raises(SystemExit) as ended:
        tree.main()
    assert ended.value.code == 0


def test_tables_of_benchmarks_are_those_of_their_files():
    asking = [page for page in PAGES if "<!-- bench: " in page.read_text()]
    assert asking
    assert [page for page in asking if bench_tables.with_tables(page.read_text()) != page.read_text()] == []
    changed = asking[0].read_text().replace("| value |", "| typed |")
    assert bench_tables.with_tables(changed) != changed
