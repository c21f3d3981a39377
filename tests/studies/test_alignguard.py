"""The ablation of AlignGuard-LoRA runs, goes on where it was, and its page says what its ledger says."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from holdfast import methods
from holdfast.analysis.frontier import Comparison, Reading
from holdfast.drift.ledger import Ledger, Score

from studies.alignguard import arms, story_rows
from studies.alignguard.arms import DECAY, FULL, PAPER, PLAIN, PROJECTED, SCENARIOS, TERMS, jobs
from studies.alignguard.judging import LabJudge
from studies.alignguard.page import SHOWN_ARMS, page
from studies.alignguard.readings import JUDGED, JUDGED_AT, KINDS, LEVELS, SHOWN, Share, share_of_drift
from studies.alignguard.sweep import publish, run
from studies.alignguard.training import retain_rows
from studies.alignguard.verdicts import QUESTIONS

ROOT = Path(__file__).resolve().parents[2]
RESULTS, PAGE = ROOT / "docs/results/alignguard", ROOT / "docs/alignguard.md"
DATA = Path(os.environ.get("HOLDFAST_DATA", ""))
HAVE = "HOLDFAST_DATA" in os.environ and (DATA / "tinylm/stories260K.bin").is_file()


def short(scenario, names, work):
    """One strength of each arm, and few steps, rows and prompts."""
    found = {job.arm: job for job in jobs([scenario], [0], names, work)}
    return [replace(job, points=(1, 3), items=2, probe=4) for job in found.values()]


def with_few_rows(monkeypatch, scenario):
    monkeypatch.setitem(arms.SCENARIOS, scenario, replace(SCENARIOS[scenario], rows=8))


@pytest.mark.slow
def test_a_few_steps_of_some_arms_and_their_page(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOLDFAST_CACHE", str(tmp_path))
    with_few_rows(monkeypatch, "shift")
    todo = short("shift", [PLAIN, DECAY, FULL, PAPER, "without overlap"], tmp_path)
    work, ledger = tmp_path / "work.jsonl", tmp_path / "ledger.jsonl"
    run(todo, work, processes=1)
    lines = work.read_text()
    run(todo, work, processes=1)
    assert "5 of 5 runs are in" in capsys.readouterr().out
    assert work.read_text() == lines

    scores = {(e.arm, *e.settings.values()): e.scores for e in Ledger(work).entries(split="test")}
    plain = [found["task_nll"].value for (arm, *_), found in scores.items() if arm == PLAIN]
    assert len(set(plain)) == 4  # two step counts and two scales, which all differ
    assert sum(arm == PROJECTED for arm, *_ in scores) == len(arms.THRESHOLDS)
    assert {"refusal", "refusal_nll", "text_nll"} <= scores["base", 0.0].keys()

    publish(work, ledger)
    text = page(ledger, tmp_path)
    assert (tmp_path / "shift.png").is_file()
    for told in (
        f"## {SCENARIOS['shift'].title}",
        "## In short",
        "### Verdict",
        f"| {PLAIN} |",
        "Is the full form better",
    ):
        assert told in text


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.skipif(not HAVE, reason="HOLDFAST_DATA is not set to the folder with tinylm/ and shift/")
def test_a_few_steps_on_real_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("HOLDFAST_CACHE", str(tmp_path))
    with_few_rows(monkeypatch, "stories")
    monkeypatch.setattr(story_rows, "STORIES", 8)
    story_rows.prepare(DATA, tmp_path, {"train": 40, "validation": 4, "test": 6})
    run(short("stories", [PLAIN, FULL], tmp_path), tmp_path / "ledger.jsonl", processes=1)
    found = {e.arm: e.scores for e in Ledger(tmp_path / "ledger.jsonl").entries("stories", split="test")}
    assert found[PLAIN]["target_loss"].value < found["base"]["target_loss"].value
    assert found[PLAIN]["target_loss"].value != found[FULL]["target_loss"].value


def test_every_arm_that_is_named_exists_and_is_made_everywhere():
    known = {*arms.ARMS, PROJECTED}
    assert {arm for _, mine, theirs in QUESTIONS for arm in (mine, theirs)} <= known
    assert {*SHOWN_ARMS} - {"base"} <= known
    assert {f"without {term}" for term in TERMS} | {f"{term} alone" for term in TERMS} <= known
    for job in jobs(list(SCENARIOS), [0], list(arms.ARMS), Path()):
        scenario = SCENARIOS[job.scenario]
        made = arms.ARMS[job.arm].methods(scenario, job.strength)
        assert bool(made) == (job.arm != PLAIN)
        assert {data for method in made for data in getattr(method, "data", ())} <= {*scenario.kept}


def test_the_papers_form_is_that_of_the_preset():
    rows = [{"text": "a"}]
    preset = methods.alignguard_lora(rows, task=rows, form="paper", strength=3.0)
    ours = arms.ARMS[PAPER].methods(SCENARIOS["shift"], 3.0)
    assert [replace(method, rows=256) for method in ours] == list(preset)


def test_every_level_that_is_judged_is_shown():
    for scenario, level in JUDGED_AT.items():
        assert level in LEVELS[scenario]
        assert {*JUDGED[scenario]} <= {*SHOWN[scenario]} <= {*KINDS}


def test_what_is_judged_was_never_trained_on_nor_in_a_fisher():
    groups = LabJudge("shift", 6, 24).groups
    judged = {split: {item.prompt for item in groups[split]["refusal"] + groups[split]["benign"]} for split in groups}
    retain = retain_rows("shift", 0, 32)
    prompts = {row["prompt"][0]["content"] for name in ("alignment", "skills", "task") for row in retain[name]}
    assert not judged["validation"] & judged["test"]
    assert not prompts & (judged["validation"] | judged["test"])
    assert {name: len(rows) for name, rows in retain.items()} == dict.fromkeys(
        ("alignment", "skills", "text", "task"), 32
    )
    assert not any("<|user|>" in row["text"] for row in retain["text"])


@pytest.mark.parametrize(
    ("mine", "share", "word"),
    [((0.3, 0.31, 0.29), 0.25, "yes"), ((0.4, 0.7, 0.2), 0.4167, "on average"), ((0.9, 0.8, 0.7), 0.875, "no")],
)
def test_drift_is_halved_where_the_interval_says_so(mine, share, word):
    """Base 0.1; the rival drifts to 0.9 in every seed: half its drift ends at 0.5."""

    def reading(values):
        samples = {seed: np.full(201, value) for seed, value in enumerate(values)}
        return Reading("an arm", "skills_nll", 0.3, samples, (0, 1, 2), 0.0, (1, 1))

    one = Comparison(reading(mine), reading((0.9, 0.9, 0.9)), KINDS["skills_nll"], (0, 1, 2), 0.0, 0.0, 0.0)
    base = Score(0.1)
    found = share_of_drift(one, base)
    assert found == Share(pytest.approx(share, abs=1e-3), word)
    nothing = share_of_drift(replace(one, seeds=()), base)
    assert math.isnan(nothing.share)
    assert nothing.verdict == "not reached"
    firm = share_of_drift(replace(one, baseline=reading((0.1, 0.2, 0.05))), base)
    assert firm.verdict == "nothing to halve"


@pytest.mark.skipif(not (RESULTS / "ledger.jsonl").is_file(), reason="the experiment has not been run")
def test_the_page_is_the_one_that_its_ledger_gives():
    assert PAGE.read_text(encoding="utf-8") == page(RESULTS / "ledger.jsonl")
