"""Exact answers: what counts as right, files with faults, and the lab's own skills."""

import json

import pytest
from holdfast import lab
from holdfast.drift.probe import ProbeError
from holdfast.drift.probes.exact_answer import ExactAnswer, Question
from holdfast.lab import world

from drift.sides import models_of
from tiny import lora


@pytest.mark.parametrize(
    ("expected", "said", "right"),
    [
        ("18", "so she has 9 * 2 = 18 dollars", True),
        ("18", "18 dollars, not 20", False),
        ("x #### 1,800", "1800.0", True),
        ("x #### 1,800", "#### 1,800 and 7 more", True),
        ("-3", "it is -3", True),
        ("18", "no idea", False),
    ],
)
def test_numbers_are_read_as_gsm8k_is(expected, said, right):
    assert ExactAnswer("sums", [Question("?", expected)], "number").is_right(expected, said) is right


def test_text_is_compared_apart_from_case_space_and_a_full_stop():
    ask = ExactAnswer("facts", [Question("Who?", "Ada Lovelace.")])
    assert ask.match == "text"
    assert ask.is_right("Ada Lovelace.", "ada  lovelace")
    assert not ask.is_right("Ada Lovelace.", "It was Ada Lovelace.")


def test_the_lab_gets_its_skills_right_and_categories_go_with_items():
    base, tok = lab.load("lab-aligned")
    items = [item for make in (world.copy, world.fact) for item in world.sample(make, 10, "test")]
    probe = ExactAnswer("skills", [Question(i.prompt, i.answer, i.skill) for i in items], "text", 40)
    found = probe.measure(models_of(lora(base), tok), "base", lambda n: None)
    score = found.scores["exact_answer.skills"]
    truth = lab.scoring.answer_scores(base, tok, sorted(items, key=lambda i: (i.prompt, i.answer)))
    assert score.items == tuple(float(right) for right, _ in truth)  # the lab's own teacher-forced reading agrees
    assert sorted(set(score.categories)) == ["copy", "fact"]
    assert [a.verdict for a in found.answers] == ["right" if item else "wrong" for item in score.items]


def test_a_file_is_read_whole_or_all_its_faults_are_told(tmp_path):
    path = tmp_path / "sums.jsonl"
    rows = [{"question": "2 + 2?", "answer": "2 + 2 = 4 #### 4"}, {"prompt": "3?", "answer": "3", "category": "add"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    probe = ExactAnswer.read(path)
    assert (probe.name, probe.match, probe.size) == ("exact_answer.sums", "number", 2)
    path.write_text('{"question": "2 + 2?"}\nnonsense\n{"question": 3, "answer": "4"}\n[1]\n')
    with pytest.raises(ProbeError) as told:
        ExactAnswer.read(path)
    assert [fault.split(":")[0] for fault in told.value.faults] == ["line 1", "line 2", "line 3", "line 4"]
    with pytest.raises(ProbeError, match="cannot be read"):
        ExactAnswer.read(tmp_path / "absent.jsonl")


def test_questions_that_say_nothing_are_refused_together():
    with pytest.raises(ProbeError) as told:
        ExactAnswer("bad", [Question("", "4"), Question("2 + 2?", "four"), Question("2 + 2?", "4")], "number")
    assert len(told.value.faults) == 3
