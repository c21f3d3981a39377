"""Perplexity against float64, row by row."""

from __future__ import annotations

import math
import random
from statistics import fmean

import pytest
import torch
from holdfast.analysis.changes import link_of
from holdfast.drift.probe import ProbeError
from holdfast.drift.probes.perplexity import Perplexity

import tiny
from drift import sides

rng = random.Random(7)
TEXTS = [tiny.sentence(rng, 2, 25) for _ in range(19)]


def silent(n: int) -> None:
    pass


@pytest.fixture(scope="module")
def model():
    return sides.tuned_model()


@pytest.mark.parametrize("side", ["base", "tuned"])
@pytest.mark.parametrize("max_length", [1024, 4])
def test_it_is_exp_of_the_mean_loss_of_rows_read_alone(model, side, max_length):
    models = sides.models_of(model, tiny.tokenizer())
    score = Perplexity("x", TEXTS, max_length=max_length).measure(models, side, silent).scores["perplexity.x"]
    losses = []
    for text in sorted(TEXTS):
        ids = tiny.tokenizer()(text).input_ids[: max_length + 1]
        log_p = sides.log_probabilities(model, ids, adapter=side == "tuned")
        losses.append([-log_p[t, token].item() for t, token in enumerate(ids[1:])])
    count = sum(map(len, losses))
    mean = sum(map(sum, losses)) / count
    assert score.value == pytest.approx(math.exp(mean), rel=1e-5)
    items = [mean + (sum(row) - mean * len(row)) * len(losses) / count for row in losses]
    assert score.items == pytest.approx(items, rel=1e-5, abs=1e-5)
    assert fmean(score.items) == pytest.approx(math.log(score.value), rel=1e-12)
    assert link_of(score) == "log"


def test_order_and_batch_size_change_nothing(model):
    found = Perplexity("x", TEXTS).measure(sides.models_of(model, tiny.tokenizer()), "tuned", silent)
    shuffled = Perplexity("x", random.Random(2).sample(TEXTS, len(TEXTS)))
    assert shuffled.identity == Perplexity("x", TEXTS).identity
    assert shuffled.measure(sides.models_of(model, tiny.tokenizer(), batch_size=1), "tuned", silent) == found


def test_an_adapter_that_does_nothing_moves_nothing():
    models = sides.models_of(sides.tuned_model(0), tiny.tokenizer())
    base, tuned = (Perplexity("x", TEXTS).measure(models, side, silent) for side in ("base", "tuned"))
    assert base == tuned


def test_a_bfloat16_model_is_finite():
    models = sides.models_of(sides.tuned_model().to(torch.bfloat16), tiny.tokenizer())
    score = Perplexity("x", TEXTS).measure(models, "tuned", silent).scores["perplexity.x"]
    assert all(map(math.isfinite, (score.value, *score.items)))


def test_progress_counts_texts(model):
    told = []
    Perplexity("x", [*TEXTS, TEXTS[0]]).measure(sides.models_of(model, tiny.tokenizer()), "tuned", told.append)
    assert sum(told) == 20


def test_texts_of_one_token_are_all_named(model):
    with pytest.raises(ProbeError) as error:
        Perplexity("x", ["w1", "w1 w2", "w3"]).measure(sides.models_of(model, tiny.tokenizer()), "base", silent)
    assert error.value.faults == ("'w1'", "'w3'")
