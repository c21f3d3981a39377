"""Real weights and real data: stories260K is tuned on WikiSQL and GSM8K, and the page says what its ledger says.

Runs are skipped where HOLDFAST_DATA does not name the folder with tinylm/, shift/ and capability/.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
from holdfast.drift.ledger import Ledger

from studies import real_weights

ROOT = Path(__file__).resolve().parents[2]
LEDGER, PAGE = ROOT / "docs/results/real-weights/ledger.jsonl", ROOT / "docs/real-weights.md"
DATA = Path(os.environ.get("HOLDFAST_DATA", ""))
HAVE = "HOLDFAST_DATA" in os.environ and (DATA / "tinylm/stories260K.bin").is_file()
needs_data = pytest.mark.skipif(not HAVE, reason="HOLDFAST_DATA is not set to the folder with tinylm/stories260K.bin")


@pytest.mark.skipif(not LEDGER.is_file(), reason="the experiment has not been run: make real")
def test_the_page_is_the_one_that_its_ledger_gives():
    assert PAGE.read_text() == real_weights.page(LEDGER)


@pytest.mark.slow
@pytest.mark.real
@needs_data
@pytest.mark.parametrize("task", ["sql", "gsm8k"])
def test_a_short_run_learns_the_task_and_reports_the_stories(tmp_path, monkeypatch, task):
    """With and without Target-Masked KL: the task is learnt, stories are measured, and the page compares the two."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        real_weights,
        "SETTINGS",
        {"plain LoRA": [{"learning_rate": 1e-3}], "target_masked_kl": [{"learning_rate": 1e-3, "strength": 1.0}]},
    )
    monkeypatch.setattr(real_weights, "SCALES", (0.5, 1.0))
    sizes = {"train": 400, "validation": 32, "test": 64}
    ledger = real_weights.run(DATA, tmp_path / "work", [task], [0], 40, sizes)
    entries = Ledger(ledger).entries(task, split="test")
    base, ends = entries[0], {e.arm: e for e in entries if e.settings.get("scale") == 1.0}
    assert 1.0 < base.scores["story_loss"].value < 1.5  # the entropy of its own stories, about
    for entry in ends.values():
        learnt = base.scores["target_loss"].value - entry.scores["target_loss"].value
        assert learnt > 1.0
        assert math.isfinite(entry.scores["story_loss"].value)
        assert (
            entry.scores["story_loss"].value > base.scores["story_loss"].value
        )  # sampled from the base: it is the best
    text = real_weights.page(ledger)
    assert real_weights.TASKS[task] in text
    assert "(one seed)" in text
