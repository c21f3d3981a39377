"""Multiple choice: the choice against float64, rows read in every spelling, and every faulty row named."""

from __future__ import annotations

import json
import random
from statistics import fmean

import pytest
import torch
from holdfast import lab
from holdfast.drift.probe import ProbeError
from holdfast.drift.probes.multiple_choice import MultipleChoice
from holdfast.lab.lexicon import COUNTRIES, RELATIONS

import tiny
from drift import sides

rng = random.Random(3)
ROWS = [
    {
        "question": f"w{i} {tiny.sentence(rng)}",
        "choices": [f"w{i + j} {tiny.sentence(rng, 1, 4)}" for j in range(4)],
        "answer": i % 4,
        "category": f"c{i % 2}",
    }
    for i in range(23)
]


def silent(n: int) -> None:
    pass


@pytest.fixture(scope="module")
def model():
    return sides.tuned_model()


@pytest.mark.parametrize("side", ["base", "tuned"])
@pytest.mark.parametrize("template", [tiny.CHAT, None])
def test_the_choice_is_the_likeliest_a_token(model, side, template):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = template
    models = sides.models_of(model, tokenizer)
    found = MultipleChoice("x", ROWS).measure(models, side, silent)
    by_prompt = {answer.prompt: answer for answer in found.answers}
    assert len(by_prompt) == 23
    for row in ROWS:
        asked = models.ids(row["question"])

        def mean(choice, asked=asked):
            said = list(tokenizer(choice, add_special_tokens=False).input_ids)
            log_p = sides.log_probabilities(model, asked + said, adapter=side == "tuned")
            return fmean(log_p[len(asked) - 1 + t, token].item() for t, token in enumerate(said))

        best = max(row["choices"], key=mean)
        answer = by_prompt[row["question"]]
        assert answer.text == best
        assert answer.expected == row["choices"][row["answer"]]
        assert answer.verdict == ("right" if best == answer.expected else "wrong")
    score = found.scores["multiple_choice.x"]
    assert score.items == tuple(float(answer.verdict == "right") for answer in found.answers)
    assert score.categories == tuple(answer.category for answer in found.answers)
    assert 0 < score.value < 1


def test_order_and_batch_size_change_nothing(model):
    found = MultipleChoice("x", ROWS).measure(sides.models_of(model, tiny.tokenizer()), "tuned", silent)
    shuffled = MultipleChoice("x", random.Random(2).sample(ROWS, len(ROWS)))
    assert shuffled.identity == MultipleChoice("x", ROWS).identity
    assert shuffled.measure(sides.models_of(model, tiny.tokenizer(), batch_size=1), "tuned", silent) == found


@pytest.mark.parametrize("wide", [torch.float32, torch.bfloat16])
def test_an_adapter_that_does_nothing_moves_nothing(wide):
    models = sides.models_of(sides.tuned_model(0).to(wide), tiny.tokenizer())
    base, tuned = (MultipleChoice("x", ROWS).measure(models, side, silent) for side in ("base", "tuned"))
    assert base == tuned


def test_the_labs_model_knows_its_capitals():
    model, tokenizer = lab.load()
    cities = RELATIONS["capital"]
    rows = [
        {
            "question": f"What is the capital of {country}?",
            "choices": [f"{city}." for city in cities],
            "answer": f"{city}.",
        }
        for country, city in zip(COUNTRIES, cities, strict=True)
    ]
    models = sides.models_of(tiny.lora(model), tokenizer)
    score = MultipleChoice("capitals", rows).measure(models, "base", silent).scores["multiple_choice.capitals"]
    assert score.value > 0.9
    assert score.categories is None


def test_progress_counts_questions(model):
    told = []
    probe = MultipleChoice("x", ROWS)
    probe.measure(sides.models_of(model, tiny.tokenizer()), "tuned", told.append)
    assert sum(told) == probe.size == 23


@pytest.mark.parametrize("answer", [1, "B", "w6"])
def test_an_answer_may_be_a_place_a_letter_or_a_text(answer):
    (item,) = MultipleChoice("x", [{"question": "w1", "choices": ["w5", "w6"], "answer": answer}]).items
    assert item.answer == 1


def test_every_faulty_row_is_named():
    fine = {"question": "q", "choices": ["a", "b"], "answer": 0}
    rows = [
        fine,
        fine | {"question": " "},
        {"choices": ["a"], "answer": 0},
        fine | {"question": "r", "choices": ["a", "a "]},
        fine | {"question": "s", "answer": 2},
        fine | {"question": "t", "answer": True},
        fine | {"question": "u", "choices": ["B", "A"], "answer": "A"},
        fine | {"question": "v", "categry": "x"},
        "no row",
        fine,
    ]
    with pytest.raises(ProbeError) as error:
        MultipleChoice("x", rows)
    named = [fault.partition(":")[0] for fault in error.value.faults]
    assert named == ["row 2", "row 3", "row 3", *(f"row {n}" for n in range(4, 11))]
    assert "did you mean 'category'" in str(error.value)
    assert "could be two choices" in str(error.value)
    assert "also that of row 1" in str(error.value)
    with pytest.raises(ProbeError, match="there are no questions"):
        MultipleChoice("x", [])


def test_a_file_is_read_as_rows_are_and_its_faults_name_lines(tmp_path):
    path = tmp_path / "quiz.jsonl"
    path.write_text("\ufeff" + "".join(json.dumps(row) + "\n\n" for row in ROWS), encoding="utf-8")
    assert MultipleChoice.read(path).identity == MultipleChoice("quiz", ROWS).identity
    assert MultipleChoice.read(path).name == "multiple_choice.quiz"
    assert MultipleChoice.read(path, "mine").name == "multiple_choice.mine"
    path.write_text(json.dumps(ROWS[0]) + '\n\n{"question"\n' + json.dumps({**ROWS[1], "answer": 9}) + "\n")
    with pytest.raises(ProbeError) as error:
        MultipleChoice.read(path)
    assert [fault.partition(":")[0] for fault in error.value.faults] == ["line 3", "line 4"]
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ProbeError, match="UTF-8"):
        MultipleChoice.read(path)
    with pytest.raises(ProbeError, match="cannot be read"):
        MultipleChoice.read(tmp_path / "none.jsonl")


def test_choices_that_the_tokenizer_writes_alike_are_refused(model):
    rows = [{"question": "w1", "choices": ["strange", "unknown"], "answer": 0}, ROWS[0]]
    with pytest.raises(ProbeError, match="strange") as error:
        MultipleChoice("x", rows).measure(sides.models_of(model, tiny.tokenizer()), "base", silent)
    assert len(error.value.faults) == 1
