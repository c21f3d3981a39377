from __future__ import annotations

import math

import pytest
import torch
from holdfast.recipe.data import Data
from holdfast.recipe.measure import mean_loss, ratio


@pytest.fixture(scope="module")
def loaded(tiny):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(tiny), AutoTokenizer.from_pretrained(tiny)


@pytest.mark.parametrize("path", ["lab:shift", "lab:retain", "lab:retain_chat"])
def test_it_is_the_models_own_loss_weighted_by_tokens(loaded, path):
    from holdfast.integrations.retain_data import to_batches

    model, tokenizer = loaded
    data, total, count = Data(path, split="test", samples=7), 0.0, 0
    for batch in to_batches(data.rows(), tokenizer, batch_size=1):
        with torch.no_grad():
            loss = model(**batch).loss
        n = int((batch["labels"][:, 1:] != -100).sum())
        total, count = total + float(loss) * n, count + n
    score = mean_loss(model, tokenizer, data, batch_size=3)
    assert score.value == pytest.approx(total / count, rel=1e-5)
    assert len(score.items) == 7
    assert math.fsum(score.items) / 7 == pytest.approx(score.value)


def test_the_batch_size_does_not_matter(loaded):
    one, many = (mean_loss(*loaded, Data("lab:shift", split="test", samples=9), batch_size=n) for n in (1, 9))
    assert one.value == pytest.approx(many.value, rel=1e-5)


def test_the_standard_error_covers_the_truth():
    """Of 400 samples, about 95 % have the population's ratio within two standard errors."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 30, (20000,), generator=generator)
    losses = lengths * (1 + 0.05 * lengths + torch.rand(20000, generator=generator))  # longer rows are harder
    truth = float(losses.sum() / lengths.sum())
    hits = 0
    for _ in range(400):
        chosen = torch.randint(0, 20000, (60,), generator=generator)
        score = ratio(losses[chosen].tolist(), lengths[chosen].tolist())
        hits += abs(score.value - truth) < 2 * score.standard_error
    assert 0.91 < hits / 400 < 0.98


def test_nothing_supervised_is_not_a_number():
    assert math.isnan(ratio([0.0, 0.0], [0, 0]).value)
