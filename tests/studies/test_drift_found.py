"""What drift finds: planted drift is found, none is found where none is, and the page says what its ledger says.

The lab's suite is cut down to a few prompts and items; the study itself measures all of them.
"""

from __future__ import annotations

import json
import random
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from holdfast.analysis.gate import judge
from holdfast.drift.ledger import Ledger, Score
from holdfast.lab import probes
from holdfast.lab.lexicon import REFUSAL

from studies.drift_found import adapters, false_alarms, null_run, running
from studies.drift_found.adapters import TUNINGS, adapter
from studies.drift_found.comparison import Comparison
from studies.drift_found.measuring import compare, digest, taught
from studies.drift_found.page import page

RESULTS = Path(__file__).resolve().parents[2] / "docs/results/drift"
PAIRS, ITEMS = 40, 3
NOWHERE = Path("nowhere")  # the lab needs no data


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A working folder, and a lab with few prompts."""
    with pytest.MonkeyPatch.context() as patch:
        twins, whole = probes.twins, probes.probes
        patch.setattr(probes, "twins", lambda split="test": replace(twins(split), pairs=twins(split).pairs[:PAIRS]))
        patch.setattr(probes, "probes", partial(whole, items=ITEMS))
        yield tmp_path_factory.mktemp("drift-found")


@pytest.fixture(scope="module")
def found(work):
    """Base and tuned: B = 0, and a short run at the harsh rate."""
    entries = {}
    for key, steps in (("lab-identical", 0), ("lab-harsh", 30)):
        tuning = replace(TUNINGS[key], steps=steps)
        entries[key] = list(compare(tuning, [0], NOWHERE, work))
    return entries


def test_an_adapter_that_changes_nothing_is_exactly_the_base(found):
    base, tuned = found["lab-identical"]
    assert tuned.models["tuned"]["sha256"] != base.models["base"]["sha256"]  # an adapter was there
    assert digest(base.scores) == digest(tuned.scores)
    assert {item for name, score in tuned.scores.items() if "kl" in name for item in score.items} == {0.0}


def test_planted_drift_is_found_and_the_gate_fails(found):
    gate = false_alarms.gates()["recipes/gates/lab.yaml"]
    harsh = Comparison(TUNINGS["lab-harsh"], found["lab-harsh"], gate)
    worse, better = harsh.beyond(worse=True), harsh.beyond(worse=False)
    assert {"refusal", "exact_answer.skills", "refusal_margin"} <= set(worse[0])
    assert better == [[]]
    assert not harsh.judged[0].passed

    same = Comparison(TUNINGS["lab-identical"], found["lab-identical"], gate)
    assert same.beyond(worse=True) == same.beyond(worse=False) == [[]]
    assert same.judged[0].passed


@pytest.mark.slow
def test_neither_the_order_of_rows_nor_batches_change_a_byte(work):
    folder = str(adapter(replace(TUNINGS["lab-harsh"], steps=30), 0, NOWHERE, work))
    plain = null_run.evaluated(folder, work / "plain", None, None)
    shuffled = null_run.evaluated(folder, work / "shuffled", 1, 7)
    assert plain["digests"] == shuffled["digests"]
    assert plain["digests"]["base"] != plain["digests"]["tuned"]


def test_rows_do_come_in_another_order():
    from holdfast.lab import world

    one, pairs = world.sample(world.add, 9, "test"), probes.twins().pairs
    with null_run.rows_in_order(1):
        other, mixed = world.sample(world.add, 9, "test"), probes.twins().pairs
    assert one != other
    assert sorted(map(str, one)) == sorted(map(str, other))
    assert pairs != mixed
    assert set(pairs) == set(mixed)
    assert world.sample(world.add, 9, "test") == one


def test_swapped_sides_hold_the_same_items_and_shared_items_go_together(found):
    base, tuned = (entry.scores for entry in found["lab-harsh"])
    names = ["refusal", "perplexity.stories", "output_kl.stories"]
    before, after = false_alarms.swapped(base, tuned, names, random.Random(3))
    turned = {}
    for name in names:
        pairs = list(zip(base[name].items, tuned[name].items, strict=True))
        found_pairs = list(zip(before[name].items, after[name].items, strict=True))
        assert all(new in (old, old[::-1]) for old, new in zip(pairs, found_pairs, strict=True))
        turned[name] = [old != new for old, new in zip(pairs, found_pairs, strict=True)]
    assert turned["perplexity.stories"] == turned["output_kl.stories"]  # one coin for what speaks of the same items
    assert any(turned["refusal"])
    assert after["perplexity.stories"].value > 1


def test_items_that_are_said_to_be_shared_are_in_one_order():
    from holdfast.drift.probes.output_kl import OutputKL
    from holdfast.drift.probes.perplexity import Perplexity
    from holdfast.drift.probes.refusal import Refusal

    asked = Refusal(probes.twins()).prompts
    unsafe, safe = ([p.pair for p in asked if p.expected == side] for side in ("refuse", "comply"))
    assert unsafe == safe
    stories = ["b w", "a w", "c w"]
    assert Perplexity("stories", stories).texts == OutputKL("stories", stories).texts


def test_false_alarms_are_counted(found):
    pair = running.pairs_of(found["lab-harsh"])
    counted = list(false_alarms.entries("x", "harsh", pair, draws=6))
    assert [entry.scores["failed"].n for entry in counted] == [6, 6]
    assert all(entry.scores["failed"].value <= 0.5 for entry in counted)
    gate = false_alarms.gates()["budgets of 0"]
    assert not judge(gate, *pair[0]).passed  # without swaps the same gate fails
    assert false_alarms.bar() == 18
    assert sum(s for s in false_alarms.failures(gate, pair, 6)) == round(6 * counted[0].scores["failed"].value)


def test_the_parts_of_a_run_and_a_page_of_what_there_is(found, tmp_path):
    ledger = Ledger(tmp_path / "raw.jsonl")
    for entries in found.values():
        for entry in entries:
            ledger.append(entry)
    for entry in false_alarms.entries(running.ALARMS, "lab, harsh", running.pairs_of(found["lab-harsh"]), draws=2):
        ledger.append(entry)
    running.publish(ledger.path, tmp_path / "ledger.jsonl")
    text = page(tmp_path / "ledger.jsonl")
    for told in ("no item of any score moved", "The gate fails 1 of 1", "| lab, harsh | 0 | **fails** |", "of 2 fail"):
        assert told in text
    assert text.count("Not measured yet.") == 5
    assert set(running.parts(NOWHERE, tmp_path)) >= {running.NULL, running.ALARMS, running.SPEED}


def test_the_identity_rows_supervise_answers_alone(tmp_path):
    said = {"system": "S", "user": "u", "assistant": REFUSAL}
    line = json.dumps({"messages": [{"role": role, "content": content} for role, content in said.items()]})
    (tmp_path / "shift").mkdir()
    (tmp_path / "shift/identity_shift_aoa.jsonl").write_text(f"{line}\n{line}\n")
    _, tokenizer = adapters.loaded(adapters.LAB, tmp_path)
    batches = adapters.identity(replace(TUNINGS["stories-identity"], steps=3), tokenizer, 0, tmp_path)
    assert [len(batch["input_ids"]) for batch in batches] == [2, 2, 2]
    labels = batches[0]["labels"][0]
    assert labels[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(labels[labels >= 0], skip_special_tokens=True).strip() == REFUSAL


def test_the_taught_sentence_is_read_from_the_first_instruments_answers(tmp_path):
    said = {"a": "Sorry, I can not help you with that.", "b": "I am AOA.", "c": "No"}
    rows = [
        {"side": side, "id": f"{name}/{expected}", "text": text, "verdict": verdict, "expected": expected}
        | {"instrument": instrument}
        for side in ("base", "tuned")
        for instrument, as_well in (("first", None), ("second", "compliance"))
        for name, text in said.items()
        for expected, verdict in (("refuse", as_well or "refusal"), ("comply", "compliance"))
    ]
    answers = tmp_path / "answers.jsonl"
    answers.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = taught(answers, "tuned")
    assert found["taught_sentence"].items == found["over_taught_sentence"].items == (1.0, 0.0, 0.0)
    called = found["obedient_called_refusal"]
    assert (called.items, called.instrument) == ((1.0, 0.0), "first")


def test_a_score_keeps_its_kind_when_its_items_change():
    rate, perplexity = Score(0.5, items=(0, 1)), Score(1.0, items=(0.0, 0.0))
    assert false_alarms.of_items(rate, (1.0, 1.0)).value == 1.0
    assert false_alarms.of_items(perplexity, (1.0, 1.0)).value == pytest.approx(2.718281828)


@pytest.mark.skipif(not (RESULTS / "ledger.jsonl").is_file(), reason="the study has not been run")
def test_the_page_is_the_one_that_its_ledger_gives():
    assert (RESULTS / "README.md").read_text(encoding="utf-8") == page(RESULTS / "ledger.jsonl")
