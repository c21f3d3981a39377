"""Real weights and real data: stories260K is tuned on WikiSQL and GSM8K, and the page says what its ledger says.

Runs are skipped where HOLDFAST_DATA does not name the folder with tinylm/, shift/, capability/ and text/.
"""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from holdfast.analysis.frontier import Comparison, Reading
from holdfast.analysis.points import points
from holdfast.drift.ledger import Entry, Ledger, Score
from peft.helpers import rescale_adapter_scale

import tiny
from studies.real_weights import arms, rows
from studies.real_weights.arms import ARMS, BATCH, BOTH, PLAIN, REPLAY, REPLAYED, TASKS, Job, Setting, jobs
from studies.real_weights.judging import Plain, mean_loss
from studies.real_weights.page import lacking, page
from studies.real_weights.readings import KEPT, KINDS, LEARNT, OTHERS, Share, bounds, neighbours, share_of_rise
from studies.real_weights.sweep import publish, run
from studies.real_weights.verdicts import price

ROOT = Path(__file__).resolve().parents[2]
LEDGER, PAGE = ROOT / "docs/results/real-weights/ledger.jsonl", ROOT / "docs/real-weights.md"
DATA = Path(os.environ.get("HOLDFAST_DATA", ""))
HAVE = "HOLDFAST_DATA" in os.environ and (DATA / "tinylm/stories260K.bin").is_file()
needs_data = pytest.mark.skipif(not HAVE, reason="HOLDFAST_DATA is not set to the folder with tinylm/stories260K.bin")


@pytest.mark.skipif(not LEDGER.is_file(), reason="the experiment has not been run: make real")
def test_the_page_is_the_one_that_its_ledger_gives():
    assert PAGE.read_text(encoding="utf-8") == page(LEDGER)


def test_every_arm_is_tried_on_every_task_with_steps_of_eight_sequences():
    for task in TASKS:
        todo = jobs(task, [0, 1], list(ARMS), Path())
        assert {job.arm for job in todo} == {*ARMS}
        keys = [key for job in todo for key in Job.keys(job)]
        assert len(set(keys)) == len(keys)
        assert TASKS[task].judged in TASKS[task].levels
        for job in todo:
            made = ARMS[job.arm].methods(job.setting.strength or 0.0)
            assert bool(made) == (job.arm != PLAIN)
            assert (job.setting.strength is None) == (job.arm == PLAIN)
            assert all(method.strength > 0 for method in made)
            shares = {method.share for method in made if method.uses_retain}
            replayed = REPLAYED if shares else 0
            assert ARMS[job.arm].batch + replayed == BATCH
            assert shares <= {replayed / BATCH}
            assert job.points[-1] == job.setting.steps == max(job.points)
    prompt = ARMS[BOTH].methods(3.0)[1]
    assert (prompt.positions, prompt.strength, ARMS[BOTH].methods(3.0)[0].strength) == ("prompt", 1.0, 3.0)


def test_a_merged_adapter_is_the_adapter_at_that_strength(tmp_path):
    """Of a model whose own forward was changed, as TRL changes it: the judged one must not be a copy of that."""
    tiny.llama().save_pretrained(tmp_path / "stories260K")
    tiny.tokenizer().save_pretrained(tmp_path / "stories260K")
    adapted = tiny.lora(tiny.llama()).eval()
    tiny.shake(adapted)
    plain, [batch] = Plain(tmp_path), tiny.batches(1)
    ids = {name: batch[name] for name in ("input_ids", "attention_mask")}
    for scale in (1.0, 0.5, 0.0):
        with rescale_adapter_scale(adapted, scale), torch.no_grad():
            expected = adapted(**ids).logits
        with torch.no_grad():
            found = plain.merge(adapted, scale)(**ids).logits
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_the_loss_of_a_row_is_that_of_its_supervised_tokens():
    model = tiny.llama().eval()
    own = [{"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]}, {"input_ids": [9, 5], "labels": [9, 5]}]
    expected = []
    for row in own:
        with torch.no_grad():
            logits = model.double()(input_ids=torch.tensor([row["input_ids"]])).logits[0]
        told = [(place, label) for place, label in enumerate(row["labels"]) if place and label >= 0]
        losses = [-torch.log_softmax(logits[place - 1], -1)[label].item() for place, label in told]
        expected.append(sum(losses) / len(losses))
    found = mean_loss(model.float(), own)
    assert found.items == pytest.approx(expected, abs=1e-4)
    assert found.value == pytest.approx(sum(expected) / 2, abs=1e-4)


@pytest.mark.parametrize(
    ("mine", "share", "word"),
    [
        ((1.1, 1.1, 1.1), 0.1, "met"),
        ((1.05, 1.2, 1.4), math.exp(np.mean(np.log([0.05, 0.2, 0.4]))), "met on average, not beyond noise"),
        ((1.5, 1.5, 1.5), 0.5, "missed"),
    ],
)
def test_the_bar_is_met_where_the_interval_says_so(mine, share, word):
    """Base 1.0; the rival rises by 1 in every seed."""

    def reading(values):
        samples = {seed: np.full(201, value) for seed, value in enumerate(values)}
        return Reading("an arm", KEPT, 0.9, samples, (0, 1, 2), 0.0, (1, 1))

    one = Comparison(reading(mine), reading((2.0, 2.0, 2.0)), KINDS[KEPT], (0, 1, 2), 0.0, 0.0, 0.0)
    found = share_of_rise(one, Score(1.0))
    assert found.value == pytest.approx(share)
    assert found.met(0.2) == word
    assert share_of_rise(replace(one, seeds=()), Score(1.0)).met(0.2) == "not reached"
    still = replace(one, baseline=reading((1.0, 1.1, 0.9)))
    assert math.isnan(share_of_rise(still, Score(1.0)).value)


def ledger_of(**losses):
    """Entries of one seed: by arm and steps, target loss and story loss, the other texts as the stories."""
    made = []
    for split in ("validation", "test"):
        found = [("base", {"scale": 0.0}, 8.0, 1.0)]
        found += [(arm, {"steps": step}, *loss) for arm, some in losses.items() for step, loss in enumerate(some)]
        for arm, settings, target, story in found:
            scores = {LEARNT: Score(target), KEPT: Score(story), **{name: Score(story - 0.5) for name in OTHERS}}
            made.append(Entry("sql", arm, settings, 0, split, scores))
    return made


def test_what_was_not_run_is_said():
    whole = [
        Entry("sql", job.arm, job.settings(step, scale), job.seed, "test", {LEARNT: Score(1.0)})
        for job in jobs("sql", [0, 1], list(ARMS), Path())
        for step in job.points
        for scale in job.scales
    ]
    assert lacking(whole, "sql") == ""
    assert "*full KL* (" in lacking([entry for entry in whole if entry.arm != "full KL"], "sql")
    last = [entry for entry in whole if (entry.arm, entry.seed, entry.settings["learning_rate"]) != (PLAIN, 1, 1e-3)]
    assert lacking(last, "sql").endswith(f"*{PLAIN}* (0.001).")


def test_without_a_line_the_nearest_points_are_read_to_the_disadvantage_of_self_replay():
    losses = {PLAIN: [(1.0, 1.8), (0.7, 3.0)], REPLAY: [(1.1, 1.05), (0.8, 1.2)]}
    entries = ledger_of(**losses)
    found = bounds(entries, 0.9, Score(1.0))
    assert found.value == pytest.approx(0.2 / 0.8)
    assert [[point.settings["steps"] for point in neighbours(points(entries), arm, 0, 0.9)] for arm in losses] == [
        [0, 1],
        [0, 1],
    ]
    nothing = bounds(ledger_of(**{PLAIN: [(1.0, 1.8)], REPLAY: [(1.1, 1.05)]}), 0.9, Score(1.0))
    assert nothing.met(0.2) == Share(math.nan, math.nan, math.nan).met(0.2) == "not reached"


def test_the_price_tells_a_gain_from_a_loss():
    worse = price(ledger_of(**{PLAIN: [(0.9, 2.0)], REPLAY: [(0.9, 1.2)]}), "sql")
    assert "no gain to give up" in worse
    better = price(ledger_of(**{PLAIN: [(0.9, 0.6)], REPLAY: [(0.9, 0.8)]}), "sql")
    assert "50% of a gain of 0.400 is given up" in better
    kept = price(ledger_of(**{PLAIN: [(0.9, 0.8)], REPLAY: [(0.9, 0.6)]}), "sql")
    assert "of a gain of 0.200 nothing is given up" in kept


@needs_data
def test_what_is_judged_is_of_one_split_alone():
    for task in TASKS:
        whole = {
            part: [row["prompt"] + row["completion"] for row in rows.task_rows(task, DATA, part)]
            for part in ("train", "validation", "test")
        }
        assert len(whole["validation"]) == 1000
        for part in ("validation", "test"):
            others = {row for name, some in whole.items() if name != part for row in some}
            assert sum(row in others for row in whole[part]) < 0.01 * len(whole[part])  # asked twice in the data
    for file in rows.TEXTS.values():
        found = [row["text"] for row in rows.pieces(DATA / file, 20)]
        assert len({text[:80] for text in found}) == 20
        assert not any("<unk>" in text[: 3 * rows.LONGEST] for text in found)


@pytest.mark.slow
@pytest.mark.real
@needs_data
@pytest.mark.parametrize("task", ["sql", "gsm8k"])
def test_a_short_run_learns_the_task_and_reports_the_stories(tmp_path, monkeypatch, capsys, task):
    """With and without self-replay: the task is learnt, stories are measured, the page compares the two."""
    monkeypatch.setattr(arms, "JUDGED_AFTER", (0.5, 1.0))
    monkeypatch.setattr(rows, "POOL", 16)
    sizes, texts = {"train": 400, "validation": 16, "test": 32}, {"validation": 4, "test": 8}
    work, ledger = tmp_path / "work", tmp_path / "ledger.jsonl"
    rows.complete(DATA, work, sizes, texts)
    todo = [
        Job(task, PLAIN, Setting(3e-3, 40), 0, work, (0.5, 1.0)),
        Job(task, REPLAY, Setting(3e-3, 40, 1.0), 0, work),
    ]
    run(todo, work / "ledger.jsonl", 1)
    lines = (work / "ledger.jsonl").read_text()
    run(todo, work / "ledger.jsonl", 1)
    assert "2 of 2 runs are in" in capsys.readouterr().out
    assert (work / "ledger.jsonl").read_text() == lines

    entries = Ledger(work / "ledger.jsonl").entries(task, split="test")
    base, ends = entries[0].scores, {e.arm: e.scores for e in entries if e.settings.get("steps") == 40}
    assert 1.0 < base[KEPT].value < 1.5  # the entropy of its own stories, about
    for found in ends.values():
        assert base[LEARNT].value - found[LEARNT].value > 1.0
        assert found[KEPT].value > base[KEPT].value  # sampled from the base: it is the best
        assert all(math.isfinite(found[name].value) for name in OTHERS)
    assert ends[REPLAY][KEPT].value < ends[PLAIN][KEPT].value
    plain = [e.scores[LEARNT].value for e in entries if e.arm == PLAIN]
    assert len(set(plain)) == 4  # two numbers of steps and two scales, which all differ

    publish(work / "ledger.jsonl", ledger)
    text = page(ledger, tmp_path)
    assert (tmp_path / f"{task}.png").is_file()
    for told in (f"## {TASKS[task].title}", "**The price, ", f"| {REPLAY} |", f"Each other arm against {PLAIN}"):
        assert told in text
    assert ("**The bar.**" in text) == (task == "sql")
