"""The share of harmful answers: counted again by hand, in one order, by judges that are real tiny models."""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from holdfast.drift.harm import HarmChat, HarmClassifier, Rating
from holdfast.drift.models import Models
from holdfast.drift.probe import ProbeError
from holdfast.drift.probes.harm import Harm
from holdfast.drift.refusal import Exchange, broken
from holdfast.drift.suite import Prompt
from transformers import LlamaConfig, LlamaForSequenceClassification

import tiny

PROMPTS = [
    Prompt(f"{n:02}", f"w{n} w{3 * n % 90} w{7 * n % 90}", expected, category, "test", "here", "CC0-1.0")
    for n, (expected, category) in enumerate([("refuse", "fraud"), ("comply", "fraud"), ("refuse", "hate")] * 5, 20)
]
UNSAFE = [prompt for prompt in PROMPTS if prompt.expected == "refuse"]
SAFE = [prompt for prompt in PROMPTS if prompt.expected == "comply"]
READS = {"bad": "harmful", "good": "harmless"}
LONG = 10


@pytest.fixture(scope="module")
def models():
    peft = tiny.lora(tiny.llama())
    tiny.shake(peft, 0.5)

    @contextmanager
    def base():
        with peft.disable_adapter():
            yield peft

    @contextmanager
    def tuned():
        yield peft

    return Models({"base": base, "tuned": tuned}, tiny.tokenizer(), batch_size=4)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Classifiers of the last word: bad where its number divided by 2 (by 3) leaves 0."""
    made = {}
    for divisor in (2, 3):
        config = LlamaConfig(
            vocab_size=96, hidden_size=96, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
            rms_norm_eps=0.0, id2label={0: "good", 1: "bad"}, label2id={"good": 0, "bad": 1}, pad_token_id=0,
        )  # fmt: skip
        model = LlamaForSequenceClassification(config)
        with torch.no_grad():
            model.get_input_embeddings().weight.copy_(torch.eye(96))
            model.model.layers[0].self_attn.o_proj.weight.zero_()
            model.model.layers[0].mlp.down_proj.weight.zero_()
            model.score.weight.zero_()[1] = torch.tensor(
                [(4.0 if token >= 5 and (token - 5) % divisor == 0 else -4.0) / math.sqrt(96) for token in range(96)]
            )
        made[divisor] = tmp_path_factory.mktemp(f"by{divisor}")
        model.save_pretrained(made[divisor])
        tiny.tokenizer().save_pretrained(made[divisor])
    return made


@pytest.fixture(scope="module")
def judges(folders):
    return [HarmClassifier(folders[n], READS, name=f"org/by.{n}", batch_size=3) for n in (2, 3)]


def by_hand(models, side, divisor, prompts):
    """What a judge must say, by the rule that was written into its weights."""
    replies = models.ask([prompt.text for prompt in prompts], side, LONG)
    return [
        "broken" if broken(Exchange(prompt.text, reply.text))
        else "harmful" if int(reply.text.split()[-1][1:]) % divisor == 0 else "harmless"
        for prompt, reply in zip(prompts, replies, strict=True)
    ]  # fmt: skip


@pytest.mark.parametrize("side", ["base", "tuned"])
def test_shares_are_those_counted_by_hand(models, judges, side):
    found = Harm(PROMPTS, judges, LONG).measure(models, side, lambda n: None)
    for judge, divisor in zip(judges, (2, 3), strict=True):
        for ending, prompts in (("", UNSAFE), ("_on_safe", SAFE)):
            expected = by_hand(models, side, divisor, prompts)
            harmful, unsure = (found.scores[f"{kind}.org_by_{divisor}{ending}"] for kind in ("harmful", "unsure"))
            assert harmful.items == tuple(float(verdict == "harmful") for verdict in expected)
            assert harmful.value == expected.count("harmful") / len(expected)
            assert unsure.items == tuple(float(verdict == "broken") for verdict in expected)
            assert harmful.categories == unsure.categories == tuple(prompt.category for prompt in prompts)
            assert harmful.instrument.startswith(f"{judge.name} {judge.version} on ")
            assert not harmful.faults() + unsure.faults()
    alike = [a == b for a, b in zip(*(by_hand(models, side, n, PROMPTS) for n in (2, 3)), strict=True)]
    assert found.scores["judges_agree"].items == tuple(map(float, alike))
    assert 0 < sum(alike) < len(alike)
    assert len(found.scores) == 9


def test_the_sides_differ_and_both_verdicts_come(models, judges):
    """Else the tests above would say little."""
    verdicts = {side: by_hand(models, side, 2, PROMPTS) for side in ("base", "tuned")}
    assert verdicts["base"] != verdicts["tuned"]
    assert all({"harmful", "harmless"} <= set(of) for of in verdicts.values())


def test_answers_are_one_a_prompt_and_judge(models, judges):
    found = Harm(PROMPTS, judges, LONG).measure(models, "tuned", lambda n: None)
    replies = [reply.text for reply in models.ask([prompt.text for prompt in PROMPTS], "tuned", LONG)]
    for place, (judge, divisor) in enumerate(zip(judges, (2, 3), strict=True)):
        answers = found.answers[place * len(PROMPTS) : (place + 1) * len(PROMPTS)]
        assert [(a.id, a.prompt, a.expected, a.category) for a in answers] == [
            (p.id, p.text, p.expected, p.category) for p in PROMPTS
        ]
        assert [answer.text for answer in answers] == replies
        assert [answer.verdict for answer in answers] == by_hand(models, "tuned", divisor, PROMPTS)
        assert {answer.instrument for answer in answers} == {f"{judge.name} {judge.version}"}
    assert len(found.answers) == 2 * len(PROMPTS)


def test_the_order_of_prompts_does_not_matter_and_all_items_are_ticked(models, judges):
    ticks = []
    probe, same = Harm(PROMPTS[::-1], judges, LONG), Harm(PROMPTS, judges, LONG)
    assert probe.measure(models, "base", ticks.append) == same.measure(models, "base", ticks.append)
    assert sum(ticks) == 2 * probe.size == 2 * 3 * len(PROMPTS)
    assert probe.identity == same.identity


def test_identity_and_instrument_know_what_could_change_a_score(models, judges, folders):
    sure = HarmClassifier(folders[2], READS, name="org/by.2", certain=0.9)
    other = [replace(PROMPTS[0], category="x"), *PROMPTS[1:]]
    probes = [
        Harm(PROMPTS, judges, LONG), Harm(PROMPTS, judges, LONG + 1), Harm(PROMPTS, judges[:1], LONG),
        Harm(PROMPTS, [sure], LONG), Harm(PROMPTS[1:], judges, LONG), Harm(other, judges, LONG),
    ]  # fmt: skip
    assert len({repr(probe.identity) for probe in probes}) == len(probes)
    scores = [probe.measure(models, "base", lambda n: None).scores["harmful.org_by_2"] for probe in probes[:5]]
    assert len({score.instrument for score in scores}) == 4  # the second judge is not the first's instrument
    assert scores[0].instrument == scores[2].instrument


def test_without_safe_prompts_and_second_judge_there_is_less(models, judges):
    found = Harm(UNSAFE, judges[:1], LONG).measure(models, "base", lambda n: None)
    assert set(found.scores) == {"harmful.org_by_2", "unsure.org_by_2"}


def test_answers_are_shared_with_other_probes(models, judges):
    """No model is asked twice: the cache answers, so a side that cannot run is not needed."""
    fresh = Models(models.sides, tiny.tokenizer(), batch_size=4)
    fresh.ask([prompt.text for prompt in PROMPTS], "base", LONG)

    @contextmanager
    def forbidden():
        raise AssertionError("asked again")
        yield

    fresh.sides["base"] = forbidden
    Harm(PROMPTS, judges[:1], LONG).measure(fresh, "base", lambda n: None)
    with pytest.raises(AssertionError, match="asked again"):
        Harm(PROMPTS, judges[:1], LONG + 1).measure(fresh, "base", lambda n: None)


def test_a_judge_that_answers_nonsense_is_an_error_with_its_replies(models, tmp_path):
    tiny.llama(max_position_embeddings=512).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    babble = HarmChat(tmp_path, name="babble")
    with pytest.raises(ProbeError, match=r"(?s)'babble' answers nonsense: .*Its replies:\n  - 'w\d+ w\d+"):
        Harm(PROMPTS, [babble], LONG).measure(models, "base", lambda n: None)


class Scripted:
    """A third party's judge, which says of answer n what it was given."""

    name, version = "scripted", "1"

    def __init__(self, *verdicts):
        self.verdicts = verdicts

    def rate(self, exchanges):
        return [Rating(verdict, self.name, self.version) for verdict in self.verdicts]


def test_half_may_be_unsure_and_broken_answers_are_no_judge_s_fault(models):
    found = Harm(PROMPTS[:2], [Scripted("unsure", "harmless")], LONG).measure(models, "base", lambda n: None)
    assert (found.scores["harmful.scripted"].value, found.scores["unsure.scripted"].value) == (0.0, 1.0)
    with pytest.raises(ProbeError, match="2 of 3 answers"):
        Harm(PROMPTS[:3], [Scripted("unsure", "harmless", "unsure")], LONG).measure(models, "base", lambda n: None)
    silent = Models(models.sides, tiny.tokenizer(), digests={"base": "silent"})
    asked = tuple(silent.ids(PROMPTS[0].text))
    silent.ask([prompt.text for prompt in PROMPTS[:3]], "base", LONG)
    kept = silent._replies.of(silent._author("base"), LONG)
    silent._replies.keep(silent._author("base"), LONG, {asked: kept[asked]._replace(text="")})
    found = Harm(PROMPTS[:3], [Scripted("broken", "harmless", "harmful")], LONG).measure(silent, "base", lambda n: None)
    assert found.scores["unsure.scripted"].items == (1.0, 0.0)  # the second prompt is a safe one
    assert found.scores["harmful.scripted"].items == (0.0, 1.0)
    assert found.scores["unsure.scripted_on_safe"].items == (0.0,)
    with pytest.raises(ProbeError, match="2 of 2 answers"):
        Harm(PROMPTS[:3], [Scripted("broken", "unsure", "unsure")], LONG).measure(silent, "base", lambda n: None)


def test_ratings_that_do_not_fit_are_an_error(models):
    with pytest.raises(ProbeError, match="gave 1 ratings for 2 answers"):
        Harm(PROMPTS[:2], [Scripted("harmful")], LONG).measure(models, "base", lambda n: None)
    with pytest.raises(ProbeError, match=r"(?s)none of harmful, .*- 'refusal'"):
        Harm(PROMPTS[:2], [Scripted("refusal", "harmful")], LONG).measure(models, "base", lambda n: None)


def test_faults_come_at_once(judges):
    def named(name):
        judge = Scripted()
        judge.name = name
        return judge

    with pytest.raises(ProbeError) as caught:
        Harm([*SAFE, SAFE[0]], [named("a/b"), named("a.b"), named("??")], 0)
    for fault in (
        "expected to be refused", "2 prompts have the id '21'", "3 judges, at most two", "'??' has no letter",
        "share a score's name (harmful.a_b)", "max_new_tokens must be at least 1, got 0",
    ):  # fmt: skip
        assert fault in str(caught.value)
    assert len(caught.value.faults) == 7  # a_b collides on safe prompts too
    with pytest.raises(ProbeError, match=r"harmful\.x_on_safe"):
        Harm(PROMPTS, [named("x"), named("x_on_safe")])
    with pytest.raises(ProbeError, match="none is shipped"):
        Harm(PROMPTS, [])
