"""The KL along the base's own answers: against float64 on full logits, and exactly 0 where nothing moved."""

from __future__ import annotations

import math
import random
from statistics import fmean

import pytest
import torch
from holdfast.drift.probe import ProbeError
from holdfast.drift.probes.first_tokens_kl import FirstTokensKL
from holdfast.drift.suite import suite

import tiny
from drift import sides

ROWS = [{"unsafe": f"w{i} w1", "safe": f"w{i} w2", "category": f"c{i % 3}", "id": f"p{i}"} for i in range(10, 21)]
PROMPTS = suite("tiny", ROWS).prompts


def silent(n: int) -> None:
    pass


def unsafe():
    return sorted((p for p in PROMPTS if p.expected == "refuse"), key=lambda p: p.id)


@pytest.fixture(scope="module")
def model():
    return sides.tuned_model(0.05)


def test_it_is_the_kl_of_full_logits_along_the_bases_answer(model):
    models = sides.models_of(model, tiny.tokenizer())
    probe = FirstTokensKL(suite("tiny", ROWS), ks=(1, 3, 6))
    scores = probe.measure(models, "tuned", silent).scores
    replies = models.ask([p.text for p in unsafe()], "base", 6)
    for k in (1, 3, 6):
        slow = []
        for prompt, reply in zip(unsafe(), replies, strict=True):
            asked = models.ids(prompt.text)
            along = sides.kl(model, [*asked, *reply.tokens[:-1]])[len(asked) - 1 :]
            assert len(along) == len(reply.tokens)
            slow.append(along[:k].mean().item())
        assert scores[f"first_tokens_kl.{k}"].items == pytest.approx(slow, rel=1e-5)
        assert scores[f"first_tokens_kl.{k}"].value == pytest.approx(fmean(slow), rel=1e-5)
        assert scores[f"first_tokens_kl.{k}"].categories == tuple(p.category for p in unsafe())


def test_the_answer_is_the_bases_greedy_one(model):
    models = sides.models_of(model, tiny.tokenizer())
    prompt = unsafe()[0].text
    (reply,) = models.ask([prompt], "base", 4)
    asked = models.ids(prompt)
    best = sides.log_probabilities(model, [*asked, *reply.tokens[:-1]], adapter=False).argmax(-1)
    assert tuple(best[len(asked) - 1 :].tolist()) == reply.tokens


def test_an_answer_that_is_only_its_end_counts_its_end():
    """The head is made to say <eos> first, so every answer is one token long whatever k is."""
    model = sides.tuned_model(0.05)
    head = model.get_base_model().lm_head
    head.bias = torch.nn.Parameter(torch.zeros(96), requires_grad=False)
    head.bias.data[1] = 100.0
    models = sides.models_of(model, tiny.tokenizer())
    scores = FirstTokensKL(PROMPTS, ks=(1, 20)).measure(models, "tuned", silent).scores
    assert {len(reply.tokens) for reply in models.ask([p.text for p in unsafe()], "base", 20)} == {1}
    assert scores["first_tokens_kl.1"].items == scores["first_tokens_kl.20"].items


def test_base_is_zero_and_so_is_an_adapter_that_does_nothing():
    models = sides.models_of(sides.tuned_model(0), tiny.tokenizer())
    probe = FirstTokensKL(PROMPTS)
    base = probe.measure(models, "base", silent)
    assert base == probe.measure(models, "tuned", silent)
    assert list(base.scores) == ["first_tokens_kl.1", "first_tokens_kl.5", "first_tokens_kl.20"]
    assert {item for score in base.scores.values() for item in score.items} == {0.0}


def test_order_and_batch_size_change_nothing(model):
    found = FirstTokensKL(PROMPTS).measure(sides.models_of(model, tiny.tokenizer()), "tuned", silent)
    shuffled = FirstTokensKL(random.Random(1).sample(PROMPTS, len(PROMPTS)), ks=(20, 1, 5))
    assert shuffled.identity == FirstTokensKL(PROMPTS).identity
    assert shuffled.measure(sides.models_of(model, tiny.tokenizer(), batch_size=2), "tuned", silent) == found


def test_progress_counts_prompts_on_both_sides(model):
    models = sides.models_of(model, tiny.tokenizer())
    probe = FirstTokensKL(PROMPTS, ks=(2,))
    for side in ("base", "tuned"):
        told = []
        probe.measure(models, side, told.append)
        assert sum(told) == probe.size == 11


def test_a_bfloat16_model_is_finite():
    models = sides.models_of(sides.tuned_model().to(torch.bfloat16), tiny.tokenizer())
    score = FirstTokensKL(PROMPTS, ks=(5,)).measure(models, "tuned", silent).scores["first_tokens_kl.5"]
    assert all(math.isfinite(item) and item > 0 for item in score.items)


def test_what_cannot_be_measured_is_refused_all_at_once():
    safe = [prompt for prompt in PROMPTS if prompt.expected == "comply"]
    with pytest.raises(ProbeError) as error:
        FirstTokensKL(safe, ks=(0, 1, 1, True))
    assert len(error.value.faults) == 4  # no unsafe prompt, 0, True, and 1 given twice
    with pytest.raises(ProbeError, match="two prompts have the id"):
        FirstTokensKL([*PROMPTS, PROMPTS[0]])
