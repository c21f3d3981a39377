"""IFEval by lm-eval's checkers: hand-written answers, the same every time, offline, and nothing left out in silence."""

from __future__ import annotations

import importlib
import json
import os
import random
import sys
from contextlib import nullcontext

import pytest
from holdfast.drift.generation import Reply
from holdfast.drift.models import Models
from holdfast.drift.probe import Found, ProbeError
from holdfast.drift.probes.instruction_following import NEEDS_PUNKT, InstructionFollowing

pytest.importorskip("lm_eval", reason="needs the extra lm-eval")
pytest.importorskip("langdetect", reason="needs the extra lm-eval")

from tiny import llama, lora, shake, tokenizer

LOWER, COMMA, WORDS = "change_case:english_lowercase", "punctuation:no_comma", "length_constraints:number_words"


def row(key, *instructions, prompt=""):
    return {
        "key": key,
        "prompt": prompt or f"Prompt {key}",
        "instruction_id_list": [name for name, _ in instructions],
        "kwargs": [kwargs for _, kwargs in instructions],
    }


class Written(Models):
    """Models whose answers are written by hand: what a tiny model would say cannot be chosen."""

    def __init__(self, **answers):
        super().__init__({"base": lambda: nullcontext(llama())}, tokenizer())
        self.answers = answers

    def ask(self, prompts, side, max_new_tokens, tick=lambda n: None):
        tick(len(prompts))
        return [Reply(self.answers[prompt.split()[1]], (), False) for prompt in prompts]


def measured(probe, **answers):
    return probe.measure(Written(**answers), "base", lambda n: None)


def items(found, name):
    return found.scores[f"instruction_following.{name}"].items


ROWS = [
    row("a", (LOWER, {})),
    row("b", (LOWER, {}), (COMMA, {})),
    row("c", (COMMA, {}), (WORDS, {"relation": "at least", "num_words": 5})),
    row("d", (COMMA, {})),
]
ANSWERS = {
    "a": "this is a plain english sentence without capital letters.",
    "b": "This is a plain English sentence without commas.",
    "c": "One, two, three.",
    "d": "Well, here it is:\nno commas after the first line of it",
}


def test_hand_written_answers_are_checked_item_by_item():
    found = measured(InstructionFollowing(ROWS), **ANSWERS)
    assert items(found, "prompt_strict") == (1, 0, 0, 0)
    assert items(found, "prompt_loose") == (1, 0, 0, 1)  # the first line may be an opening
    assert items(found, "instruction_strict") == (1, 0, 1, 0, 0, 0)
    assert items(found, "instruction_loose") == (1, 0, 1, 0, 0, 1)
    strict = found.scores["instruction_following.instruction_strict"]
    assert strict.categories == (LOWER, LOWER, COMMA, COMMA, WORDS, COMMA)
    assert strict.value == pytest.approx(2 / 6)
    assert [answer.verdict for answer in found.answers] == ["right", "wrong", "wrong", "wrong"]
    assert found.answers[1].why == f"not followed: {LOWER}"
    assert found.answers[2].why == f"not followed: {COMMA}, {WORDS}"
    assert Found.from_record(json.loads(json.dumps(found.to_record()))) == found


def test_an_empty_answer_follows_nothing():
    found = measured(InstructionFollowing(ROWS), **dict.fromkeys("abcd", " "))
    assert items(found, "instruction_loose") == (0,) * 6


def test_results_are_the_same_every_time_and_leave_random_numbers_alone():
    """langdetect guesses with random numbers: on a short text it changes its mind between calls."""
    import langdetect

    guesses = {langdetect.detect("he is") for _ in range(60)}
    assert len(guesses) > 1, "choose a text on which langdetect is unsure"
    assert "en" in guesses
    probe = InstructionFollowing([row("x", ("language:response_language", {"language": "en"}))])
    state, seed = random.getstate(), langdetect.DetectorFactory.seed
    found = [measured(probe, x="he is") for _ in range(30)]
    assert all(one == found[0] for one in found)
    assert random.getstate() == state
    assert langdetect.DetectorFactory.seed is seed is None


def test_a_letter_that_is_none_is_said_and_does_not_depend_on_other_rows():
    letter = ("keywords:letter_frequency", {"letter": "#", "let_frequency": 2, "let_relation": "at least"})
    probe = InstructionFollowing([row("x", letter), row("y", letter)])
    assert "In rows x, y lm-eval's checker takes a random letter" in probe.note
    text = "aabbccddeefghijklm"
    both = items(measured(probe, x=text, y=text), "prompt_strict")
    assert both[0] == both[1]
    assert both[:1] == items(measured(InstructionFollowing([row("y", letter)]), y=text), "prompt_strict")
    assert "random" not in InstructionFollowing(ROWS).note


def test_every_fault_of_a_file_is_named_with_its_line(tmp_path):
    lines = [
        json.dumps(row(1, (COMMA, {}))),
        "",
        "{not json",
        json.dumps(row(2, ("punctuation:no_coma", {}), (WORDS, {"relation": "at least"}))),
        json.dumps({"key": 3, "prompt": "x"}),
        json.dumps(row(4, (COMMA, {"commas": 2}), prompt=" ")),
        json.dumps(row(1, (WORDS, {"relation": "about", "num_words": 3}))),
        json.dumps({**row(5, (COMMA, {})), "kwargs": []}),
        json.dumps(row(6, ("language:response_language", {"language": "xx"}))),
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    with pytest.raises(ProbeError) as caught:
        InstructionFollowing.read(tmp_path / "rows.jsonl")
    faults = "\n".join(caught.value.faults)
    parts = (
        "line 3: not a row",
        "line 4: there is no instruction 'punctuation:no_coma'. Did you mean 'punctuation:no_comma'?",
        f"line 4: {WORDS} needs num_words",
        "line 5: has no instruction_id_list, kwargs",
        "line 6: the prompt is empty",
        f"line 6: {COMMA} takes no commas",
        f"line 7: {WORDS} cannot be built",
        "line 8: needs at least one instruction",
        "line 9: language:response_language cannot be built: KeyError: 'xx'",
        "the key 1 is there twice",
    )
    assert [part for part in parts if part not in faults] == []
    assert len(caught.value.faults) == len(parts)


def test_an_argument_of_zero_is_refused_since_lm_eval_would_draw_one():
    with pytest.raises(ProbeError, match="needs num_words"):
        InstructionFollowing([row(1, (WORDS, {"relation": "at least", "num_words": 0}))])
    assert InstructionFollowing([row(1, (COMMA, {"num_words": None}))]).size == 1  # IFEval's own files have nulls


@pytest.fixture
def without_punkt(monkeypatch, tmp_path):
    """NLTK finds no data, whatever is on this machine."""
    import nltk

    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])


SENTENCES = row("s", ("length_constraints:number_sentences", {"relation": "at least", "num_sentences": 1}))
CAPITALS = row("t", ("change_case:capital_word_frequency", {"capital_relation": "at least", "capital_frequency": 1}))


def test_rows_that_need_nltks_data_are_named_or_counted(without_punkt):
    rows = [*ROWS, SENTENCES, CAPITALS]
    with pytest.raises(ProbeError, match="python -m nltk.downloader punkt_tab") as caught:
        InstructionFollowing(rows)
    assert caught.value.faults == (f"row 4: {NEEDS_PUNKT[1]}", f"row 5: {NEEDS_PUNKT[0]}")
    probe = InstructionFollowing(rows, skip=True)
    assert probe.size == 4
    assert "2 of 6 rows were left out" in probe.note
    assert probe.identity == InstructionFollowing(ROWS).identity
    with pytest.raises(ProbeError, match="2 of 2 rows"):
        InstructionFollowing([SENTENCES, CAPITALS], skip=True)


def test_only_the_named_instructions_need_nltks_data(without_punkt):
    """Every checker of lm-eval is run on a text."""
    from lm_eval.tasks.ifeval.instructions_registry import INSTRUCTION_DICT

    failed = set()
    for name, checker in INSTRUCTION_DICT.items():
        instruction = checker(name)
        instruction.build_description(**({"prompt_to_repeat": "Say it."} if name.endswith("repeat_prompt") else {}))
        try:
            instruction.check_following("This is a text. It has Two sentences\n\nand another paragraph, OK?")
        except LookupError:
            failed.add(name)
    assert failed == set(NEEDS_PUNKT)


def test_nothing_is_downloaded(without_punkt, monkeypatch):
    """lm-eval downloads when its checkers are first imported; holdfast imports them so that they do not."""
    import nltk

    asked = []
    monkeypatch.setattr(nltk, "download", asked.append)
    monkeypatch.setenv("LOCAL_RANK", "0")
    InstructionFollowing(ROWS)
    monkeypatch.delitem(sys.modules, "lm_eval.tasks.ifeval.instructions_util")
    importlib.import_module("lm_eval.tasks.ifeval.instructions_util")
    assert asked == ["punkt_tab"]  # so a download would be seen here
    for name in [name for name in sys.modules if name.startswith("lm_eval.tasks.ifeval.")]:
        monkeypatch.delitem(sys.modules, name)
    assert InstructionFollowing(ROWS).size == 4
    assert asked == ["punkt_tab"]
    assert os.environ["LOCAL_RANK"] == "0"


def test_a_tiny_model_answers_by_our_own_generation():
    model = lora(llama())
    shake(model)
    models = Models({"base": lambda: nullcontext(model)}, tokenizer())
    rows = [row(i, (COMMA, {}), prompt=f"w{i} w3") for i in range(4)]
    probe, ticks = InstructionFollowing(rows, max_new_tokens=5), []
    found = probe.measure(models, "base", ticks.append)
    assert sum(ticks) == probe.size == 4
    replies = models.ask([row["prompt"] for row in rows], "base", 5)
    assert [answer.text for answer in found.answers] == [reply.text for reply in replies]
    assert items(found, "prompt_strict") == tuple(float(bool(reply.text.strip())) for reply in replies)


@pytest.mark.real
def test_the_first_rows_of_ifeval(data):
    path = data / "capability" / "ifeval_400.jsonl"
    if not path.is_file():
        pytest.skip("HOLDFAST_DATA has no capability/ifeval_400.jsonl")
    from holdfast import lab

    probe = InstructionFollowing.read(path, max_new_tokens=8, skip=True)
    assert (probe.size, "47 of 400 rows were left out" in probe.note) in ((353, True), (400, False))
    probe.rows = probe.rows[:12]
    model, tok = lab.load("lab-aligned")
    found = probe.measure(Models({"base": lambda: nullcontext(model)}, tok), "base", lambda n: None)
    assert len(items(found, "prompt_strict")) == 12
    assert len(items(found, "instruction_loose")) == sum(len(one["instruction_id_list"]) for one in probe.rows)
    assert all(a <= b for a, b in zip(items(found, "prompt_strict"), items(found, "prompt_loose"), strict=True))
