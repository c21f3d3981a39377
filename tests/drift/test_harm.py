"""Judges of harm: classifiers of either kind, chat models, what counts as nonsense; real tiny models, made here."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass

import pytest
import torch
from holdfast.drift.harm import HARM_VERDICTS, HarmChat, HarmClassifier, Rating, rating_of, refuse_nonsense
from holdfast.drift.probe import ProbeError
from holdfast.drift.refusal import Exchange, JudgeError, Label
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

import tiny

ROWS = [Exchange("w1 w2", " ".join(f"w{(7 * n + k) % 90}" for k in range(n + 1))) for n in range(14)]
WORDS = {"unsafe": "harmful", "safe": "harmless"}


def last(row):
    """The number of the last word of an answer: what the models below go by."""
    return int(row.answer.split()[-1][1:])


def plain(kind, words=96, **changes):
    """A Llama whose layer adds nothing: its last hidden state is sqrt(words) times the one-hot last token."""
    config = LlamaConfig(
        vocab_size=words, hidden_size=words, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        head_dim=8, max_position_embeddings=512, tie_word_embeddings=False, rms_norm_eps=0.0,
        pad_token_id=0, eos_token_id=1, bos_token_id=1, **changes,
    )  # fmt: skip
    model = kind(config)
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(torch.eye(words))
        layer = model.model.layers[0]
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    return model


def classifier(folder, logits, **changes):
    """A classifier saved in `folder` whose logit for a label is `logits[label](number of the answer's last word)`."""
    labels = dict(enumerate(logits))
    model = plain(
        LlamaForSequenceClassification, id2label=labels, label2id={v: k for k, v in labels.items()}, **changes
    )
    with torch.no_grad():
        model.score.weight.zero_()
        for place, of in enumerate(logits.values()):
            for word in range(90):
                model.score.weight[place, 5 + word] = of(word) / math.sqrt(96)
    return saved(model, folder)


def saved(model, folder, tokenizer=None):
    model.save_pretrained(folder)
    (tokenizer or tiny.tokenizer()).save_pretrained(folder)
    return folder


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def verdicts(ratings):
    return [rating.verdict for rating in ratings]


# ---- classifiers whose labels exclude each other
@pytest.fixture(scope="module")
def toxic(tmp_path_factory):
    """Harmful in proportion to the number of the last word: probability sigmoid((word - 39.5) / 10)."""
    logits = {"toxic": lambda word: (word - 39.5) / 10, "neutral": lambda word: 0.0}
    return classifier(tmp_path_factory.mktemp("toxic"), logits)


READS = {"toxic": "harmful", "neutral": "harmless"}


def test_a_classifier_gives_the_probability_of_harm(toxic):
    judge = HarmClassifier(toxic, READS, batch_size=4, name="tox")
    ratings = judge.rate(ROWS)
    expected = [sigmoid((last(row) - 39.5) / 10) for row in ROWS]
    assert [rating.score for rating in ratings] == pytest.approx(expected, abs=1e-5)
    assert verdicts(ratings) == ["harmful" if p > 0.5 else "harmless" for p in expected]
    assert len(set(verdicts(ratings))) == 2
    assert {(rating.instrument, rating.version) for rating in ratings} == {("tox", judge.version)}


def test_ratings_depend_on_no_other_row(toxic):
    together = HarmClassifier(toxic, READS, batch_size=4).rate(ROWS)
    alone = HarmClassifier(toxic, READS, batch_size=1).rate(ROWS[::-1])[::-1]
    assert verdicts(alone) == verdicts(together)
    assert [rating.score for rating in alone] == pytest.approx([rating.score for rating in together], abs=1e-6)


def test_a_decoder_whose_config_names_no_padding_is_read_in_batches(toxic, tmp_path):
    folder = shutil.copytree(toxic, tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    assert config.pop("pad_token_id") == 0
    (folder / "config.json").write_text(json.dumps(config))
    scores = [rating.score for rating in HarmClassifier(folder, READS, batch_size=4).rate(ROWS)]
    assert scores == pytest.approx([sigmoid((last(row) - 39.5) / 10) for row in ROWS], abs=1e-5)


def test_broken_answers_are_rated_without_asking(toxic):
    ratings = HarmClassifier(toxic, READS).rate(
        [Exchange("w1", ""), Exchange("w1", "w89 " * 60), Exchange("w1", "w89")]
    )
    assert [(rating.verdict, rating.why) for rating in ratings] == [
        ("broken", "empty"), ("broken", "looping"), ("harmful", "harmful 0.993"),
    ]  # fmt: skip


def test_below_certain_is_unsure_and_the_version_says_what_was_set(toxic):
    ratings = HarmClassifier(toxic, READS, certain=0.9).rate(ROWS)
    expected = [sigmoid((last(row) - 39.5) / 10) for row in ROWS]
    assert verdicts(ratings) == ["harmful" if p >= 0.9 else "harmless" if p <= 0.1 else "unsure" for p in expected]
    assert set(verdicts(ratings)) == {"harmful", "harmless", "unsure"}
    versions = [
        HarmClassifier(toxic, reads, **settings).version
        for reads, settings in (
            (READS, {}), (READS, {"certain": 0.9}), (READS, {"template": "{prompt} {answer}"}),
            ({"toxic": "harmful", "neutral": "unsure"}, {}), (READS, {"batch_size": 2, "name": "other"}),
        )
    ]  # fmt: skip
    assert len(set(versions)) == 4
    assert versions[0] == versions[-1]


def test_the_template_says_what_is_shown(toxic):
    rows = [Exchange("w80", "w1"), Exchange("w1", "w80")]
    assert verdicts(HarmClassifier(toxic, READS).rate(rows)) == ["harmless", "harmful"]
    assert verdicts(HarmClassifier(toxic, READS, template="{answer} {prompt}").rate(rows)) == ["harmful", "harmless"]


def test_labels_that_are_read_alike_are_added(tmp_path):
    """0.3 + 0.3 of two harmful labels are more than 0.4 of the harmless one, which is the likeliest label."""
    shares = {"hate": 0.3, "threat": 0.3, "fine": 0.4}
    folder = classifier(tmp_path, {label: lambda word, p=p: math.log(p) for label, p in shares.items()})
    reads = {"hate": "harmful", "threat": "harmful", "fine": "harmless"}
    (rating,) = HarmClassifier(folder, reads).rate(ROWS[:1])
    assert (rating.verdict, rating.score) == ("harmful", pytest.approx(0.6, abs=1e-6))


def test_a_random_bert_is_read_too(tmp_path):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=96, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=32, initializer_range=1.0, id2label={0: "neutral", 1: "toxic"},
        label2id={"neutral": 0, "toxic": 1},
    )  # fmt: skip
    model = BertForSequenceClassification(config).eval()
    ratings = HarmClassifier(saved(model, tmp_path), READS, batch_size=3).rate(ROWS)
    ids = [torch.tensor([[5 + int(word[1:]) for word in row.answer.split()]]) for row in ROWS]
    with torch.no_grad():
        expected = [model.double()(row).logits.softmax(-1)[0, 1].item() for row in ids]
    assert [rating.score for rating in ratings] == pytest.approx(expected, abs=1e-5)


# ---- classifiers whose labels stand each for itself
@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """insult from w50 on (0.95), threat from w70 on (0.6), garbage for w7 (0.9), mention always (0.99)."""
    p = {
        "insult": lambda word: 0.95 if word >= 50 else 0.1,
        "threat": lambda word: 0.6 if word >= 70 else 0.2,
        "garbage": lambda word: 0.9 if word == 7 else 0.01,
        "mention": lambda word: 0.99,
    }
    logits = {label: lambda word, of=of: math.log(of(word) / (1 - of(word))) for label, of in p.items()}
    return classifier(tmp_path_factory.mktemp("many"), logits, problem_type="multi_label_classification")


MANY = {"insult": "harmful", "threat": "harmful", "garbage": "broken", "mention": "harmless"}
ONE_WORD = [Exchange("w1", f"w{n}") for n in (3, 7, 50, 70)]


def test_any_harmful_label_is_harmful(many):
    ratings = HarmClassifier(many, MANY).rate(ONE_WORD)
    assert verdicts(ratings) == ["harmless", "broken", "harmful", "harmful"]
    assert [rating.score for rating in ratings] == pytest.approx([0.2, 0.2, 0.95, 0.95], abs=1e-5)
    assert {rating.why for rating in ratings} == {"mention 0.990"}
    threats = HarmClassifier(many, MANY | {"insult": "harmless"}).rate(ONE_WORD)
    assert verdicts(threats) == ["harmless", "broken", "harmless", "harmful"]
    surer = HarmClassifier(many, MANY | {"insult": "harmless"}, certain=0.7).rate(ONE_WORD)
    assert verdicts(surer) == ["harmless", "broken", "harmless", "harmless"]
    unsure = HarmClassifier(many, MANY | {"mention": "unsure"}).rate(ONE_WORD)
    assert verdicts(unsure) == ["unsure", "broken", "harmful", "harmful"]


def test_one_label_needs_to_stand_for_itself(tmp_path):
    """The softmax of one label is 1 for every answer: all would be harmful."""
    logit = {"toxic": lambda word: (word - 39.5) / 10}
    with pytest.raises(JudgeError, match="its probability is always 1.*multi_label_classification"):
        HarmClassifier(classifier(tmp_path / "one", logit), {"toxic": "harmful"})
    alone = classifier(tmp_path / "alone", logit, problem_type="multi_label_classification")
    assert verdicts(HarmClassifier(alone, {"toxic": "harmful"}).rate(ONE_WORD)) == ["harmless"] * 2 + ["harmful"] * 2


def test_faults_of_a_classifier_come_at_once(toxic, tmp_path):
    with pytest.raises(JudgeError) as caught:
        HarmClassifier(toxic, {"toxic": "refusal", "other": "harmless"}, template="{prompt}", certain=0)
    for fault in (
        "its label 'neutral' is not in reads", "reads has 'other'", "'refusal', not one of harmful, harmless",
        "template does not show", "no label that means harmful", "certain must be above 0",
    ):  # fmt: skip
        assert fault in str(caught.value)
    assert len(caught.value.faults) == 6
    with pytest.raises(JudgeError, match=r"could not be loaded .*Give a folder"):
        HarmClassifier(tmp_path / "none", READS)
    with pytest.raises(JudgeError, match="row 0 is"):
        HarmClassifier(toxic, READS).rate(["text"])


# ---- chat models
def chat(folder, reply_to, template=tiny.CHAT, words=("unsafe", "safe")):
    """A chat model whose reply is the word `reply_to(last token)`, and then the end."""
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(list(words))
    tokenizer.chat_template = template
    model = plain(LlamaForCausalLM, words=100)
    with torch.no_grad():
        head = model.get_output_embeddings().weight.zero_()
        for token, id in tokenizer.get_vocab().items():
            head[1 if token in words else tokenizer.convert_tokens_to_ids(reply_to(token)), id] = 1
    return saved(model, folder, tokenizer)


TURNS = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"


def test_a_chat_judge_that_is_shown_turns(tmp_path):
    folder = chat(tmp_path, lambda token: "unsafe" if token[1:] > "4" else "safe", TURNS)
    judge = HarmChat(folder, WORDS, as_turns=True, name="turns", batch_size=3)
    ratings = judge.rate(ROWS)
    assert verdicts(ratings) == ["harmful" if str(last(row)) > "4" else "harmless" for row in ROWS]
    assert len(set(verdicts(ratings))) == 2
    assert {rating.why for rating in ratings} == {"safe", "unsafe"}
    assert {(rating.instrument, rating.version, rating.score) for rating in ratings} == {("turns", judge.version, None)}
    assert HarmChat(folder, WORDS, as_turns=True, name="turns", batch_size=1).rate(ROWS[::-1])[::-1] == ratings
    swapped = HarmChat(folder, {"UNSAFE": "harmless", "Safe": "harmful"}, as_turns=True)
    assert [{"harmful": "harmless", "harmless": "harmful"}[v] for v in verdicts(swapped.rate(ROWS))] == verdicts(
        ratings
    )
    assert len({judge.version, swapped.version, HarmChat(folder, WORDS).version, HarmChat(folder).version}) == 4


def test_a_chat_judge_that_is_asked(tmp_path):
    folder = chat(tmp_path, lambda token: "HARMFUL", words=("HARMFUL",))
    judge = HarmChat(folder, batch_size=2)
    ratings = judge.rate([*ROWS[:3], Exchange("w1", "")])
    assert [(rating.verdict, rating.why) for rating in ratings] == [("harmful", "HARMFUL")] * 3 + [("broken", "empty")]
    ((turn),) = judge._turns(judge._shown(Exchange("{answer} w1", "w2 </answer> <eos> w3 {prompt}")))
    asked = turn["content"]
    assert "<request>\n{answer} w1\n</request>\n<answer>\nw2     w3 {prompt}\n</answer>" in asked
    assert [line.split(":")[0] for line in asked.split("Which is it?\n")[1].splitlines()[:3]] == [
        "HARMFUL", "HARMLESS", "BROKEN",
    ]  # fmt: skip
    (turn,) = HarmChat(folder, WORDS)._turns(Exchange("w1", "w2"))
    assert "\nunsafe: the answer helps with" in turn["content"]
    assert "HARMLESS" not in turn["content"]


def test_faults_of_a_chat_judge_come_at_once(tmp_path):
    with pytest.raises(JudgeError) as caught:
        HarmChat(tmp_path, {"not safe": "harmful", "Safe": "ok", "safe": "unsure"})
    for fault in (
        "'not safe', which is not one word",
        "'ok', not one of",
        "means harmless",
        "when case does not count",
    ):
        assert fault in str(caught.value)
    assert len(caught.value.faults) == 4
    with pytest.raises(JudgeError, match="as_turns needs reads"):
        HarmChat(tmp_path, as_turns=True)
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(JudgeError, match="no chat template"):
        HarmChat(saved(tiny.llama(), tmp_path, tokenizer))


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("HARMFUL", "harmful"), ("**Harmless**.", "harmless"), ("harmful\n\nIt says how.", "harmful"),
        ("\n broken!", "broken"), ("Harmless, as it declines", "harmless"), ("<HARMFUL>", "harmful"),
        ("", "unsure"), ("banana", "unsure"), ("not harmful", "unsure"), ("harmful or harmless", "unsure"),
        ("Harmless. Or harmful?", "unsure"), ("harmful content was not found", "unsure"), ("unsure", "unsure"),
        ("Harmful request: yes", "unsure"), ("The answer is harmful", "unsure"), ("harmful? No", "unsure"),
        ("Harmful: no", "unsure"), ("harmfully", "unsure"), ("...", "unsure"),
    ],
)  # fmt: skip
def test_replies_of_chat_judges(reply, verdict):
    assert rating_of(reply, {"harmful": "harmful", "harmless": "harmless", "broken": "broken"}) == verdict


# ---- nonsense
def test_a_random_chat_model_answers_nonsense(tmp_path):
    judge = HarmChat(saved(tiny.llama(max_position_embeddings=512), tmp_path), name="babble", batch_size=5)
    ratings = judge.rate(ROWS)
    assert verdicts(ratings) == ["unsure"] * len(ROWS)
    with pytest.raises(ProbeError, match=r"'babble' answers nonsense: 14 of 14 .*no usable verdict") as caught:
        refuse_nonsense(judge.name, ratings)
    assert repr(ratings[0].why) in caught.value.faults
    assert len(caught.value.faults) <= 5


@dataclass(frozen=True)
class Said:
    verdict: str
    why: str = ""


@pytest.mark.parametrize("kind", [Said, lambda v: Rating(v, "a", "1"), lambda v: Label(v, "a", "1")])
def test_half_may_be_unsure_and_no_more(kind):
    refuse_nonsense("a", [])
    refuse_nonsense("a", [kind("unsure"), kind("broken")])
    with pytest.raises(ProbeError, match="2 of 3") as caught:
        refuse_nonsense("a", [kind("unsure"), kind("broken"), kind("unsure")])
    assert caught.value.faults == ("(nothing)",)


def test_what_a_verdict_may_be():
    assert HARM_VERDICTS == ("harmful", "harmless", "broken", "unsure")
