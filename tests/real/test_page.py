"""The page on real weights says what its ledger says, and nothing else."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LEDGER, PAGE = ROOT / "docs/results/real-weights/ledger.jsonl", ROOT / "docs/real-weights.md"


@pytest.mark.skipif(not LEDGER.is_file(), reason="the experiment has not been run: make real")
def test_the_page_is_the_one_that_its_ledger_gives():
    spec = importlib.util.spec_from_file_location("real_weights", ROOT / "examples/real_weights.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert PAGE.read_text() == module.page(LEDGER)
