"""Rows, blocks and ratios: numbers against float64, whatever the order, the head, the padding and the type."""

from __future__ import annotations

import math
import random
from statistics import fmean

import pytest
import torch
from holdfast.drift import reading, scoring
from holdfast.drift.probe import ProbeError
from holdfast.drift.scoring import Row, answer_ids, divergences, log_probabilities, ratio

import tiny
from drift import sides

rng = random.Random(0)
IDS = [[rng.randrange(5, 95) for _ in range(rng.randint(2, 30))] for _ in range(21)]
TEXTS = [Row.text(ids) for ids in IDS]
WHOLE = [Row(tuple(ids)) for ids in IDS]


@pytest.fixture(scope="module")
def model():
    return sides.tuned_model()


@pytest.fixture(scope="module")
def models(model):
    return sides.models_of(model, tiny.tokenizer())


def test_log_probabilities_are_those_of_each_row_alone(model, models):
    for side in ("base", "tuned"):
        for row, found in zip(TEXTS, log_probabilities(models, side, TEXTS), strict=True):
            slow = sides.log_probabilities(model, row.ids, adapter=side == "tuned")
            expected = [slow[t, target].item() for t, target in enumerate(row.targets)]
            assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_only_the_answer_counts(models):
    prompt, answer = [7, 8, 9], [10, 11]
    whole = log_probabilities(models, "tuned", [Row.text(prompt + answer)])[0]
    assert log_probabilities(models, "tuned", [Row.answer(prompt, answer)])[0] == whole[2:]


def test_divergences_are_those_of_full_logits_in_float64(model, models):
    for row, found in zip(WHOLE, divergences(models, "tuned", WHOLE), strict=True):
        assert len(found) == len(row.ids)
        assert found == pytest.approx(sides.kl(model, row.ids).tolist(), rel=1e-5)


def test_a_small_divergence_keeps_its_digits():
    model = sides.tuned_model(1e-4)
    found = divergences(sides.models_of(model, tiny.tokenizer()), "tuned", WHOLE)
    expected = [sides.kl(model, row.ids).tolist() for row in WHOLE]
    assert 0 < fmean(x for row in expected for x in row) < 1e-6
    for one, slow in zip(found, expected, strict=True):
        assert math.fsum(one) == pytest.approx(math.fsum(slow), rel=1e-3)  # two log-softmaxes would lose all digits
    assert min(x for row in found for x in row) >= 0


@pytest.mark.parametrize("wide", [torch.float32, torch.bfloat16])
def test_an_adapter_that_does_nothing_has_no_divergence(wide):
    models = sides.models_of(sides.tuned_model(0).to(wide), tiny.tokenizer())
    assert {x for row in divergences(models, "tuned", WHOLE) for x in row} == {0.0}


def test_order_and_copies_change_nothing(models):
    for score, rows in ((log_probabilities, TEXTS), (divergences, WHOLE)):
        found = dict(zip(rows, score(models, "tuned", rows), strict=True))
        shuffled = random.Random(1).sample(rows, len(rows)) + rows[:3] * 2
        assert score(models, "tuned", shuffled) == [found[row] for row in shuffled]


def test_the_model_is_given_the_very_same_blocks_whatever_order_rows_come_in(model, monkeypatch):
    """Equal numbers would not show it: on a tiny model padding may change no digit."""
    monkeypatch.setattr(scoring, "TOKENS", 64)
    given = []
    hook = model.get_base_model().model.register_forward_pre_hook(
        lambda module, args, kwargs: given.append((kwargs["input_ids"].tolist(), model.active_adapters)),
        with_kwargs=True,
    )
    runs = []
    for seed, batch_size in ((0, 16), (1, 16), (2, 3)):
        models = sides.models_of(model, tiny.tokenizer(), batch_size=batch_size)
        rows = random.Random(seed).sample(WHOLE, len(WHOLE)) + WHOLE[:seed]
        divergences(models, "tuned", rows)
        runs.append(given.copy())
        given.clear()
    hook.remove()
    assert runs[0] == runs[1] == runs[2]
    blocks = [ids for ids, _ in runs[0] if len(ids) > 1]  # the first is a look at four tokens
    assert len(blocks) > 4
    assert max(len(ids) * len(ids[0]) for ids in blocks) <= 64


def test_a_row_that_another_begins_with_has_its_numbers_and_is_not_read(models, model):
    whole = max(TEXTS, key=lambda row: len(row.ids))
    size = len(whole.ids)
    parts = [whole.cut(size), Row(whole.ids[:-2], 0, whole.targets[:-2]), Row(whole.ids[:3], 0, whole.targets[:3])]
    others = [Row(whole.ids[:3], 1, whole.targets[1:3]), Row(whole.ids[:3], 0, (*whole.targets[:2], 7))]
    read = []
    hook = model.get_base_model().model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    numbers = log_probabilities(models, "tuned", parts + others)
    hook.remove()
    assert read[-1] == 3  # the whole one and two that are no beginnings; before them come looks at four tokens
    assert numbers[1] == numbers[0][:-2]
    assert numbers[2] == numbers[0][:3]
    for row, found in zip(others, numbers[3:], strict=True):
        slow = sides.log_probabilities(model, row.ids, adapter=True)
        wanted = [slow[row.first + t, y].item() for t, y in enumerate(row.targets)]
        assert found == pytest.approx(wanted, rel=1e-5)


def test_every_row_is_done_once(models, monkeypatch):
    monkeypatch.setattr(scoring, "TOKENS", 64)
    told = []
    log_probabilities(models, "base", TEXTS + TEXTS[:4], done=told.append)
    assert sum(told) == len(TEXTS) + 4
    assert 1 < len(told) < len(set(TEXTS))


def test_logits_never_exist_for_more_than_a_few_positions(models, monkeypatch):
    sizes = []
    product = reading.to_logits
    monkeypatch.setattr(reading, "LOGITS", 32 * 96)  # of 96 tokens
    monkeypatch.setattr(reading, "to_logits", lambda rows, *a, **k: (sizes.append(len(rows)), product(rows, *a, **k)))
    divergences(models, "tuned", WHOLE)
    assert max(sizes) == 32


@pytest.mark.parametrize("trained", [{"modules_to_save": ["lm_head"]}, {"target_modules": ["q_proj", "lm_head"]}])
def test_a_trained_head_is_read_on_its_own_side(trained):
    model = tiny.lora(tiny.llama(), **trained)
    tiny.shake(model, 0.1)
    models = sides.models_of(model, tiny.tokenizer())
    for row, found in zip(WHOLE, divergences(models, "tuned", WHOLE), strict=True):
        assert found == pytest.approx(sides.kl(model, row.ids).tolist(), rel=1e-4)
    for side in ("base", "tuned"):
        slow = sides.log_probabilities(model, TEXTS[0].ids, adapter=side == "tuned")
        found = log_probabilities(models, side, TEXTS[:1])[0]
        assert found == pytest.approx([slow[t, y].item() for t, y in enumerate(TEXTS[0].targets)], rel=1e-5)


def test_logits_that_are_no_plain_product_come_from_the_model_itself():
    """The config says nothing of a factor that the model's forward applies: past the head would be wrong."""
    model = sides.tuned_model()
    head = model.get_base_model().lm_head
    head.register_forward_hook(lambda module, args, output: 2 * output)
    found = divergences(sides.models_of(model, tiny.tokenizer()), "tuned", WHOLE[:2])
    for row, one in zip(WHOLE, found, strict=False):
        assert one == pytest.approx(sides.kl(model, row.ids).tolist(), rel=1e-4)


def test_the_bias_of_a_head():
    model = sides.tuned_model()
    generator = torch.Generator().manual_seed(0)
    model.get_base_model().lm_head.bias = torch.nn.Parameter(torch.randn(96, generator=generator), requires_grad=False)
    for row, found in zip(WHOLE, divergences(sides.models_of(model, tiny.tokenizer()), "tuned", WHOLE), strict=True):
        assert found == pytest.approx(sides.kl(model, row.ids).tolist(), rel=1e-5)


@pytest.mark.parametrize("cap", [5.0, None])
def test_scale_and_cap_of_the_head(cap):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, final_logit_softcapping=cap,
    )  # fmt: skip
    model = tiny.lora(Gemma2ForCausalLM(config))
    tiny.shake(model, 0.3)
    for row, found in zip(
        WHOLE[:5], divergences(sides.models_of(model, tiny.tokenizer()), "tuned", WHOLE[:5]), strict=True
    ):
        assert found == pytest.approx(sides.kl(model, row.ids).tolist(), rel=2e-4, abs=1e-7)


def test_bfloat16_is_finite_and_near():
    model = sides.tuned_model()
    expected = [fmean(sides.kl(model, row.ids).tolist()) for row in WHOLE]
    models = sides.models_of(model.to(torch.bfloat16), tiny.tokenizer())
    found = [fmean(row) for row in divergences(models, "tuned", WHOLE)]
    assert found == pytest.approx(expected, rel=0.5)
    assert fmean(found) == pytest.approx(fmean(expected), rel=0.1)
    assert all(math.isfinite(x) and x <= 0 for row in log_probabilities(models, "tuned", TEXTS) for x in row)


def test_the_model_is_left_as_it_was(model, models):
    hooks = [len(module._forward_hooks) for module in model.modules()]
    model.train()
    divergences(models, "tuned", WHOLE[:3])
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert model.training
    model.eval()


def test_long_rows_lose_the_beginning_of_the_prompt_and_then_their_end():
    assert Row.answer([1, 2, 3, 4], [5, 6]).cut(3) == Row((3, 4, 5), 1, (5, 6))
    assert Row.answer([1, 2], [3, 4, 5]).cut(2) == Row((2, 3), 0, (3, 4))
    assert Row.text([1, 2, 3, 4]).cut(2) == Row((1, 2), 0, (2, 3))
    assert Row((1, 2, 3)).cut(2) == Row((1, 2))
    assert Row((1, 2, 3)).cut(3) == Row((1, 2, 3))


def test_the_models_own_limit_is_kept():
    models = sides.models_of(sides.tuned_model(max_position_embeddings=16), tiny.tokenizer())
    long = [Row(tuple(range(5, 45)))]
    assert [len(row) for row in divergences(models, "tuned", long)] == [16]
    assert [len(row) for row in divergences(models, "tuned", long, max_length=4)] == [4]


def test_all_rows_that_cannot_be_read_are_named(models):
    rows = [Row(()), TEXTS[0], Row.answer([], [5]), Row.answer([5, 6], [])]
    with pytest.raises(ProbeError) as error:
        log_probabilities(models, "base", rows, max_length=0)
    assert [fault[:6] for fault in error.value.faults] == ["row 1 ", "row 3 ", "row 4 ", "max_le"]
    assert divergences(models, "tuned", []) == []


def test_ratio_is_that_of_sums_with_items_around_it():
    sums, counts = [2.0, 4.5, 0.25, 9.0], [1, 3, 2, 8]
    score = ratio(sums, counts)
    value = sum(sums) / sum(counts)
    assert score.value == fmean(score.items) == pytest.approx(value, rel=1e-6)
    assert score.items == pytest.approx(
        [value + (s - value * n) * 4 / 14 for s, n in zip(sums, counts, strict=True)], rel=1e-6
    )
    errors = [(s - value * n) / (14 / 4) for s, n in zip(sums, counts, strict=True)]  # the delta method by hand
    assert score.standard_error == pytest.approx(math.sqrt(sum(e * e for e in errors) / 3 / 4), rel=1e-6)
    assert ratio([3.0], [2]).items == (1.5,)
    assert math.isnan(ratio([0.0], [0]).value)


def test_an_answer_to_a_plain_text_begins_with_a_space():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    class Plain:  # models without weights: only their tokenizer is asked
        def __init__(self, tokenizer):
            self.tokenizer = tokenizer

        def ids(self, prompt):
            return list(self.tokenizer(prompt).input_ids)

        def plain_ids(self, text):
            return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    core = Tokenizer(models.BPE({"a": 0, "b": 1, "Ġ": 2, "Ġb": 3}, [("Ġ", "b")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain = Plain(PreTrainedTokenizerFast(tokenizer_object=core))
    assert answer_ids(plain, "a", "b") == ([0], [3])
    assert answer_ids(plain, "a ", "b") == ([0, 2], [1])  # " " is in the prompt: none is added
    chat = sides.models_of(sides.tuned_model(), tiny.tokenizer())
    assert answer_ids(chat, "w1", "w2 w3") == (chat.ids("w1"), [7, 8])
