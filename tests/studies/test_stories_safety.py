"""Stories and refusals: the experiment runs, goes on where it was, and its page says what its ledger says.

Runs are skipped where HOLDFAST_DATA does not name the folder with tinylm/, safety/, benign/ and text/.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
from holdfast.drift.ledger import Ledger

from studies.stories_safety import arms, rows
from studies.stories_safety.page import page
from studies.stories_safety.sweep import jobs, publish, run

ROOT = Path(__file__).resolve().parents[2]
RESULTS, PAGE = ROOT / "docs/results/stories-safety", ROOT / "docs/stories-safety.md"
DATA = Path(os.environ.get("HOLDFAST_DATA", ""))
HAVE = "HOLDFAST_DATA" in os.environ and (DATA / "safety/advbench_prompts.jsonl").is_file()
needs_data = pytest.mark.skipif(
    not HAVE, reason="HOLDFAST_DATA is not set to the folder with tinylm/, safety/, benign/ and text/"
)
SIZES = {"train": 16, "stories": 8, "benign": 4, "validation": 4, "test": 6}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A working folder with the model and few rows: to sample them takes most of the time."""
    folder = tmp_path_factory.mktemp("stories-safety")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "SEEDS", (0,))
        rows.prepare(DATA, folder, SIZES)
    return folder


@pytest.mark.real
@needs_data
def test_a_few_steps_of_two_arms_and_their_page(work, tmp_path, capsys, monkeypatch):
    names = ["naive", "OGPSA as published"]
    for name in names:
        monkeypatch.setitem(arms.ARMS, name, replace(arms.ARMS[name], rates=(2e-3,)))
    short = [replace(job, points=(1, 3), scales=(0.5,)) for job in jobs(names, [0])]
    ledger = run(short, DATA, work, SIZES)
    lines = ledger.read_text()
    run(short, DATA, work, SIZES)
    assert "2 of 2 runs are in" in capsys.readouterr().out
    assert ledger.read_text() == lines

    scores = {(e.arm, e.settings["steps"]): e.scores for e in Ledger(ledger).entries(split="test") if e.arm in names}
    base = Ledger(ledger).entries(arm="base", split="test")[0].scores
    for arm in names:
        assert scores[arm, 3]["target_loss"].value < base["target_loss"].value
    scaled = {e.settings["scale"]: e.scores for e in Ledger(ledger).entries(arm=arms.SCALED, split="test")}
    assert scaled[1.0] == scores["naive", 3]
    assert scaled[0.5]["target_loss"].value > scores["naive", 3]["target_loss"].value

    publish(ledger, tmp_path / "ledger.jsonl")
    text = page(tmp_path / "ledger.jsonl", tmp_path)
    assert (tmp_path / "frontier.png").is_file()
    for told in ("## In words", "Does OGPSA as published help?", "| adapter scaling |", "CPU seconds a step"):
        assert told in text


@pytest.mark.real
@needs_data
def test_what_is_measured_was_never_trained_on(work):
    found = rows.prepare(DATA, work, SIZES)
    kept = [row for sets in found["retain"].values() for each in sets.values() for row in each]
    trained = {tuple(row["input_ids"]) for row in [*kept, *found["train"]]}
    groups = {split: [row for group in found[split].values() for row in group] for split in arms.SPLITS}
    measured = {split: {tuple(row["input_ids"]) for row in group} for split, group in groups.items()}
    assert not trained & (measured["validation"] | measured["test"])
    assert not measured["validation"] & measured["test"]
    for row in (*groups["test"], *found["train"]):
        prompt = row["labels"].count(-100)
        assert prompt <= arms.LONGEST
        assert row["labels"][prompt:] == row["input_ids"][prompt:]
    prompts = rows.harmful(DATA)
    assert not set(prompts["train"]) & {*prompts["validation"], *prompts["test"]}


@pytest.mark.skipif(not (RESULTS / "ledger.jsonl").is_file(), reason="the experiment has not been run")
def test_the_page_is_the_one_that_its_ledger_gives():
    assert PAGE.read_text(encoding="utf-8") == page(RESULTS / "ledger.jsonl")
