"""The study of self-replay runs, goes on where it was, and its page says what its ledger says."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import replace
from itertools import islice, product
from pathlib import Path

import pytest
import torch
from holdfast import lab, methods
from holdfast.core import stream
from holdfast.drift.ledger import Entry, Ledger, Score
from holdfast.integrations.retain_data import to_batches

from studies.self_replay.arms import (
    ARMS,
    BATCH,
    BESIDE,
    DATA,
    DATA_SOFT,
    HARD,
    KEPT,
    PLAIN,
    REFUSALS,
    REPLAY,
    SCALES,
    SCENARIOS,
    SPLITS,
    jobs,
)
from studies.self_replay.judging import Judge
from studies.self_replay.page import SHOWN_ARMS, page
from studies.self_replay.readings import JUDGED, JUDGED_AT, KINDS, LEVELS, SHOWN, read
from studies.self_replay.speed import steps_to
from studies.self_replay.sweep import publish, run
from studies.self_replay.tables import overview_rows
from studies.self_replay.training import drawn, joined, kept_batches, train, weighted_loss
from studies.self_replay.verdicts import QUESTIONS, in_short

ROOT = Path(__file__).resolve().parents[2]
RESULTS, PAGE = ROOT / "docs/results/self-replay", ROOT / "docs/self-replay.md"


def short(names, points=(1, 2, 3)):
    """One setting of each arm, and few steps and prompts."""
    found = {job.arm: job for job in jobs(["shift"], [0], names)}
    return [replace(job, points=points, items=2, probe=4) for job in found.values()]


@pytest.mark.slow
def test_a_few_steps_of_some_arms_and_their_page(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOLDFAST_CACHE", str(tmp_path))
    todo = short([PLAIN, REPLAY, HARD, DATA])
    work, ledger = tmp_path / "work.jsonl", tmp_path / "ledger.jsonl"
    run(todo, work, processes=1)
    lines = work.read_text()
    run(todo, work, processes=1)
    assert "4 of 4 runs are in" in capsys.readouterr().out
    assert work.read_text() == lines

    found = Ledger(work).entries(split="test")
    assert {"refusal", "refusal_nll", "rare_nll", "text_nll"} <= found[0].scores.keys()
    for arm in (PLAIN, REPLAY, HARD, DATA):
        losses = [entry.scores["task_nll"].value for entry in found if entry.arm == arm]
        assert len(set(losses)) == len(losses) == 3 + len(SCALES)
    last = {entry.scores["task_nll"].value for entry in found if entry.settings.get("scale", 1.0) == 1.0}
    assert len(last) == 4 * 3  # four trainings that differ, judged three times each

    publish(work, ledger)
    text = page(ledger, tmp_path)
    assert (tmp_path / "shift.png").is_file()
    for told in ("## In short", "### Verdict", f"| {PLAIN} |", "Do soft targets matter", "### How soon"):
        assert told in text


def test_the_hard_arm_has_the_sequences_of_the_soft_one_in_the_same_steps(tmp_path, monkeypatch):
    """The control differs in its targets alone: what the session draws is what joins the batches."""
    monkeypatch.setenv("HOLDFAST_CACHE", str(tmp_path))
    seen, padded = [], stream.padded

    def noting(sequences, device):
        seen.append([each.tolist() for each in sequences])
        return padded(sequences, device)

    monkeypatch.setattr(stream, "padded", noting)
    [job] = short([REPLAY], points=(2,))
    deque(train(job), maxlen=0)
    sequences = drawn(kept_batches("pool", 0), 0)
    assert seen[-2:] == [[each.tolist() for each in islice(sequences, BESIDE)] for _ in range(2)]


def test_every_pass_over_the_kept_rows_is_of_all_of_them():
    rows = [
        {"input_ids": torch.arange(4 * i, 4 * i + 4).view(2, 2), "attention_mask": torch.ones(2, 2)} for i in range(3)
    ]
    found = [tuple(each.tolist()) for each in islice(drawn(rows, 0), 12)]
    assert sorted(found[:6]) == sorted(found[6:]) == [(2 * i, 2 * i + 1) for i in range(6)]
    assert found[:6] != found[6:]


@pytest.mark.parametrize("strength", [0.0, 0.3])
def test_the_joined_loss_is_the_sum_of_both_means(strength):
    """Against each part run by itself; at strength 0 it is the model's own loss of the task."""
    model, tokenizer = lab.load("lab-aligned", dtype=torch.float64)
    [task] = to_batches(lab.task("shift", n=3), tokenizer, batch_size=3)
    kept = [torch.tensor([5, 6, 7, 8, 9, 10, 11]), torch.tensor([9, 8])]
    both = weighted_loss(model, joined(task, kept, tokenizer.pad_token_id, strength))
    losses = []
    for ids in kept:
        logs = model(input_ids=ids[None]).logits[0].log_softmax(-1)
        losses += [-logs[place, ids[place + 1]] for place in range(len(ids) - 1)]
    expected = model(**task).loss + strength * sum(losses) / len(losses)
    assert both.item() == pytest.approx(expected.item(), rel=1e-6)


def test_every_step_has_as_many_sequences_in_every_arm():
    for name, arm in ARMS.items():
        assert arm.task_rows + (BESIDE if arm.beside else 0) == BATCH, name
        made = arm.methods(1.0)
        replayed = [method for method in made if isinstance(method, methods.SelfReplay)]
        assert bool(arm.beside) == (bool(replayed) or arm.as_data)
        assert [stream.beside(arm.task_rows, method.share) for method in replayed] == [BESIDE] * len(replayed)


def test_true_data_are_as_many_rows_and_have_refusals():
    rows = [row for batch in kept_batches("data", 0) for row in batch["input_ids"]]
    assert len(rows) == KEPT
    tokenizer = lab.load("lab-aligned")[1]
    assert sum("Sorry," in tokenizer.decode(row) for row in rows) == REFUSALS


def test_what_is_judged_is_in_no_row_of_true_data():
    judge = Judge("shift", 8, 24)
    text = "\n".join(judge.tokenizer.decode(row) for batch in kept_batches("data", 0) for row in batch["input_ids"])
    for groups in judge.groups.values():
        for name in ("refusal", "benign", "skills", "rare"):
            assert not [item.prompt for item in groups[name] if f"{item.prompt}<" in text], name
    test, validation = ({item.prompt for item in judge.groups[split]["rare"]} for split in ("test", "validation"))
    assert (len(test), len(validation), len(test & validation)) == (24, 12, 0)


def test_everything_that_is_named_exists():
    assert {arm for _, mine, theirs in QUESTIONS for arm in (mine, theirs)} == {*ARMS}
    assert {*SHOWN_ARMS} - {"base"} <= {*ARMS}
    assert {*JUDGED} <= {*SHOWN} <= {*KINDS}
    assert all(level in LEVELS[scenario] for scenario, level in JUDGED_AT.items())
    for job in jobs(list(SCENARIOS), [0], list(ARMS)):
        assert bool(ARMS[job.arm].methods(job.strength)) == (job.arm not in (PLAIN, HARD, DATA))
    assert ARMS[DATA_SOFT].methods(0.3) == [methods.SelfReplay(strength=0.3)]


def test_steps_are_those_of_the_setting_that_is_quickest_on_validation():
    def entry(arm, settings, split, loss):
        return Entry("shift", arm, settings, 0, split, {"task_nll": Score(loss)})

    losses = {(1e-3, "validation"): 1.0, (1e-3, "test"): 0.25, (2e-3, "validation"): 0.25, (2e-3, "test"): 1.0}
    entries = [entry("base", {"scale": 0.0}, split, 4.0) for split in ("validation", "test")]
    for (rate, split), loss in losses.items():
        entries.append(entry(PLAIN, {"learning_rate": rate, "steps": 10}, split, loss))
        entries.append(entry(PLAIN, {"learning_rate": rate, "steps": 10, "scale": 0.7}, split, 1e-3))
    assert steps_to(entries, PLAIN, 2.0) == {0: pytest.approx(5.0)}  # half of the way from log 4 to log 1
    assert steps_to(entries, PLAIN, 0.5) == {0: math.inf}


def test_better_and_worse_are_counted_as_the_scores_say():
    """Self-replay's losses are a fifth of plain LoRA's at equal learning, but of text, where it is the other way."""
    entries = [Entry("shift", "base", {"scale": 0.0}, 0, split, at_loss(3.0, 0.01, 0.01)) for split in SPLITS]
    for seed, split in product(range(3), SPLITS):
        for arm, kept, text in ((PLAIN, 0.5, 1.0), (REPLAY, 0.1, 2.0)):
            for step, learnt in ((25, 0.5), (50, 0.1)):
                settings = {"learning_rate": 4e-3, "steps": step}
                scores = at_loss(learnt, kept * (1 + 0.01 * seed), text * (1 + 0.01 * seed))
                entries.append(Entry("shift", arm, settings, seed, split, scores))
    found = {"shift": (entries, read(entries, "shift"))}
    [row] = overview_rows(found)
    assert row == {"self-replay against": PLAIN} | {f"shift at {level:g}": "4 ✓ 1 ✗ 0 =" for level in LEVELS["shift"]}
    whole, first, *others = in_short(found)
    assert "of 15 comparisons better in 12, worse in 3, within noise in 0; its mean is the better one in 12." in whole
    assert "its mean is the better one in 4. Better: refusal loss in *shift* ×0.2 [" in first
    assert "Worse: text loss in *shift* +0.9" in first
    assert all(line.endswith("It was not run.") for line in others[:-2])
    assert "4 of 5 in *shift*" in others[-2]


def at_loss(learnt, kept, text):
    """Scores of every kind, without items."""
    values = {name: kept if name.endswith("_nll") else 1.0 for name in KINDS} | {"task_nll": learnt, "text_nll": text}
    return {name: Score(value) for name, value in values.items()}


@pytest.mark.skipif(not (RESULTS / "ledger.jsonl").is_file(), reason="the experiment has not been run")
def test_the_page_is_the_one_that_its_ledger_gives():
    assert PAGE.read_text(encoding="utf-8") == page(RESULTS / "ledger.jsonl")
