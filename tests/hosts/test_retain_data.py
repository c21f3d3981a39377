"""Retain rows of every TRL format become the tensors that TRL's own trainers make of them."""

from __future__ import annotations

import copy
import sys
import tempfile

import pytest
import torch
from datasets import Dataset
from holdfast.core.errors import WrongSetup
from holdfast.integrations.retain_data import to_batches, to_sets
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

import tiny

ASK, ASK_MORE = {"role": "user", "content": "w1 w2"}, {"role": "user", "content": "w3 w4 w5"}
GOOD, BAD = {"role": "assistant", "content": "w6 w7"}, {"role": "assistant", "content": "w8"}
TEMPLATE = "{% if tools %}w80 {{ tools | length }} {% endif %}{% if loud %}w81 {% endif %}" + tiny.CHAT
TOOL = {
    "type": "function",
    "function": {"name": "f", "description": "", "parameters": {"type": "object", "properties": {}}},
}
SFT = {
    "text": [{"text": "w1 w2 w3"}, {"text": "w4"}, {"text": "w5 w6 <eos>"}],
    "messages": [{"messages": [ASK, GOOD]}, {"messages": [ASK_MORE, BAD, ASK, GOOD]}],
    "conversations": [{"conversations": [{"from": "user", "value": "w1"}, {"from": "assistant", "value": "w2"}]}],
    "prompt": [{"prompt": "w1 w2 ", "completion": "w3 w4"}, {"prompt": "w5 ", "completion": "w6 <eos>"}],
    "prompt messages": [{"prompt": [ASK], "completion": [GOOD]}, {"prompt": [ASK, BAD, ASK_MORE], "completion": [BAD]}],
    "tools": [{"messages": [ASK, GOOD], "tools": [TOOL], "chat_template_kwargs": {"loud": True}}],
    "tools as JSON": [{"prompt": [ASK], "completion": [GOOD], "tools": "[" + str(TOOL).replace("'", '"') + "]"}],
    "tokenised": [{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9]}],
    "labels": [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8, 9], "labels": [-100, 9]}],
    "mask": [{"input_ids": [5, 6, 7], "completion_mask": [0, 1, 1]}, {"input_ids": [8, 9], "completion_mask": [0, 1]}],
}
DPO = {
    "strings": [
        {"prompt": "w1 w2 ", "chosen": "w3 w4", "rejected": "w5"},
        {"prompt": "w6 ", "chosen": "w7 <eos>", "rejected": "w8 w9 w10"},
        {"prompt": "w1 w2 w3 w4 ", "chosen": "w5", "rejected": "w6 w7"},
    ],
    "messages": [{"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD]}] * 2,
    "no prompt": [{"chosen": "w1 w2 w3", "rejected": "w1 w2 w4 w5"}, {"chosen": "w6 w7", "rejected": "w6 w8"}],
    "no prompt, messages": [{"chosen": [ASK, GOOD], "rejected": [ASK, BAD]}],
    "tools": [
        {"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD], "tools": [TOOL], "chat_template_kwargs": {"loud": True}}
    ],
}


@pytest.fixture
def tokenizer():
    tok = tiny.tokenizer()
    tok.chat_template = TEMPLATE
    return tok


def of_trl(kind, tokenizer, rows, **options):
    """Tensors of TRL's own preparation and collator."""
    trainer_class, config = (SFTTrainer, SFTConfig) if kind == "sft" else (DPOTrainer, DPOConfig)
    args = config(output_dir=tempfile.mkdtemp(), bf16=False, use_cpu=True, report_to="none", **options)
    made = trainer_class(
        model=tiny.lora(tiny.llama()), args=args, train_dataset=Dataset.from_list(copy.deepcopy(rows)),
        processing_class=tokenizer,
    )  # fmt: skip
    return made.data_collator([made.train_dataset[i] for i in range(len(made.train_dataset))])


def same(ours, theirs, keys):
    assert set(ours) == set(keys)
    for key in keys:
        assert torch.equal(ours[key], theirs[key]), key


@pytest.mark.parametrize("rows", SFT.values(), ids=SFT.keys())
def test_rows_are_read_as_SFT_reads_them(tokenizer, rows):
    (batch,) = to_batches(rows, tokenizer)
    options = {"completion_only_loss": True} if "completion_mask" in rows[0] else {}
    theirs = of_trl("sft", tokenizer, rows, **options)
    theirs.setdefault("attention_mask", torch.ones_like(theirs["input_ids"]))
    same(batch, theirs, ["input_ids", "attention_mask", "labels"])


@pytest.mark.parametrize("name", DPO)
@pytest.mark.parametrize("cut", [False, True])
def test_preference_rows_are_read_as_DPO_reads_them(tokenizer, name, cut):
    rows, max_length = DPO[name], (8 if name == "tools" else 5) if cut else None
    theirs = of_trl("dpo", tokenizer, rows, max_length=max_length)
    (batch,) = to_batches(rows, tokenizer, max_length=max_length)
    same(batch, theirs, ["input_ids", "attention_mask", "completion_mask"])


def test_conversations_in_roles_are_messages(tokenizer):
    """TRL's SFT converts `from` and `value` alone, and stops with a KeyError at these."""
    (batch,), (wanted,) = (to_batches([{key: [ASK, GOOD]}], tokenizer) for key in ("conversations", "messages"))
    same(batch, wanted, list(wanted))


def test_cut_rows_are_those_of_SFT(tokenizer):
    rows = [{"prompt": "w1 w2 ", "completion": "w3 w4"}, {"prompt": "w1 w2 w3 w4 ", "completion": "w5"}]
    (batch,) = to_batches(rows, tokenizer, max_length=3)
    same(batch, of_trl("sft", tokenizer, rows, max_length=3), ["input_ids", "attention_mask", "labels"])
    assert batch["input_ids"].shape == (1, 3)  # of the second row nothing supervised is left


def test_what_is_given_is_not_changed(tokenizer):
    rows = [copy.deepcopy(row) for group in (*SFT.values(), *DPO.values()) for row in group]
    before = copy.deepcopy(rows)
    to_batches(rows, tokenizer)
    assert rows == before


def test_tools_and_template_settings_reach_the_template(tokenizer):
    plain, loud = (
        to_batches([{"messages": [ASK, GOOD], **more}], tokenizer)[0]["input_ids"][0].tolist()
        for more in ({}, {"tools": [TOOL], "chat_template_kwargs": {"loud": True}})
    )
    first = tokenizer("w80 1 w81")["input_ids"]
    assert loud == first + plain


def test_of_unpaired_rows_the_good_ones_are_kept(tokenizer):
    good, bad = ({"prompt": "w1 ", "completion": word, "label": word == "w2"} for word in ("w2", "w3"))
    (batch,) = to_batches([bad, good, bad], tokenizer)
    (wanted,) = to_batches([{"prompt": "w1 ", "completion": "w2"}], tokenizer)
    same(batch, wanted, list(wanted))
    with pytest.raises(WrongSetup, match="Nothing is left of 2 retain rows.*2 have a false label"):
        to_batches([bad, bad], tokenizer)
    with pytest.raises(WrongSetup, match="label is true or false, but it is 'nice'"):
        to_batches([{**good, "label": "nice"}], tokenizer)


def test_of_stepwise_rows_the_right_beginning_is_kept(tokenizer):
    steps = {"prompt": "w1 ", "completions": ["w2 ", "w3 ", "w4"]}
    rows = [{**steps, "labels": labels} for labels in ([True] * 3, [True, False, True], [False, True, True])]
    (batch,) = to_batches(rows, tokenizer)
    word = dict(zip(("w1", "w2", "w3", "w4", "<eos>"), tokenizer("w1 w2 w3 w4 <eos>")["input_ids"], strict=True))
    whole = [word[name] for name in ("w1", "w2", "w3", "w4", "<eos>")]
    assert batch["input_ids"].tolist() == [whole, [word["w1"], word["w2"], 0, 0, 0]]  # no end where it was cut off
    assert batch["labels"].tolist() == [[-100, *whole[1:]], [-100, word["w2"], -100, -100, -100]]
    with pytest.raises(WrongSetup, match="no right step"):
        to_batches(rows[2:], tokenizer)


@pytest.mark.parametrize("prompt", ["w1 w2", [ASK]])
def test_a_prompt_alone_is_refused(tokenizer, prompt):
    with pytest.raises(WrongSetup, match="a prompt alone .keys: prompt.*Add the 'completion'"):
        to_batches([{"prompt": prompt}], tokenizer)


def test_an_unknown_row_is_refused_with_its_keys(tokenizer):
    with pytest.raises(WrongSetup, match=r"\['answer', 'question'\].*'chosen' and 'rejected'"):
        to_batches([{"question": "w1", "answer": "w2"}], tokenizer)


def test_each_row_of_a_mixture_is_read_in_its_own_format(tokenizer):
    text, pair, other, more = {"text": "w1 w2"}, DPO["strings"][0], SFT["prompt messages"][0], DPO["messages"][0]
    batches = to_batches([text, pair, other, more], tokenizer)
    assert [sorted(batch) for batch in batches] == [
        ["attention_mask", "input_ids", "labels"],
        ["attention_mask", "completion_mask", "input_ids"],
    ]
    assert [len(batch["input_ids"]) for batch in batches] == [2, 4]
    for row, (batch, places) in {0: (batches[0], [0]), 1: (batches[1], [0, 2]), 2: (batches[0], [1])}.items():
        (alone,) = to_batches([[text, pair, other][row]], tokenizer)
        ids, width = alone["input_ids"], alone["input_ids"].shape[1]
        assert torch.equal(batch["input_ids"][places][:, :width], ids)


def test_empty_columns_of_a_table_are_no_keys(tokenizer):
    table = Dataset.from_dict({"text": ["w1 w2", None], "messages": [None, [ASK, GOOD]]})
    (batch,) = to_batches(table, tokenizer)
    (wanted,) = to_batches([{"text": "w1 w2"}, {"messages": [ASK, GOOD]}], tokenizer)
    same(batch, wanted, list(wanted))


def test_batches_have_a_fixed_height(tokenizer):
    rows = DPO["strings"] * 3
    assert [len(batch["input_ids"]) for batch in to_batches(rows, tokenizer, batch_size=4)] == [8, 8, 2]


def test_padding_in_tokenised_rows_is_taken_out(tokenizer):
    row = {"input_ids": torch.tensor([0, 0, 5, 6]), "attention_mask": torch.tensor([0, 0, 1, 1])}
    (batch,) = to_batches([row], None)
    assert batch["input_ids"].tolist() == [[5, 6]]
    with pytest.raises(WrongSetup, match="different lengths"):
        to_batches([{"input_ids": [5, 6], "labels": [5]}], tokenizer)


def test_ready_batches_are_kept(tokenizer):
    ready = tiny.batches(2)
    assert all(torch.equal(a[k], b[k]) for a, b in zip(to_batches(ready, None), ready, strict=True) for k in b)
    with pytest.raises(WrongSetup, match="mixes rows with ready batches"):
        to_batches([*ready, {"text": "w1"}], tokenizer)


def test_nothing_supervised_is_an_error(tokenizer):
    with pytest.raises(WrongSetup, match="Nothing is left of 1 retain rows.*within max_length=2.*raise max_length"):
        to_batches([{"prompt": "w1 w2 w3 ", "completion": "w4"}], tokenizer, max_length=2)
    assert to_batches([], tokenizer) == []


def test_rows_without_a_tokenizer_say_so():
    with pytest.raises(WrongSetup, match="need a tokenizer"):
        to_batches([{"text": "w1 w2"}], None)


def test_without_TRL_the_formats_that_need_it_say_so(tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "trl.data_utils", None)
    for rows in (SFT["conversations"], DPO["no prompt"]):
        with pytest.raises(WrongSetup, match="not installed: pip install"):
            to_batches(rows, tokenizer)
    assert to_batches([*DPO["strings"], *SFT["tools"], *SFT["prompt"]], tokenizer)


def test_sets_by_name(tokenizer):
    sets = to_sets({"text": SFT["text"], "pairs": DPO["strings"]}, tokenizer, batch_size=2)
    assert {name: [sorted(batch)[-1] for batch in batches] for name, batches in sets.items()} == {
        "text": ["labels", "labels"],
        "pairs": ["input_ids", "input_ids"],
    }
    (cut,) = to_sets({"text": SFT["text"]}, tokenizer, max_length=2)["text"]
    assert cut["input_ids"].shape[1] == 2


def test_a_plain_list_is_one_set(tokenizer):
    assert list(to_sets(iter(SFT["text"]), tokenizer)) == ["retain"]
    assert to_sets([], tokenizer) == {}
    assert len(to_sets(tiny.batches(3), None)["retain"]) == 3


def test_a_set_that_cannot_be_used_is_named(tokenizer):
    with pytest.raises(WrongSetup, match="Retain set 'chat' has no rows"):
        to_sets({"text": SFT["text"], "chat": []}, tokenizer)
    with pytest.raises(WrongSetup, match="Retain set 'chat': A retain row has a prompt alone"):
        to_sets({"chat": [{"prompt": "w1"}]}, tokenizer)
    with pytest.raises(WrongSetup, match="that is one row or one batch"):
        to_sets({"text": "w1 w2"}, tokenizer)
    with pytest.raises(WrongSetup, match="that is one row or one batch"):
        to_sets(tiny.batches(1)[0], tokenizer)
