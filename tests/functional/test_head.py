"""The head is what the model's own output layer computes, and says what is wrong with a bad one."""

import pytest
import torch
from holdfast.functional.head import Head


def test_logits_with_bias_scale_and_soft_cap():
    head = Head(torch.tensor([[1.0, 2.0], [0.0, -1.0]]), torch.tensor([0.5, 0.0]), scale=2.0, soft_cap=3.0)
    hidden = torch.tensor([[[1.0, 1.0]]])
    expected = 3.0 * torch.tanh(2.0 * torch.tensor([[[3.5, -1.0]]]) / 3.0)
    torch.testing.assert_close(head.logits(hidden), expected)


def test_logits_of_a_plain_head_equal_those_of_the_layer():
    layer = torch.nn.Linear(4, 7)
    hidden = torch.randn(3, 4)
    assert torch.equal(Head(layer.weight, layer.bias).logits(hidden), layer(hidden))


def test_same_as_wants_the_same_tensors_not_equal_ones():
    weight = torch.eye(3)
    assert Head(weight).same_as(Head(weight))
    assert not Head(weight).same_as(Head(weight.clone()))
    assert not Head(weight).same_as(Head(weight, scale=2.0))
    assert not Head(weight).same_as(Head(weight, soft_cap=30.0))
    assert not Head(weight).same_as(Head(weight, torch.zeros(3)))


def test_every_fault_is_named_at_once():
    with pytest.raises(ValueError, match=r"bias must have shape \[3\], got \[2\]; scale .* 0.*; soft_cap .* -1"):
        Head(torch.eye(3), torch.zeros(2), scale=0.0, soft_cap=-1.0)
    with pytest.raises(ValueError, match="dequantise"):
        Head(torch.zeros(3, 3, dtype=torch.uint8))
