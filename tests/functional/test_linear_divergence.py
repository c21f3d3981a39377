"""The fast path is the readable one: same values, same gradients, in any chunking, and no worse in float32."""

import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from holdfast.functional import products
from holdfast.functional.divergence import Divergence, logit_divergence, target_masked_kl
from holdfast.functional.head import Head
from holdfast.functional.linear_divergence import (
    linear_cross_entropy,
    linear_cross_entropy_with_divergence,
    linear_divergence,
    linear_full_kl,
    linear_target_masked_kl,
)
from hypothesis import given, settings
from hypothesis import strategies as st

MEMBERS = [
    Divergence(*fields)
    for fields in itertools.product(("target", "none"), (0.0, 0.5, 1.0), ("forward", "reverse", "js"), (None, 0.9))
]


def make(seed=0, tokens=13, width=7, vocab=50, drift=1.0, dtype=torch.float64, **head):
    """A student and a base that differ by `drift`, with a trainable head; token 2 is ignored."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    reference_hidden, weight = normal(tokens, width), normal(vocab, width)
    hidden = reference_hidden + drift * normal(tokens, width)
    targets = torch.randint(vocab, (tokens,), generator=generator)
    if tokens > 2:
        targets[2] = -100
    bias = normal(vocab).to(dtype).requires_grad_() if head.pop("bias", False) else None
    head = Head(weight.to(dtype).requires_grad_(), bias, **head)
    return hidden.to(dtype).requires_grad_(), reference_hidden.to(dtype), head, targets


def leaves(hidden, head):
    return [tensor for tensor in (hidden, head.weight, head.bias) if tensor is not None]


def assert_same(found, expected, inputs, rtol=1e-9, atol=1e-12):
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)
    pairs = zip(torch.autograd.grad(found, inputs), torch.autograd.grad(expected, inputs), strict=True)
    for mine, theirs in pairs:
        torch.testing.assert_close(mine, theirs, rtol=rtol, atol=atol)


@pytest.mark.parametrize("at_once", [1, 5, 1024])
def test_a_second_backward_pass_finds_the_gradient_as_it_was(at_once, monkeypatch):
    """Also where the gradient is scaled in several pieces, and another factor comes from above."""
    monkeypatch.setattr(products, "SCALED_AT_ONCE", at_once)
    hidden, reference_hidden, head, targets = make()
    found = linear_target_masked_kl(hidden, reference_hidden, head, targets)
    expected = target_masked_kl(head.logits(hidden), head.logits(reference_hidden).detach(), targets)
    (wanted,) = torch.autograd.grad(expected, hidden)
    for factor in (1.0, -3.0, 1.0):
        (mine,) = torch.autograd.grad(factor * found, hidden, retain_graph=True)
        torch.testing.assert_close(mine, factor * wanted, rtol=1e-9, atol=1e-12)
    assert wanted[2].eq(0).all()  # is ignored
    assert mine[2].eq(0).all()


HEADS = [{}, {"bias": True}, {"scale": 0.3, "bias": True}, {"soft_cap": 2.0, "scale": -1.5, "bias": True}]


@pytest.mark.parametrize("member", MEMBERS, ids=str)
@pytest.mark.parametrize("options", HEADS, ids=str)
@pytest.mark.parametrize("other_reference_head", [False, True])
def test_equals_the_readable_form(member, options, other_reference_head):
    hidden, reference_hidden, head, targets = make(**options)
    reference_head = make(seed=1, bias=True)[2] if other_reference_head else None
    b = (reference_head or head).logits(reference_hidden).detach()
    for reduction in ("sum", "mean", "mean_kept"):
        fast = linear_divergence(
            hidden,
            reference_hidden,
            head,
            targets,
            member,
            reference_head=reference_head,
            chunk_rows=5,
            reduction=reduction,
        )
        slow = logit_divergence(head.logits(hidden), b, targets, member, reduction=reduction)
        assert_same(fast, slow, leaves(hidden, head))


@pytest.mark.parametrize("options", HEADS, ids=str)
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_cross_entropy_equals_the_one_of_torch(options, reduction):
    hidden, _, head, targets = make(**options)
    fast = linear_cross_entropy(hidden, head, targets, chunk_rows=4, reduction=reduction)
    assert_same(fast, F.cross_entropy(head.logits(hidden), targets, reduction=reduction), leaves(hidden, head))


@pytest.mark.parametrize("member", MEMBERS, ids=str)
@pytest.mark.parametrize("options", [HEADS[0], HEADS[3]], ids=str)
def test_both_in_one_pass_equal_their_sum(member, options):
    hidden, reference_hidden, head, targets = make(**options)
    nll = linear_cross_entropy(hidden, head, targets, reduction="mean")
    kl = linear_divergence(hidden, reference_hidden, head, targets, member, reduction="mean")
    both = linear_cross_entropy_with_divergence(
        hidden, reference_hidden, head, targets, member, 0.7, chunk_rows=5, reduction="mean"
    )
    assert_same(both.loss, nll + 0.7 * kl, leaves(hidden, head))
    torch.testing.assert_close(both.cross_entropy, nll.detach())
    torch.testing.assert_close(both.divergence, kl.detach())
    assert not both.divergence.requires_grad


def test_named_forms_are_members_of_the_family():
    case = make()
    options = {"gamma": 0.5, "direction": "reverse", "exclusion": 0.9, "chunk_rows": 3, "reduction": "mean_kept"}
    for named, mask in ((linear_target_masked_kl, "target"), (linear_full_kl, "none")):
        member = Divergence(mask, 0.5, "reverse", 0.9)
        assert named(*case, **options) == linear_divergence(*case, member, chunk_rows=3, reduction="mean_kept")


@pytest.mark.parametrize("member", MEMBERS, ids=str)
@pytest.mark.parametrize("options", HEADS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_zero_exactly_at_the_base(member, options, dtype):
    hidden, _, head, targets = make(dtype=dtype, **options)
    copy = replace(head, weight=head.weight.detach().clone())  # equal, yet another head: the two-product path
    for reference_head in (None, copy):
        value = linear_divergence(hidden, hidden.detach(), head, targets, member, reference_head=reference_head)
        assert value == 0
        for gradient in torch.autograd.grad(value, leaves(hidden, head)):
            assert (gradient == 0).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(MEMBERS), st.integers(1, 20), st.floats(1e-6, 100.0))
def test_never_negative_in_float32_at_any_drift(seed, member, chunk_rows, drift):
    hidden, reference_hidden, head, targets = make(seed, drift=drift, dtype=torch.float32)
    value = linear_divergence(hidden, reference_hidden, head, targets, member, chunk_rows=chunk_rows)
    assert value >= 0
    assert torch.isfinite(torch.autograd.grad(value, hidden)[0]).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(MEMBERS), st.integers(1, 20), st.booleans())
def test_chunks_order_and_padding_change_nothing(seed, member, chunk_rows, pad):
    hidden, reference_hidden, head, targets = make(seed)
    whole = linear_divergence(hidden, reference_hidden, head, targets, member, chunk_rows=100)
    (expected,) = torch.autograd.grad(whole, hidden)
    order = torch.randperm(13, generator=torch.Generator().manual_seed(seed))
    h, h0, y = hidden[order], reference_hidden[order], targets[order]
    if pad:
        filler = torch.full((3, 7), 1e4, dtype=h.dtype)
        h, h0, y = torch.cat([filler, h]), torch.cat([-filler, h0]), torch.cat([torch.full((3,), -100), y])
    value = linear_divergence(h, h0, head, y, member, chunk_rows=chunk_rows)
    torch.testing.assert_close(value, whole, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(value, hidden)[0], expected, rtol=1e-9, atol=1e-12)


def test_batches_keep_their_shape_and_calls_add_up():
    hidden, reference_hidden, head, targets = make(tokens=12)
    shaped = (hidden.view(3, 4, 7), reference_hidden.view(3, 4, 7), head, targets.view(3, 4))
    once = linear_target_masked_kl(*shaped)
    (expected,) = torch.autograd.grad(once, hidden)
    for rows in range(3):
        linear_target_masked_kl(shaped[0][rows], shaped[1][rows], head, shaped[3][rows]).backward()
    torch.testing.assert_close(hidden.grad, expected)
    (scaled,) = torch.autograd.grad(3.0 * linear_target_masked_kl(*shaped), hidden)
    torch.testing.assert_close(scaled, 3.0 * expected)


@pytest.mark.parametrize("targets", [torch.full((4,), -100), torch.empty(0, dtype=torch.long)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_no_supervised_position_gives_a_connected_zero(targets, dtype):
    hidden = torch.randn(len(targets), 7, dtype=dtype, requires_grad=True)
    head = Head(torch.randn(50, 7, dtype=dtype, requires_grad=True))
    out_dtype = torch.float64 if dtype is torch.float64 else torch.float32
    for reduction in ("sum", "mean"):
        kl = linear_target_masked_kl(hidden, hidden.detach(), head, targets, reduction=reduction)
        nll = linear_cross_entropy(hidden, head, targets, reduction=reduction)
        for value in (kl, nll):
            assert (value.item(), value.dtype) == (0.0, out_dtype)
            for gradient in torch.autograd.grad(value, (hidden, head.weight)):
                assert (gradient == 0).all()


def test_a_frozen_head_gets_no_gradient_and_no_grad_gives_the_same_value():
    hidden, reference_hidden, head, targets = make()
    frozen = Head(head.weight.detach())
    value = linear_target_masked_kl(hidden, reference_hidden, frozen, targets)
    value.backward()
    assert hidden.grad.abs().sum() > 0
    assert frozen.weight.grad is None
    with torch.no_grad():
        silent = linear_target_masked_kl(hidden, reference_hidden, head, targets)
    assert silent == value
    assert not silent.requires_grad
    assert not linear_target_masked_kl(hidden.detach(), reference_hidden, frozen, targets).requires_grad


def test_no_gradient_reaches_the_reference():
    hidden, reference_hidden, head, targets = make()
    reference_hidden.requires_grad_()
    other = make(seed=1)[2]
    linear_target_masked_kl(hidden, reference_hidden, head, targets, reference_head=other).backward()
    assert reference_hidden.grad is None
    assert other.weight.grad is None


def test_gradients_of_gradients_are_refused():
    hidden, reference_hidden, head, targets = make()
    value = linear_target_masked_kl(hidden, reference_hidden, head, targets)
    with pytest.raises(RuntimeError, match=r"no second derivative.*use logit_divergence"):
        torch.autograd.grad(value, hidden, create_graph=True)


def test_autocast_does_not_reach_inside():
    hidden, reference_hidden, head, targets = make(dtype=torch.float32)
    plain = linear_target_masked_kl(hidden, reference_hidden, head, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = linear_target_masked_kl(hidden, reference_hidden, head, targets)
    assert cast.dtype is torch.float32
    assert cast == plain
    assert torch.equal(torch.autograd.grad(cast, hidden)[0], torch.autograd.grad(plain, hidden)[0])


def relative_error(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()


def errors(function, slow, case):
    """Relative errors of value and gradient of a float32 function against float64 on the same numbers."""
    hidden, reference_hidden, head, targets = case
    exact = hidden.detach().double().requires_grad_()
    wide = Head(head.weight.detach().double())
    truth = slow(wide.logits(exact), wide.logits(reference_hidden.double()), targets)
    (expected,) = torch.autograd.grad(truth, exact)
    value = function()
    (found,) = torch.autograd.grad(value, hidden)
    return relative_error(value.detach(), truth.detach()), relative_error(found, expected)


@pytest.mark.parametrize("direction", ["forward", "reverse", "js"])
@pytest.mark.parametrize("drift", [1e-3, 1e-2, 0.1, 1.0, 10.0])
@pytest.mark.parametrize("mask", ["target", "none"])
def test_float32_error_is_no_worse_than_the_readable_form(mask, drift, direction):
    hidden, reference_hidden, head, targets = make(drift=drift, vocab=2000, dtype=torch.float32)
    member = Divergence(mask, direction=direction)

    def slow(z, b, y):
        return logit_divergence(z, b, y, member)

    case = hidden, reference_hidden, head, targets
    fast = errors(lambda: linear_divergence(*case, member), slow, case)
    plain = errors(lambda: slow(head.logits(hidden), head.logits(reference_hidden), targets), slow, case)
    for mine, theirs in zip(fast, plain, strict=True):
        assert mine <= 1.2 * theirs + 1e-6


def test_a_small_kl_keeps_its_digits_in_float32():
    """At a KL near 1e-8 the plain form has none left; the centred one has three."""
    hidden, reference_hidden, head, targets = make(drift=1e-4, vocab=2000, dtype=torch.float32)
    case = hidden, reference_hidden, head, targets
    value_error, gradient_error = errors(lambda: linear_target_masked_kl(*case), target_masked_kl, case)
    plain_error, _ = errors(
        lambda: target_masked_kl(head.logits(hidden), head.logits(reference_hidden), targets), target_masked_kl, case
    )
    assert linear_target_masked_kl(*case) < 1e-6
    assert value_error < 1e-3 < plain_error
    assert gradient_error < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_vocabulary_of_qwen(dtype):
    hidden, reference_hidden, head, targets = make(tokens=3, width=16, vocab=151_936, drift=0.1, dtype=dtype)
    case = hidden, reference_hidden, Head(head.weight.detach()), targets
    value_error, gradient_error = errors(lambda: linear_target_masked_kl(*case), target_masked_kl, case)
    assert value_error < 1e-5
    assert gradient_error < (1e-5 if dtype is torch.float32 else 5e-3)  # 2^-8: the gradient itself is bfloat16


def test_padded_vocabulary_rows_may_be_minus_infinity():
    hidden, reference_hidden, head, targets = make(vocab=50)
    padded = torch.cat([head.weight, torch.zeros(6, 7, dtype=torch.float64)]).detach()
    bias = torch.cat([torch.zeros(50), torch.full((6,), -torch.inf)]).double()
    for member in (Divergence(), Divergence("none"), Divergence(gamma=1.0)):
        value = linear_divergence(hidden, reference_hidden, Head(padded, bias), targets, member)
        assert_same(value, linear_divergence(hidden, reference_hidden, head, targets, member), [hidden])


def test_faults_are_named_with_what_to_do():
    hidden, reference_hidden, head, targets = make()
    with pytest.raises(
        ValueError, match=r"hidden must have shape \[\.\.\., 7\].*\[50, 7\].*\[13, 6\].*before the head"
    ):
        linear_target_masked_kl(hidden[:, :6], reference_hidden, head, targets)
    with pytest.raises(ValueError, match=r"reference_hidden has shape \[12, 7\] and targets \[13\].*already shifted"):
        linear_target_masked_kl(hidden, reference_hidden[:12], head, targets)
    with pytest.raises(ValueError, match="50 tokens and reference_head 49"):
        linear_target_masked_kl(hidden, reference_hidden, head, targets, reference_head=Head(head.weight[:49]))
    with pytest.raises(ValueError, match="below 50, but they run from"):
        linear_target_masked_kl(hidden, reference_hidden, head, targets.masked_fill(targets < 0, 50))
    with pytest.raises(ValueError, match="chunk_rows must be at least 1, got 0"):
        linear_target_masked_kl(hidden, reference_hidden, head, targets, chunk_rows=0)
    with pytest.raises(ValueError, match="Unknown reduction 'none'"):
        linear_target_masked_kl(hidden, reference_hidden, head, targets, reduction="none")
