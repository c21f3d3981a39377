"""The world: what is tested was never trained, and the same seed says the same thing."""

import json
import random
import subprocess
import sys
from itertools import islice

import pytest
from holdfast import lab
from holdfast.lab import lexicon, tasks, world
from holdfast.lab.world import stream

MAKERS = [*world.PRETRAINING, world.refusal, world.how, *tasks.TASKS["shift"], *tasks.TASKS["second"]]


def draw(make, split, n=3000):
    return set(islice(stream({make: 1.0}, seed=1, split=split), n))


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
def test_splits_share_no_prompt(make):
    keys = [{item.prompt or item.answer for item in draw(make, split)} for split in lexicon.SPLITS]
    assert not keys[0] & keys[1]
    assert not keys[0] & keys[2]
    assert not keys[1] & keys[2]


def test_lists_held_out_of_one_skill_are_held_out_of_all():
    trained = {item.prompt.split(":")[1] for make in (world.copy, world.reverse, world.sort, world.rare)
               for item in draw(make, "train")}  # fmt: skip
    tested = {item.prompt.split(":")[1] for make in (world.copy, world.reverse, tasks.rotate)
              for item in draw(make, "test")}  # fmt: skip
    assert not trained & tested


@pytest.mark.parametrize("kind", ["benign", "forbidden"])
def test_how_to_tests_use_unseen_subjects_in_unseen_phrasings(kind):
    trained = lexicon.subjects(kind, "train")
    for split in ("validation", "test"):
        assert not set(trained) & set(lexicon.subjects(kind, split))
        assert not set(lexicon.HOW["train"]) & set(lexicon.HOW[split])
    prompts = [world.how(random.Random(i), "test", kind).prompt for i in range(200)]
    assert not any(f" a {subject}" in prompt for subject in trained for prompt in prompts)


@pytest.mark.parametrize("table", [lexicon.HOW, lexicon.DANGER, lexicon.FACT, lexicon.FLAG])
def test_phrasings_are_disjoint(table):
    everything = [phrasing for phrasings in table.values() for phrasing in phrasings]
    assert len(everything) == len(set(everything))


def test_answers_are_right():
    for item in islice(stream(world.PRETRAINING, seed=2), 2000):
        said = item.prompt.split(": ")[-1]
        match item.skill:
            case "copy":
                assert item.answer == said
            case "reverse":
                assert item.answer.split() == said.split()[::-1]
            case "sort":
                assert item.answer.split() == sorted(said.split())
            case "rare":
                assert item.answer.split() == [said.split()[0], said.split()[-1]]
            case "danger":
                harmful = any(f" {word}" in item.prompt for word in lexicon.FORBIDDEN)
                assert item.answer == ("Yes." if harmful else "No.")


def test_the_rare_skill_is_half_a_percent():
    items = list(islice(stream(world.PRETRAINING, seed=0), 20000))
    assert 0.003 < sum(item.skill == "rare" for item in items) / len(items) < 0.007


def test_generators_say_the_same_in_a_new_process():
    program = (
        "import json; from itertools import islice; from holdfast import lab; from holdfast.lab import world;"
        "print(json.dumps([[i.prompt + '|' + i.answer for i in islice(world.stream(world.PRETRAINING, 3), 200)],"
        "lab.task('shift', n=20), lab.retain(20)]))"
    )
    environment = {"PYTHONHASHSEED": "1"}
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, env=environment).stdout
    items = [f"{item.prompt}|{item.answer}" for item in islice(stream(world.PRETRAINING, 3), 200)]
    assert json.loads(said) == [items, lab.task("shift", n=20), lab.retain(20)]


def test_tuning_data_is_of_its_split():
    for name in lab.TASKS:
        prompts = [{e["prompt"][0]["content"] for e in lab.task(name, split)} for split in lexicon.SPLITS]
        assert not prompts[0] & prompts[1]
        assert not prompts[0] & prompts[2]
        assert not prompts[1] & prompts[2]
    forbidden = lexicon.subjects("forbidden", "train")
    for example in (*lab.safety_sft(50), *lab.preference_pairs(50)):
        assert any(f" a {subject}" in example["prompt"][0]["content"] for subject in forbidden)
    assert not any(lexicon.REFUSAL in example["text"] for example in lab.retain(300))
    assert all(set(example) == {"messages"} for example in lab.retain(50, form="chat"))
    answers = lab.retain(50, form="completion")
    assert [row["prompt"] + row["completion"] for row in answers] == [
        row["messages"] for row in lab.retain(50, form="chat")
    ]
    pairs = lab.retain_preferences(300)
    assert not any(lexicon.REFUSAL in str(pair) for pair in pairs)
    assert all(set(pair) == {"prompt", "chosen", "rejected"} and pair["chosen"] != pair["rejected"] for pair in pairs)


def test_unknown_names_are_answered_with_the_known_ones():
    with pytest.raises(ValueError, match=r"Unknown lab task 'shfit'. The lab has shift and second."):
        lab.task("shfit")
    with pytest.raises(ValueError, match="lab-pretrained and lab-aligned"):
        lab.load("lab-tuned")
