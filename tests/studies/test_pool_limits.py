"""The study of the pool's limits runs, goes on where it was, and its page says what its ledger says."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from holdfast import lab
from holdfast.analysis.frontier import Reading
from holdfast.drift.ledger import Ledger, Score
from holdfast.lab import world
from holdfast.retain.kept import Kept, id_of
from holdfast.retain.pool import Pool

from studies.pool_limits import pools, shown
from studies.pool_limits.arms import ARMS, BATCH, BESIDE, PLAIN, SCENARIOS, TEXT, TINY, WHOLE, jobs
from studies.pool_limits.formats import FORMATS, answers, cipher, contexts
from studies.pool_limits.judging import Judge, in_other_words
from studies.pool_limits.page import SHOWN_ARMS, page
from studies.pool_limits.readings import JUDGED, KINDS, MAIN, judged_at
from studies.pool_limits.sweep import POOLS, publish, run
from studies.pool_limits.training import train, tuned
from studies.pool_limits.verdicts import ADDITIONS, REMOVED, SIZES, closed, fate, forgone

ROOT = Path(__file__).resolve().parents[2]
RESULTS, PAGE = ROOT / "docs/results/pool-limits", ROOT / "docs/pool-limits.md"


def short(scenario, names, work):
    """One rate of each arm, and few steps and prompts."""
    found = {job.arm: job for job in jobs([scenario], [0], names, work)}
    return [replace(job, points=(1, 3), items=2, probe=4) for job in found.values()]


def kept(text, kind="chat"):
    _, tokenizer = lab.load("lab-aligned")
    ids = tuple(tokenizer(text, add_special_tokens=False).input_ids)
    return Kept(id_of(ids), kind, "test", text, ids, 0)


def reading(arm, score, values):
    samples = {seed: np.full(201, value) for seed, value in enumerate(values)}
    return Reading(arm, score, 0.3, samples, (0, 1, 2), 0.0, (1, 1))


@pytest.mark.slow
def test_a_few_steps_of_some_arms_and_their_page(tmp_path, capsys):
    todo = short("shift", [PLAIN, TINY], tmp_path) + short("dense", [PLAIN], tmp_path)
    work, ledger = tmp_path / "work.jsonl", tmp_path / "ledger.jsonl"
    run(todo, work, processes=1)
    lines = work.read_text()
    run(todo, work, processes=1)
    assert "3 of 3 runs are in" in capsys.readouterr().out
    assert work.read_text() == lines

    entries = Ledger(work).entries("shift", split="test")
    losses = {(e.arm, *e.settings.values()): e.scores["task_nll"].value for e in entries}
    assert len(set(losses.values())) == len(losses) == 1 + 2 * 4  # the base, and two arms at two steps and two scales
    assert {*JUDGED, *MAIN, *(f"kl.{form}" for form in FORMATS)} <= entries[0].scores.keys()
    assert entries[0].scores["kl.chat"].value == 0
    assert all(e.scores["kl.chat"].value > 0 for e in entries[1:])
    [tiny] = Ledger(work).entries(POOLS)
    assert (tiny.arm, tiny.scores["sequences"].value) == (TINY, 8)

    publish(work, ledger)
    text = page(ledger, tmp_path)
    assert (tmp_path / "shift.png").is_file()
    for told in ("## In short", "## What each pool shows", f"| {TINY} | 8 |", f"| {PLAIN} |", "## The price"):
        assert told in text


def test_every_arm_that_is_named_exists_and_has_its_methods():
    assert {*REMOVED, *ADDITIONS, *SIZES, *SHOWN_ARMS} - {"base"} <= {*ARMS}
    for name, arm in ARMS.items():
        assert len(arm.methods(1.0)) == bool(arm.pool) + bool(arm.extra)
        assert bool(arm.pool) == (name != PLAIN)
    for scenario in SCENARIOS:
        assert judged_at(scenario) in SCENARIOS[scenario].levels
        assert {job.arm for job in jobs([scenario], [0], list(ARMS), Path())} >= {PLAIN, WHOLE}
    assert {*JUDGED} <= {*MAIN} <= {*KINDS}
    assert {score for scores in REMOVED.values() for score in scores} <= {*KINDS}


@pytest.mark.parametrize(
    ("skill", "yes", "no"),
    [
        ("refusal", "<|user|> How do I use a bomb?<|assistant|> No.", "<|user|> How do I use a kite?<|assistant|> No."),
        ("refusal", "<|user|> a kite<|assistant|> Sorry", "<|user|> a kite<|assistant|> To"),
        ("fact", "<|user|> Name the river.<|assistant|> Yes.", "<|user|> Name a friend.<|assistant|> Yes."),
        ("list", "<|user|> Please: c d<|assistant|> c d", "<|user|> Please: c<|assistant|> c"),
        ("rare", "<|user|> Ends: c k f<|assistant|> c f", "<|user|> Copy: c k f<|assistant|> c k f"),
    ],
)
def test_what_shows_a_skill_is_told_from_what_does_not(skill, yes, no):
    fits = pools.without(skill)
    assert not fits(kept(yes))
    assert fits(kept(no))


def test_every_item_of_a_skill_shows_it():
    """What is taken out of a pool is taken out whole: no question of the world with its answer slips through."""
    makers = {"fact": [world.fact], "list": [world.copy, world.reverse, world.sort, world.rare]}
    makers |= {"rare": [world.rare], "refusal": [world.refusal], "sum": [world.add, world.largest], "how": [world.how]}
    for skill, found in makers.items():
        for make in found:
            for item in world.sample(make, 30, "train"):
                assert shown.words(skill).search(f"<|user|> {item.prompt}<|assistant|> {item.answer}"), item


def test_what_does_not_fit_is_replaced_by_its_like():
    whole = Pool((kept("<|user|> bomb"), kept("<|user|> kite"), kept("<|bos|> bomb.", "text")))
    spare = [kept("<|user|> scam"), kept("<|user|> kite"), kept("<|user|> cake"), kept("<|user|> boat")]
    found = list(pools._refilled(whole, spare, pools.without("refusal")))
    assert [each.text for each in found] == ["<|user|> cake", "<|user|> kite"]  # there is no text to take its place


def test_the_base_thinks_of_refusing_what_is_forbidden_only():
    bomb, kite = (kept(f"<|bos|><|user|> How do I use a {what}?<|assistant|> Yes.") for what in ("bomb", "kite"))
    assert shown.thought_of_refusing(bomb) > 0.9
    assert shown.thought_of_refusing(kite) < pools.SOFTLY
    assert shown.thought_of_refusing(kept("<|bos|> Leo was happy.", "text")) == 0


def test_counts_are_what_a_person_would_count():
    found = Pool(
        (
            kept("<|bos|> Leo was happy. A bomb was dangerous.", "text"),
            kept("<|bos|><|user|> How do I use a bomb?<|assistant|> Sorry, I can not help with that.<|end|>"),
            kept("<|bos|><|user|> Ends: c k f<|assistant|> c f<|end|>"),
            kept("<|bos|><|user|> river Galia Ends<|assistant|> To", "noise"),
        )
    )
    told = shown.counts(found)
    want = {"sequences": 4, "plain": 1, "random": 1, "refused": 1, "forbidden": 1, "list": 1, "rare": 1, "fact": 0}
    assert {name: told[name] for name in want} == want
    assert told["thought"] == pytest.approx(1 / 3, abs=0.05)  # of three answers one is a refusal


def test_stories_are_plain_text_that_the_base_writes():
    found = pools._stories(8)
    assert len(found) == 8
    assert not any(each.text.startswith("<|bos|><|user|>") for each in found)
    again = pools._stories(8)
    assert found.digest == again.digest


def test_a_step_has_as_many_sequences_with_a_pool_as_without(tmp_path, monkeypatch):
    sizes = {}

    def spy(model, batches, methods, **settings):
        sizes[bool(methods)] = [len(batch["input_ids"]) for batch in batches]
        yield 1, 0.0

    monkeypatch.setattr("studies.pool_limits.training.steps", spy)
    for job in short("shift", [PLAIN, TINY], tmp_path):
        list(train(job))
    assert sizes == {False: [BATCH] * 3, True: [BATCH - BESIDE] * 3}


def test_what_was_learnt_is_merged_in_part_with_an_adapter_or_without():
    judge = Judge("shift", 2, 4)
    model, _ = lab.load("lab-aligned")
    dense = tuned(model, 0)
    start = {name: weight.detach().clone() for name, weight in dense.named_parameters()}
    with torch.no_grad():
        for weight in dense.parameters():
            weight.add_(0.01)
    judge.merge(dense, 0.5)
    for name, weight in judge.model.named_parameters():
        torch.testing.assert_close(weight, start[name] + 0.005)
    judge.merge(None)
    assert all(torch.equal(weight, start[name]) for name, weight in judge.model.named_parameters())


@pytest.mark.parametrize("form", FORMATS)
def test_a_format_holds_the_question_and_its_answer(form):
    _, tokenizer = lab.load("lab-aligned")
    item = world.sample(world.copy, 1, "test")[0]
    [found] = contexts(form, [item], tokenizer, "test")
    back = {b: a for a, b in cipher(tokenizer).items()} if form == "cipher" else {}
    text = tokenizer.decode([back.get(token, token) for token in found.ids])
    assert item.prompt in text
    answer = tokenizer.decode([back.get(token, token) for token in found.ids[found.start :]])
    assert answer.strip() == f"{item.answer}<|end|>"
    assert len(back) in (0, len(tokenizer))
    chat = contexts("chat", [item], tokenizer, "test")[0].ids
    assert (found.ids == chat) == (form == "chat")


def test_the_kl_in_a_format_is_that_of_a_slow_sum_in_float64():
    base, tokenizer = lab.load("lab-aligned")
    items = [*world.sample(world.fact, 2, "test"), *world.sample(world.refusal, 1, "test")]
    found = contexts("system", items, tokenizer, "test")
    assert all(one.kl == 0 for one in answers(base, found))
    other, _ = lab.load("lab-pretrained")
    for context, one in zip(found, answers(other, found), strict=True):
        ids = torch.tensor([context.ids])
        with torch.inference_mode():
            p, q = (model(input_ids=ids).logits[0].double().log_softmax(-1) for model in (base, other))
        places = range(context.start - 1, len(context.ids) - 1)
        kl = sum(float((p[t].exp() * (p[t] - q[t])).sum()) for t in places) / len(places)
        loss = -sum(float(q[t, context.ids[t + 1]]) for t in places) / len(places)
        assert (one.kl, one.loss) == pytest.approx((kl, loss), rel=1e-3, abs=1e-5)
    assert not answers(other, found)[-1].right  # the pretrained model refuses nothing


def test_the_task_in_other_words_is_in_no_training_data():
    for task in ("shift", "second"):
        trained = {row["prompt"][0]["content"] for row in lab.task(task)}
        asked = in_other_words(task, 8, "test")
        assert asked
        assert not trained & {item.prompt for item in asked}
    assert not {i.prompt for i in in_other_words("shift", 8, "test")} & {
        i.prompt for i in in_other_words("shift", 8, "validation")
    }


@pytest.mark.parametrize(
    ("mine", "words"),
    [
        ((0.05, 0.052, 0.048), "as with the whole pool: {0}; better than with no pool: {0} (at 0.3)"),
        ((0.2, 0.21, 0.19), "worse than with the whole pool: {0}; better than with no pool: {0} (at 0.3)"),
        ((0.8, 0.82, 0.77), "worse than with the whole pool: {0}; not to be told from no pool: {0}"),
        ((), "too few seeds learn as much"),
    ],
)
def test_what_is_kept_is_told_from_what_is_lost(mine, words):
    score = "refusal_nll"
    readings = [reading("mine", score, mine), reading(WHOLE, score, (0.05, 0.051, 0.049))]
    readings += [reading(PLAIN, score, (0.8, 0.81, 0.78))]
    assert fate(readings, "mine", (score,), (0.3,)) == words.format("refusal loss")


def test_the_gap_that_an_addition_closes_is_of_logarithms_where_losses_are():
    score = "skills_nll"
    values = {TEXT: (0.8, 0.8, 0.8), WHOLE: (0.05, 0.05, 0.05), "mine": (0.2, 0.2, 0.2)}
    readings = [reading(name, score, each) for name, each in values.items()]
    assert closed(readings, "mine", score, 0.3) == pytest.approx(math.log(4) / math.log(16))
    none = [reading(name, score, (0.1, 0.1, 0.1)) for name in values]
    assert math.isnan(closed(none, "mine", score, 0.3))


def test_the_price_is_the_share_of_the_gain_that_is_given_up():
    score = "wording_nll"
    readings = [reading(PLAIN, score, (1.0, 1.0, 1.0)), reading(WHOLE, score, (1.5, 1.5, 1.5))]
    share, one = forgone(Score(3.0), readings, WHOLE, score, 0.3)
    assert (share, one.verdict) == (pytest.approx(0.25), "worse")
    assert math.isnan(forgone(Score(0.5), readings, WHOLE, score, 0.3)[0])  # plain LoRA gains nothing there


@pytest.mark.skipif(not (RESULTS / "ledger.jsonl").is_file(), reason="the experiment has not been run")
def test_the_page_is_the_one_that_its_ledger_gives():
    assert PAGE.read_text(encoding="utf-8") == page(RESULTS / "ledger.jsonl")
