"""Which tokens count, and how updates are read off LoRA layers."""

import torch
from holdfast.core.selection import low_rank_updates, trainable
from holdfast.core.types import Supervision, TokenCounts

import tiny


def test_masks_of_a_padded_batch():
    batch = {
        "input_ids": torch.tensor([[5, 6, 7, 8, 0, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 0, 0]]),
        "labels": torch.tensor([[-100, -100, 7, 8, -100, -100]]),
    }
    found = Supervision.of(batch)
    assert found.targets.tolist() == [[6, 7, 8, 0, 0]]
    assert found.completion.tolist() == [[False, True, True, False, False]]
    assert found.prompt.tolist() == [[True, False, False, False, False]]
    assert found.mask("all").sum() == 3


def test_masks_of_a_packed_row():
    batch = {
        "input_ids": torch.tensor([[5, 6, 7, 8, 9]]),
        "position_ids": torch.tensor([[0, 1, 2, 0, 1]]),
        "labels": torch.tensor([[-100, -100, 7, -100, 9]]),
    }
    found = Supervision.of(batch)
    assert found.completion.tolist() == [[False, True, False, True]]
    assert found.prompt.tolist() == [[True, False, False, False]]  # 8 does not follow from 7


def test_masks_of_a_preference_batch():
    batch = {
        "input_ids": torch.tensor([[5, 6, 7], [5, 6, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
        "completion_mask": torch.tensor([[0, 0, 1], [0, 1, 0]]),
    }
    found = Supervision.of(batch)
    assert found.completion.tolist() == [[False, True], [True, False]]
    assert found.prompt.tolist() == [[True, False], [False, False]]


def test_counts_add_up():
    batches = tiny.batches(3)
    counts = TokenCounts.of(batches)
    assert counts.completion == sum(int((b["labels"][:, 1:] != -100).sum()) for b in batches)
    assert counts.over("all") == counts.completion + counts.prompt


def test_low_rank_updates_form_the_weight_that_peft_adds():
    for options in ({}, {"use_rslora": True}):
        model = tiny.lora(tiny.llama(), **options)
        tiny.shake(model)
        updates = low_rank_updates(model, trainable(model))
        layers = {f"{n}.default": m for n, m in model.named_modules() if hasattr(m, "get_delta_weight")}
        assert {u.name for u in updates} == set(layers)
        for update in updates:
            torch.testing.assert_close(update.dense(), layers[update.name].get_delta_weight("default"))
    assert low_rank_updates(tiny.llama(), {}) == []
