"""The experiment on the alignment tax runs, goes on where it was, and its page says what its ledger says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from holdfast.drift.ledger import Ledger

from studies.alignment_tax import arms
from studies.alignment_tax.judging import judge_of
from studies.alignment_tax.page import DRAWN, TITLES, page
from studies.alignment_tax.readings import told_of
from studies.alignment_tax.sweep import jobs, publish, run
from studies.alignment_tax.training import retain_rows
from studies.alignment_tax.verdicts import QUESTIONS

ROOT = Path(__file__).resolve().parents[2]
RESULTS, PAGE = ROOT / "docs/results/alignment-tax", ROOT / "docs/alignment-tax.md"


def test_a_few_steps_of_two_arms_and_their_page(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(arms, "SCALES", (0.5, 1.0))
    chosen = (("sft", "naive"), ("sft", "replay"), ("dpo", "as published"))
    whole = jobs(["sft", "dpo"], [0], ["naive", "replay", "as published"])
    one_rate = [job for job in whole if job.learning_rate == 2e-3 and (job.pipeline, job.arm) in chosen]
    short = [replace(job, points=(1, 3), items=4, probe=4) for job in one_rate]
    work, ledger = tmp_path / "work.jsonl", tmp_path / "ledger.jsonl"
    run(short, work, processes=1)
    lines = work.read_text()
    run(short, work, processes=1)
    assert "3 of 3 runs are in" in capsys.readouterr().out
    assert work.read_text() == lines
    publish(work, ledger)
    text = page(ledger, tmp_path)
    assert (tmp_path / "sft.png").is_file()
    for told in ("## SFT on refusals", "## DPO on pairs", "| adapter scaling |", "Does replay help?"):
        assert told in text


def test_every_arm_that_the_page_names_exists():
    known = set(told_of())
    assert {arm for _, mine, theirs in QUESTIONS for arm in (mine, theirs)} <= known
    assert set(DRAWN) <= known


def test_every_pipeline_is_judged_has_arms_and_a_title():
    used = {pipeline for arm in arms.ARMS.values() for pipeline in arm.pipelines}
    assert used == set(arms.STAGES) == set(arms.POINTS) == set(TITLES)


def test_what_is_judged_was_never_trained_on():
    retain = retain_rows("all", seed=0)
    prompts = {row["prompt"][0]["content"] for row in retain["chat"]}
    groups = judge_of(24, 48).groups
    judged = {split: {item.prompt for item in groups[split]["refusal"] + groups[split]["benign"]} for split in groups}
    assert not judged["validation"] & judged["test"]
    assert not prompts & (judged["validation"] | judged["test"])
    assert any(row["completion"][0]["content"].startswith("To ") for row in retain["chat"])
    without = retain_rows("no look-alikes", seed=0)["chat"]
    assert len(without) == len(retain["chat"])
    assert not any(row["completion"][0]["content"].startswith("To ") for row in without)


@pytest.mark.skipif(not (RESULTS / "ledger.jsonl").is_file(), reason="the experiment has not been run")
def test_the_page_is_the_one_that_its_ledger_gives():
    assert Ledger(RESULTS / "ledger.jsonl").entries()
    assert PAGE.read_text(encoding="utf-8") == page(RESULTS / "ledger.jsonl")
