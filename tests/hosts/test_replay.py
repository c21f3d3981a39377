"""Replay: every task row once, about the asked share of retain rows, all in the task's own format."""

from __future__ import annotations

import copy
import tempfile

import pytest
from datasets import Dataset
from holdfast.core.errors import WrongSetup
from holdfast.integrations.replay import mix
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

import tiny

ASK, ANSWER = {"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}
OLD_ASK, OLD_ANSWER = {"role": "user", "content": "w4"}, {"role": "assistant", "content": "w5 w6"}
TASK = {
    "text": {"text": "w1 w2"},
    "strings": {"prompt": "w1 ", "completion": "w2"},
    "split": {"prompt": [ASK], "completion": [ANSWER]},
    "messages": {"messages": [ASK, ANSWER]},
    "pairs": {"prompt": "w1 ", "chosen": "w2", "rejected": "w3"},
    "pairs, messages": {"chosen": [ASK, ANSWER], "rejected": [ASK, OLD_ANSWER]},
    "ids": {"input_ids": [5, 6], "labels": [-100, 6]},
}
OLD = {
    "text": {"text": "w7 w8"},
    "strings": {"prompt": "w7 ", "completion": "w8", "label": True},
    "split": {"prompt": [OLD_ASK], "completion": [OLD_ANSWER]},
    "messages": {"messages": [OLD_ASK, OLD_ANSWER]},
    "conversations": {"conversations": [{"from": "user", "value": "w4"}, {"from": "assistant", "value": "w5 w6"}]},
    "pairs": {"chosen": "w7 w8", "rejected": "w7 w9"},
    "pairs, messages": {"prompt": [OLD_ASK], "chosen": [OLD_ANSWER], "rejected": [ANSWER]},
    "ids": {"input_ids": [7, 8], "labels": [-100, 8]},
    "masked ids": {"input_ids": [7, 8], "completion_mask": [0, 1]},
}
FINE = {
    ("text", "text"): {"text": "w7 w8"},
    ("strings", "strings"): {"prompt": "w7 ", "completion": "w8"},
    ("split", "split"): OLD["split"],
    ("split", "messages"): OLD["split"],
    ("split", "conversations"): OLD["split"],
    ("messages", "messages"): OLD["messages"],
    ("messages", "split"): OLD["messages"],
    ("messages", "conversations"): OLD["messages"],
    ("pairs", "pairs"): {"prompt": "w7 w", "chosen": "8", "rejected": "9"},  # TRL's own split of strings
    ("pairs, messages", "pairs, messages"): OLD["pairs, messages"],
    ("ids", "ids"): OLD["ids"],
}


def table(row, n=40):
    return Dataset.from_list([copy.deepcopy(row) for _ in range(n)])


def numbered(n, first=0):
    return Dataset.from_list([{"text": f"row {i}"} for i in range(first, first + n)])


@pytest.mark.parametrize("task", TASK)
@pytest.mark.parametrize("old", OLD)
def test_formats_convert_without_loss_or_are_refused(task, old):
    if (task, old) not in FINE:
        with pytest.raises(WrongSetup, match="Retain rows of .* cannot be replayed among task rows of .* Give retain"):
            mix(table(TASK[task]), table(OLD[old], 4), share=0.5)
        return
    mixed = mix(table(TASK[task]), table(OLD[old], 4), share=0.5)
    replayed = FINE[task, old]
    count = sum({key: row[key] for key in replayed} == replayed for row in mixed)
    assert 10 < count == len(mixed) - 40


def test_every_task_row_comes_once_and_retain_rows_repeat():
    mixed = mix(numbered(300), numbered(7, first=1000), share=0.4)["text"]
    old = [text for text in mixed if len(text) == 8]
    assert sorted(set(mixed) - set(old)) == sorted(f"row {i}" for i in range(300))
    assert len(mixed) == 300 + len(old)
    assert len(set(old)) == 7
    counts = [old.count(text) for text in set(old)]
    assert max(counts) - min(counts) <= 1  # all of them equally often


@pytest.mark.parametrize("share", [0.05, 0.3, 0.9])
def test_the_share_is_that_of_the_mixture(share):
    n = 4000
    mixed = mix(numbered(n), numbered(50, first=10_000), share=share)
    found = 1 - n / len(mixed)
    assert found == pytest.approx(share, abs=5 * (share * (1 - share) / len(mixed)) ** 0.5)


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_a_few_task_rows_are_all_used(share):
    for seed in range(20):
        mixed = mix(numbered(3), numbered(2, first=1000), share=share, seed=seed)["text"]
        assert sorted(text for text in mixed if len(text) == 5) == ["row 0", "row 1", "row 2"]


def test_more_retain_rows_than_are_needed_do_not_repeat_the_task():
    mixed = mix(numbered(100), numbered(5000, first=1000), share=0.3)["text"]
    assert len(mixed) == len(set(mixed)) < 250


def test_the_seed_decides():
    a, b, c = (mix(numbered(60), numbered(50, first=1000), share=0.3, seed=s)["text"] for s in (1, 1, 2))
    assert list(a) == list(b) != list(c)


def test_several_sets_are_put_together():
    sets = {"chat": table(OLD["messages"], 3), "split": table(OLD["split"], 3)}
    mixed = mix(table(TASK["messages"]), sets, share=0.5)
    assert {row["messages"][0]["content"] for row in mixed} == {"w1 w2", "w4"}


def test_text_goes_to_the_tasks_own_field():
    task = Dataset.from_list([{"story": "w1"}] * 40)
    mixed = mix(task, table(OLD["text"]), share=0.5, text_field="story")
    assert set(mixed["story"]) == {"w1", "w7 w8"}
    with pytest.raises(WrongSetup, match="keys story, which is no format"):
        mix(task, table(OLD["text"]), share=0.5)


def test_rows_that_are_not_to_be_learned_are_left_out():
    rows = [{"prompt": "w7 ", "completion": word, "label": word == "w8"} for word in ("w8", "w9")]
    steps = {"prompt": "w7 ", "completions": ["w4 ", "w5"]}
    rows += [{**steps, "labels": [True, True]}, {**steps, "labels": [True, False]}]
    mixed = mix(table(TASK["strings"]), rows, share=0.5)
    assert {row["completion"] for row in mixed} == {"w2", "w8", "w4 w5"}
    with pytest.raises(WrongSetup, match="Of 1 retain rows none can be replayed"):
        mix(table(TASK["strings"]), rows[1:2], share=0.5)


def test_messages_that_do_not_end_with_an_answer_are_refused():
    with pytest.raises(WrongSetup, match="cannot be split into prompt and completion"):
        mix(table(TASK["split"]), [{"messages": [OLD_ASK, OLD_ANSWER, OLD_ASK]}], share=0.5)


def test_what_goes_to_the_template_goes_along():
    task = table({**TASK["messages"], "tools": "[]"})
    mixed = mix(task, table({**OLD["messages"], "tools": "[1]"}), share=0.5)
    assert set(mixed["tools"]) == {"[]", "[1]"}
    with pytest.raises(WrongSetup, match="the others have none"):
        mix(task, table({**OLD["messages"], "chat_template_kwargs": {"loud": True}}), share=0.5)


def test_fields_that_only_one_side_has():
    tagged = {"messages": [ASK, {**ANSWER, "mood": "fine"}]}
    mixed = mix(table(tagged), table(OLD["messages"]), share=0.5)
    assert {row["messages"][1]["mood"] for row in mixed} == {"fine", None}
    with pytest.raises(WrongSetup, match="other fields than the task rows"):
        mix(table(TASK["messages"]), table(tagged), share=0.5)


@pytest.mark.parametrize("share", [0, 1, -0.2, 30])
def test_a_share_lies_between_0_and_1(share):
    with pytest.raises(WrongSetup, match="between 0 and 1"):
        mix(numbered(3), numbered(3), share=share)


@pytest.mark.parametrize(("task", "old"), FINE)
def test_TRL_trains_on_every_mixture(task, old):
    kind, config = (DPOTrainer, DPOConfig) if "pairs" in task else (SFTTrainer, SFTConfig)
    args = config(
        output_dir=tempfile.mkdtemp(), bf16=False, use_cpu=True, report_to="none", max_steps=1, disable_tqdm=True,
        save_strategy="no",
    )  # fmt: skip
    mixed = mix(table(TASK[task], 8), table(OLD[old], 2), share=0.5)
    made = kind(model=tiny.lora(tiny.llama()), args=args, train_dataset=mixed, processing_class=tiny.tokenizer())
    assert made.train().training_loss > 0
    assert len(made.train_dataset) == len(mixed)  # nothing was dropped
