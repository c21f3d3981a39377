"""The KL on texts and prompts: against float64 on full logits, and exactly 0 where nothing moved."""

from __future__ import annotations

import math
import random
from statistics import fmean

import pytest
import torch
from holdfast.analysis.changes import link_of
from holdfast.drift.probe import ProbeError
from holdfast.drift.probes.output_kl import OutputKL

import tiny
from drift import sides

rng = random.Random(4)
TEXTS = [tiny.sentence(rng, 2, 25) for _ in range(19)]


def silent(n: int) -> None:
    pass


@pytest.fixture(scope="module")
def model():
    return sides.tuned_model()


@pytest.mark.parametrize("prompts", [False, True])
def test_it_is_the_kl_of_full_logits_over_every_position(model, prompts):
    models = sides.models_of(model, tiny.tokenizer())
    score = OutputKL("x", TEXTS, prompts=prompts).measure(models, "tuned", silent).scores["output_kl.x"]
    read = models.ids if prompts else lambda text: models.tokenizer(text).input_ids
    slow = [sides.kl(model, read(text)) for text in sorted(TEXTS)]
    total, count = sum(x.sum().item() for x in slow), sum(map(len, slow))
    value = total / count
    assert score.value == pytest.approx(value, rel=1e-5)
    items = [value + (x.sum().item() - value * len(x)) * len(slow) / count for x in slow]
    assert score.items == pytest.approx(items, rel=1e-5, abs=1e-5 * value)
    assert link_of(score) == "mean"


@pytest.mark.parametrize("size", [1e-4, 1e-2, 3.0])
def test_small_and_large_drift_agree_with_float64(size):
    model = sides.tuned_model(size)
    models = sides.models_of(model, tiny.tokenizer())
    score = OutputKL("x", TEXTS).measure(models, "tuned", silent).scores["output_kl.x"]
    slow = torch.cat([sides.kl(model, tiny.tokenizer()(text).input_ids) for text in TEXTS])
    assert score.value == pytest.approx(slow.mean().item(), rel=1e-3 if size < 1e-3 else 1e-5)
    assert link_of(score) == "mean"


@pytest.mark.parametrize("wide", [torch.float32, torch.bfloat16])
def test_base_is_zero_and_so_is_an_adapter_that_does_nothing(wide):
    models = sides.models_of(sides.tuned_model(0).to(wide), tiny.tokenizer())
    probe = OutputKL("x", TEXTS)
    base, tuned = (probe.measure(models, side, silent) for side in ("base", "tuned"))
    assert base == tuned
    assert tuned.scores["output_kl.x"].value == 0.0
    assert link_of(tuned.scores["output_kl.x"]) == "mean"


def test_order_batch_size_and_copies_change_nothing(model):
    models = sides.models_of(model, tiny.tokenizer())
    found = OutputKL("x", [*TEXTS, TEXTS[3]]).measure(models, "tuned", silent)
    shuffled = OutputKL("x", random.Random(2).sample([*TEXTS, TEXTS[3]], 20))
    assert shuffled.measure(sides.models_of(model, tiny.tokenizer(), batch_size=1), "tuned", silent) == found
    assert len(set(found.scores["output_kl.x"].items)) == len(TEXTS)


def test_texts_are_cut_to_max_length(model):
    models = sides.models_of(model, tiny.tokenizer())
    score = OutputKL("x", TEXTS, max_length=3).measure(models, "tuned", silent).scores["output_kl.x"]
    slow = torch.cat([sides.kl(model, tiny.tokenizer()(text).input_ids[:3]) for text in TEXTS])
    assert score.value == pytest.approx(slow.mean().item(), rel=1e-5)


def test_the_instrument_is_the_same_for_both_sides_and_another_for_other_texts(model):
    models = sides.models_of(model, tiny.tokenizer())

    def instrument(probe, side):
        return probe.measure(models, side, silent).scores["output_kl.x"].instrument

    probe = OutputKL("x", TEXTS[:3])
    assert instrument(probe, "base") == instrument(probe, "tuned")
    assert instrument(OutputKL("x", TEXTS[1:4]), "base") != instrument(probe, "base")
    assert instrument(OutputKL("x", TEXTS[:3], prompts=True), "base") != instrument(probe, "base")
    assert OutputKL("x", TEXTS[:3], max_length=5).identity != probe.identity


def test_progress_counts_texts_on_both_sides(model):
    models = sides.models_of(model, tiny.tokenizer())
    for side in ("base", "tuned"):
        told = []
        OutputKL("x", TEXTS).measure(models, side, told.append)
        assert sum(told) == 19


def test_a_bfloat16_model_is_finite():
    models = sides.models_of(sides.tuned_model().to(torch.bfloat16), tiny.tokenizer())
    score = OutputKL("x", TEXTS).measure(models, "tuned", silent).scores["output_kl.x"]
    assert 0 < score.value < math.inf
    assert fmean(score.items) == score.value


def test_what_cannot_be_measured_is_refused_all_at_once():
    with pytest.raises(ProbeError) as error:
        OutputKL("", ["fine", " ", 3], max_length=0)
    assert [fault[:5] for fault in error.value.faults] == ["the t", "row 2", "row 3", "max_l"]
    with pytest.raises(ProbeError, match="several texts"):
        OutputKL("x", "a text")
    with pytest.raises(ProbeError, match="no texts"):
        OutputKL("x", [])
