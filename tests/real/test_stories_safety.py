"""Stories and refusals: the experiment runs, goes on where it was, and its page says what its ledger says.

Runs are skipped where HOLDFAST_DATA does not name the folder with tinylm/, safety/, benign/ and text/.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from holdfast.drift.ledger import Ledger

ROOT = Path(__file__).resolve().parents[2]
RESULTS, PAGE = ROOT / "docs/results/stories-safety", ROOT / "docs/stories-safety.md"
DATA = Path(os.environ.get("HOLDFAST_DATA", ""))
HAVE = "HOLDFAST_DATA" in os.environ and (DATA / "safety/advbench_prompts.jsonl").is_file()
needs_data = pytest.mark.skipif(
    not HAVE, reason="HOLDFAST_DATA is not set to the folder with tinylm/, safety/, benign/ and text/"
)
SIZES = {"train": 16, "stories": 8, "benign": 4, "validation": 4, "test": 6}


@pytest.fixture(scope="module")
def example():
    folder = ROOT / "examples"
    sys.path.insert(0, str(folder))
    spec = importlib.util.spec_from_file_location("stories_safety", folder / "stories_safety.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]
    sys.path.remove(str(folder))


@pytest.fixture(scope="module")
def work(example, tmp_path_factory):
    """A working folder with the model and few rows: to sample them takes most of the time."""
    folder = tmp_path_factory.mktemp("stories-safety")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(example, "SEEDS", (0,))
        example.prepare(DATA, folder, SIZES)
    return folder


@pytest.mark.real
@needs_data
def test_a_few_steps_of_two_arms_and_their_page(example, work, tmp_path, capsys, monkeypatch):
    arms = ["naive", "OGPSA as published"]
    monkeypatch.setattr(example, "ARMS", {name: replace(example.ARMS[name], rates=(2e-3,)) for name in arms})
    short = [replace(job, points=(1, 3), scales=(0.5,)) for job in example.jobs(arms, [0])]
    ledger = example.run(short, DATA, work, SIZES)
    lines = ledger.read_text()
    example.run(short, DATA, work, SIZES)
    assert "2 of 2 runs are in" in capsys.readouterr().out
    assert ledger.read_text() == lines

    scores = {(e.arm, e.settings["steps"]): e.scores for e in Ledger(ledger).entries(split="test") if e.arm in arms}
    base = Ledger(ledger).entries(arm="base", split="test")[0].scores
    for arm in arms:
        assert scores[arm, 3]["target_loss"].value < base["target_loss"].value
    scaled = {e.settings["scale"]: e.scores for e in Ledger(ledger).entries(arm=example.SCALED, split="test")}
    assert scaled[1.0] == scores["naive", 3]
    assert scaled[0.5]["target_loss"].value > scores["naive", 3]["target_loss"].value

    example.publish(ledger, tmp_path / "ledger.jsonl")
    page = example.page(tmp_path / "ledger.jsonl", tmp_path)
    assert (tmp_path / "frontier.png").is_file()
    for told in ("## In words", "Does OGPSA as published help?", "| adapter scaling |", "CPU seconds a step"):
        assert told in page


@pytest.mark.real
@needs_data
def test_what_is_measured_was_never_trained_on(example, work):
    rows = example.prepare(DATA, work, SIZES)
    kept = [row for sets in rows["retain"].values() for each in sets.values() for row in each]
    trained = {tuple(row["input_ids"]) for row in [*kept, *rows["train"]]}
    groups = {split: [row for group in rows[split].values() for row in group] for split in example.SPLITS}
    measured = {split: {tuple(row["input_ids"]) for row in group} for split, group in groups.items()}
    assert not trained & (measured["validation"] | measured["test"])
    assert not measured["validation"] & measured["test"]
    for row in (*groups["test"], *rows["train"]):
        prompt = row["labels"].count(-100)
        assert prompt <= example.LONGEST
        assert row["labels"][prompt:] == row["input_ids"][prompt:]
    prompts = example.harmful(DATA)
    assert not set(prompts["train"]) & {*prompts["validation"], *prompts["test"]}


@pytest.mark.skipif(not (RESULTS / "ledger.jsonl").is_file(), reason="the experiment has not been run")
def test_the_page_is_the_one_that_its_ledger_gives(example):
    assert PAGE.read_text(encoding="utf-8") == example.page(RESULTS / "ledger.jsonl")
