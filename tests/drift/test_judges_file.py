"""Files of judges: YAML and JSON, what is loaded from them, every fault at once and before any model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from holdfast.drift import judges_file
from holdfast.drift.harm import HarmChat, HarmClassifier
from holdfast.drift.judges_file import read_judges
from holdfast.drift.refusal import Exchange, JudgeError
from holdfast.drift.refusal_judges import ChatJudge, ClassifierJudge
from transformers import BertConfig, BertForSequenceClassification

import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A classifier in `labels/` and a chat model in `chat/`."""
    folder = tmp_path_factory.mktemp("judges")
    config = BertConfig(
        vocab_size=96, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=32, id2label={0: "NORMAL", 1: "OTHER"}, label2id={"NORMAL": 0, "OTHER": 1},
    )  # fmt: skip
    for name, model in (("labels", BertForSequenceClassification(config)), ("chat", tiny.llama())):
        model.save_pretrained(folder / name)
        tiny.tokenizer().save_pretrained(folder / name)
    return folder


def written(folder, text, name="judges.yaml"):
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


RIGHT = """
judges:
  - {name: first, measures: refusal, kind: classifier, model: labels, certain: 0.6,
     reads: {NORMAL: compliance, OTHER: refusal}}
  - {name: talk, measures: refusal, kind: chat, model: ./chat, batch_size: 2, device: cpu}
  - {name: tox, measures: harm, kind: classifier, model: ./labels, template: "{prompt} {answer}",
     reads: {NORMAL: harmless, OTHER: harmful}}
  - {name: turns, measures: harm, kind: chat, model: chat, reads: {unsafe: harmful, "no": harmless}, as_turns: true}
"""


def test_judges_are_made_as_the_file_says(folder):
    refusals, harms = read_judges(written(folder, RIGHT))
    assert [(type(judge), judge.name) for judge in (*refusals, *harms)] == [
        (ClassifierJudge, "first"), (ChatJudge, "talk"), (HarmClassifier, "tox"), (HarmChat, "turns"),
    ]  # fmt: skip
    by_hand = [
        ClassifierJudge(folder / "labels", {"NORMAL": "compliance", "OTHER": "refusal"}, certain=0.6),
        ChatJudge(folder / "chat"),
        HarmClassifier(folder / "labels", {"NORMAL": "harmless", "OTHER": "harmful"}, template="{prompt} {answer}"),
        HarmChat(folder / "chat", {"unsafe": "harmful", "no": "harmless"}, as_turns=True),
    ]
    assert [judge.version for judge in (*refusals, *harms)] == [judge.version for judge in by_hand]
    assert refusals[0].label([Exchange("w1", "w2")])[0].instrument == "first"
    assert harms[0].rate([Exchange("w1", "w2")])[0].instrument == "tox"


def test_the_file_of_the_docs_is_right(folder, monkeypatch):
    page = (Path(__file__).resolve().parents[2] / "docs" / "judges.md").read_text(encoding="utf-8")
    kinds = {key: (lambda key=key, **settings: (key, settings), own) for key, (_, own) in judges_file.KINDS.items()}
    monkeypatch.setattr(judges_file, "KINDS", kinds)
    refusals, harms = read_judges(written(folder, page.split("```yaml")[1].split("```")[0], "docs.yaml"))
    assert [(key, settings["name"]) for key, settings in (*refusals, *harms)] == [
        (("refusal", "classifier"), "mine"), (("harm", "classifier"), "tox"), (("harm", "chat"), "chat"),
    ]  # fmt: skip
    assert refusals[0][1]["revision"] == "1a2b3c4d"
    assert all(f"`{key}`" in page for key in {*judges_file.COMMON, *(key for _, own in kinds.values() for key in own)})


def test_json_is_read_alike_and_needs_no_yaml(folder, monkeypatch):
    row = {"name": "talk", "measures": "harm", "kind": "chat", "model": str(folder / "chat")}
    path = written(folder, json.dumps({"judges": [row]}), "judges.json")
    monkeypatch.setitem(__import__("sys").modules, "yaml", None)  # as where pyyaml is not installed
    refusals, harms = read_judges(path)
    assert (refusals, [judge.name for judge in harms]) == ([], ["talk"])
    with pytest.raises(JudgeError, match=r"holdfast\[cli\].*JSON"):
        read_judges(written(folder, RIGHT))


WRONG = """
judges:
  - {name: a, measures: harm, kind: chat, modle: x, template: "{answer}"}
  - just text
  - {name: "", measures: harms, kind: classifer, model: 7, reads: {A: harmful}, revision: 12345678}
  - {measures: harm, kind: classifier, model: x, reads: {yes: harmfull, B: refusal}, certain: 2, batch_size: 0}
  - {name: b, measures: refusal, kind: classifier, model: x, template: "{prompt}", device: }
  - {name: b, measures: harm, kind: chat, model: x, as_turns: 1, reads: {safe: unsure}}
  - {name: c, measures: harm, kind: chat, model: x, as_turns: true}
  - {name: d, measures: refusal, kind: chat, model: x, reads: {a: refusal}, colour: red}
"""
FAULTS = [
    "judge 1 ('a'): unknown key 'modle'; did you mean 'model'?",
    "judge 1 ('a'): template is no setting of a chat judge of harm",
    "judge 1 ('a'): model is missing",
    "judge 2: it must be a mapping of settings, got 'just text'",
    "judge 3 (''): name must be a text that is not empty, got ''",
    "judge 3 (''): model must be a text that is not empty, got 7 (put it in quotes)",
    "judge 3 (''): revision must be a text that is not empty, got 12345678 (put it in quotes)",
    "judge 3 (''): measures must be one of refusal, harm, got 'harms'; did you mean 'harm'?",
    "judge 3 (''): kind must be one of classifier, chat, got 'classifer'; did you mean 'classifier'?",
    "judge 4: name is missing",
    "judge 4: batch_size must be a whole number of at least 1, got 0",
    "judge 4: certain must be a number above 0 and at most 1, got 2",
    "judge 4: reads has True, which is no text: put it in quotes (YAML reads yes, no and 1 as values)",
    "judge 4: reads: True is read as 'harmfull', not one of harmful, harmless, broken, unsure; did you mean 'harmful'?",
    "judge 4: reads: 'B' is read as 'refusal', not one of harmful, harmless, broken, unsure",
    "judge 5 ('b'): reads is missing",
    "judge 5 ('b'): device must be a text that is not empty, got None",
    "judge 5 ('b'): template does not show {answer}",
    "judge 6 ('b'): as_turns must be true or false, got 1",
    "judge 6 ('b'): reads has no word that means harmful",
    "judge 6 ('b'): reads has no word that means harmless",
    "judge 7 ('c'): as_turns needs reads: what the words of the model's reply mean, such as unsafe: harmful, safe: "
    "harmless",
    "judge 8 ('d'): reads is no setting of a chat judge of refusal",
    "judge 8 ('d'): unknown key 'colour' (known: name, measures, kind, model, revision, device, batch_size)",
    "4 judges measure harm (a, None, b, c), at most two are taken: where two disagree can be looked at, a vote of many "
    "hides it",
    "2 judges are named 'b': give each its own name, for scores are called by it",
]


def test_every_fault_of_every_entry_comes_at_once_and_before_any_model(tmp_path, monkeypatch):
    monkeypatch.setattr(judges_file, "KINDS", {key: (None, own) for key, (_, own) in judges_file.KINDS.items()})
    with pytest.raises(JudgeError) as caught:
        read_judges(written(tmp_path, WRONG))
    assert list(caught.value.faults) == FAULTS


def test_judges_that_do_not_load_are_all_named(folder):
    text = """
judges:
  - {name: a, measures: harm, kind: classifier, model: labels, reads: {NORMAL: harmless, TOXIC: harmful}}
  - {name: b, measures: harm, kind: chat, model: chat}
  - {name: c, measures: refusal, kind: chat, model: ./nowhere}
"""
    with pytest.raises(JudgeError) as caught:
        read_judges(written(folder, text))
    first, second = caught.value.faults
    assert "judge 1 ('a'): " in first
    assert "its label 'OTHER' is not in reads" in first
    assert "reads has 'TOXIC'" in first
    assert "judge 3 ('c'): The judge ./nowhere could not be loaded" in second


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "must have a list `judges:` with at least one entry, got None"),
        ("judges: []", "at least one entry"),
        ("- {name: a}", "must have a list `judges:`"),
        ("judge: [{name: a}]", "unknown key 'judge'; did you mean 'judges'?"),
        ("judges: [{name: a, name: b}]", "'name' is given twice: keep one (line 1)"),
        ("judges: [", "judges.yaml is neither YAML nor JSON in UTF-8 (while parsing"),
        ("judges: [{revision: 2024-13-45}]", "neither YAML nor JSON"),
        ("judges: &a [*a]", "judge 1: it must be a mapping of settings"),
        ("judges: [{[a]: b}]", "neither YAML nor JSON"),
        ("judges: [{name: [a], measures: [harm], kind: {}, model: x}]", "one of refusal, harm, got ['"),
        ("judges: [{name: a, measures: harm, kind: chat, model: x, reads: [a]}]", "got ['a']"),
        ("judges: [{name: a, measures: harm, kind: chat, model: x, reads: {a: [b]}}]", "read as ['b']"),
    ],
)  # fmt: skip
def test_what_is_no_file_of_judges(tmp_path, text, said):
    with pytest.raises(JudgeError) as caught:
        read_judges(written(tmp_path, text))
    assert said in str(caught.value)


@pytest.mark.parametrize("text", ["{", '{"judges": [{"name": 1, "name": 2}]}', "[" * 100_000, "[]"])
def test_what_is_no_json_file_of_judges(tmp_path, text):
    with pytest.raises(JudgeError, match="neither YAML nor JSON|given twice|must have a list"):
        read_judges(written(tmp_path, text, "judges.json"))


def test_a_file_that_is_not_there_or_no_text(tmp_path):
    with pytest.raises(JudgeError, match=r"none\.yaml cannot be read \(No such file"):
        read_judges(tmp_path / "none.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00judges")
    with pytest.raises(JudgeError, match="in UTF-8"):
        read_judges(tmp_path / "bytes.yaml")
