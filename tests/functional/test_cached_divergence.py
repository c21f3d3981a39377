"""The KL from a base's statistics is the KL from the base: same value and gradient, as right as float32 can be."""

import math

import pytest
import torch
from holdfast.functional import softmax_blocks
from holdfast.functional.cached_divergence import ReferenceStatistics, cached_kl, reference_statistics
from holdfast.functional.divergence import Divergence, logit_divergence
from holdfast.functional.head import Head
from holdfast.functional.linear_divergence import linear_divergence

HEADS = [{}, {"bias": True}, {"scale": 0.3}, {"scale": -1.5, "bias": True}]
MASKS = pytest.mark.parametrize("mask", ["none", "target"])


def make(seed=0, tokens=13, width=7, vocab=50, drift=1.0, dtype=torch.float64, bias=False, **head):
    """A student and a base that differ by `drift`, with a frozen head; token 2 is ignored."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    reference_hidden, weight = normal(tokens, width), normal(vocab, width)
    hidden = reference_hidden + drift * normal(tokens, width)
    targets = torch.randint(vocab, (tokens,), generator=generator)
    targets[2] = -100
    head = Head(weight.to(dtype), normal(vocab).to(dtype) if bias else None, **head)
    return hidden.to(dtype).requires_grad_(), reference_hidden.to(dtype), head, targets


def slow_statistics(reference_hidden, head, targets, mask):
    """The twin: every probability of the base written out, one position after the other, in float64."""
    means, constants = [], []
    for h0, y in zip(reference_hidden.double(), targets, strict=True):
        logits = Head(head.weight.double(), None if head.bias is None else head.bias.double(), scale=head.scale).logits(
            h0
        )
        kept = torch.tensor([v for v in range(len(logits)) if mask == "none" or v != y])
        q = logits[kept].softmax(0)
        bias = 0.0 if head.bias is None else (q * head.bias.double()[kept]).sum()
        means.append(q @ head.weight.double()[kept])
        constants.append((q * q.log()).sum() - head.scale * bias)  # E_q[log q] - E_q[what of z is not h's]
    return torch.stack(means), torch.stack(constants)


@MASKS
@pytest.mark.parametrize("options", HEADS, ids=str)
@pytest.mark.parametrize("chunk_rows", [1, 5, None])
def test_statistics_equal_the_written_out_expectations(mask, options, chunk_rows):
    _, reference_hidden, head, targets = make(**options)
    found = reference_statistics(reference_hidden, head, targets, mask=mask, chunk_rows=chunk_rows)
    means, constants = slow_statistics(reference_hidden, head, targets, mask)
    counted = targets != -100
    torch.testing.assert_close(found.mean_weight[counted], means[counted], rtol=0, atol=1e-12)
    torch.testing.assert_close(found.constant[counted], constants[counted], rtol=0, atol=1e-12)
    assert not found.mean_weight[2].any()
    assert found.constant[2] == 0


@MASKS
@pytest.mark.parametrize("options", HEADS, ids=str)
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("chunk_rows", [1, 5, None])
def test_equals_the_readable_form(mask, options, reduction, chunk_rows):
    hidden, reference_hidden, head, targets = make(**options)
    kept = reference_statistics(reference_hidden, head, targets, mask=mask)
    fast = cached_kl(hidden, head, *kept, targets, mask=mask, reduction=reduction, chunk_rows=chunk_rows)
    slow = logit_divergence(
        head.logits(hidden), head.logits(reference_hidden), targets, Divergence(mask), reduction=reduction
    )
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-10)
    (mine,), (theirs,) = torch.autograd.grad(fast, hidden), torch.autograd.grad(slow, hidden)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10)
    assert not mine[2].any()


@MASKS
def test_gradient_against_finite_differences(mask):
    hidden, reference_hidden, head, targets = make(scale=0.7, bias=True, tokens=5)
    kept = reference_statistics(reference_hidden, head, targets, mask=mask)
    assert torch.autograd.gradcheck(lambda h: cached_kl(h, head, *kept, targets, mask=mask, chunk_rows=2), hidden)


def test_shapes_of_a_batch_and_no_targets_at_all():
    hidden, reference_hidden, head, targets = make(tokens=12)
    targets[2] = 3
    flat = cached_kl(hidden, head, *reference_statistics(reference_hidden, head))
    batch = [x.view(3, 4, 7) for x in (hidden, reference_hidden)]
    kept = reference_statistics(batch[1], head)
    assert kept.mean_weight.shape == (3, 4, 7)
    assert kept.constant.shape == (3, 4)
    torch.testing.assert_close(cached_kl(batch[0], head, *kept), flat)
    torch.testing.assert_close(linear_divergence(hidden, reference_hidden, head, targets, Divergence("none")), flat)


def test_a_sum_is_scaled_by_what_comes_back_and_nothing_counted_is_nothing():
    hidden, reference_hidden, head, targets = make()
    kept = reference_statistics(reference_hidden, head, targets)
    (once,) = torch.autograd.grad(cached_kl(hidden, head, *kept, targets), hidden)
    (thrice,) = torch.autograd.grad(3 * cached_kl(hidden, head, *kept, targets), hidden)
    torch.testing.assert_close(thrice, 3 * once)
    none = torch.full_like(targets, -100)
    for reduction in ("sum", "mean"):
        empty = cached_kl(hidden, head, *kept, none, reduction=reduction)
        assert empty == 0
        assert not torch.autograd.grad(empty, hidden)[0].any()
    with torch.no_grad():
        assert not cached_kl(hidden, head, *kept, targets).requires_grad


# -- precision

TOKENS, WIDTH, VOCAB = 16, 512, 32_000


def setting(drift, dtype=torch.float32):
    """Logits of standard deviation 3.2, a student `drift` away from its base."""
    generator = torch.Generator().manual_seed(0)
    h0 = torch.randn(TOKENS, WIDTH, generator=generator)
    h = h0 + drift * torch.randn(TOKENS, WIDTH, generator=generator)
    head = Head((3.2 / WIDTH**0.5 * torch.randn(VOCAB, WIDTH, generator=generator)).to(dtype))
    return h.to(dtype).requires_grad_(), h0.to(dtype), head, torch.randint(VOCAB, (TOKENS,), generator=generator)


def truth(hidden, reference_hidden, head, targets, mask):
    exact = hidden.detach().double().requires_grad_()
    wide = Head(head.weight.double())
    value = logit_divergence(wide.logits(exact), wide.logits(reference_hidden.double()), targets, Divergence(mask))
    return value.item() / TOKENS, torch.autograd.grad(value, exact)[0]


def error(value, hidden, expected):
    return ((torch.autograd.grad(value, hidden)[0].double() - expected).norm() / expected.norm()).item()


@MASKS
@pytest.mark.parametrize(("drift", "size"), [(4.4e-4, 1e-6), (4.4e-3, 1e-4), (1.4e-2, 1e-3), (0.08, 0.03), (0.33, 0.5)])
def test_errors_by_storage(mask, drift, size):
    """What the module's docstring says; the KLs run from 1e-6 to 0.5."""
    hidden, reference_hidden, head, targets = setting(drift)
    kl, expected = truth(hidden, reference_hidden, head, targets, mask)
    assert size / 1.4 < kl < size * 1.4

    def found(storage):
        kept = reference_statistics(reference_hidden, head, targets, mask=mask, storage=storage)
        value = cached_kl(hidden, head, *kept, targets, mask=mask)
        return abs(value.item() / TOKENS - kl), error(value, hidden, expected)

    plain = logit_divergence(head.logits(hidden), head.logits(reference_hidden), targets, Divergence(mask))
    value_error, gradient_error = found(torch.float32)
    assert value_error <= 1e-6
    assert gradient_error <= 4e-6 / math.sqrt(kl)
    assert gradient_error <= 1.2 * error(plain, hidden, expected)  # no worse than autograd on float32 logits

    value_error, gradient_error = found(torch.float16)
    assert value_error <= 1e-6 + 1e-3 * kl
    assert gradient_error <= 4e-4 / math.sqrt(kl)

    # the control: bfloat16 is refused because of this
    kept = reference_statistics(reference_hidden, head, targets, mask=mask)
    lost = ReferenceStatistics(kept.mean_weight.bfloat16(), kept.constant)
    assert error(cached_kl(hidden, head, *lost, targets, mask=mask), hidden, expected) > 1e-3 / math.sqrt(kl)


def test_from_a_large_kl_on_no_worse_than_the_live_form():
    hidden, reference_hidden, head, targets = setting(1.0)
    kl, expected = truth(hidden, reference_hidden, head, targets, "none")
    live = linear_divergence(hidden, reference_hidden, head, targets, Divergence("none"))
    cached = cached_kl(hidden, head, *reference_statistics(reference_hidden, head))
    assert kl > 2
    assert error(cached, hidden, expected) <= 1.5 * error(live, hidden, expected)


@MASKS
@pytest.mark.parametrize("storage", [torch.float16, torch.float32])
def test_at_the_base_both_are_rounding(mask, storage):
    hidden, _, head, targets = setting(0.0)
    kept = reference_statistics(hidden.detach(), head, targets, mask=mask, storage=storage)
    value = cached_kl(hidden, head, *kept, targets, mask=mask)
    assert abs(value.item()) / TOKENS < 1e-6
    (gradient,) = torch.autograd.grad(value, hidden)
    assert gradient.norm() / kept.mean_weight.float().norm() < (1e-6 if storage is torch.float32 else 5e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_small_kl_of_a_model_in_low_precision(dtype):
    hidden, reference_hidden, head, targets = setting(0.0145, dtype)
    kl, expected = truth(hidden, reference_hidden, head, targets, "none")
    assert 0.9e-3 < kl < 1.1e-3
    kept = reference_statistics(reference_hidden, head)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = cached_kl(hidden, head, *kept)
    assert value.dtype == torch.float32
    assert value.item() / TOKENS == pytest.approx(kl, rel=1e-3)
    assert error(value, hidden, expected) <= 3e-3  # the gradient comes back in the dtype of the hidden states
    assert torch.autograd.grad(cached_kl(hidden, head, *kept), hidden)[0].dtype == dtype


def rounded_to_tf32(x):
    bits = x.float().contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


def test_products_in_tf32_would_lose_a_small_kl(monkeypatch):
    hidden, reference_hidden, head, targets = setting(0.0145)
    _, expected = truth(hidden, reference_hidden, head, targets, "none")
    exact = softmax_blocks.to_logits, softmax_blocks.to_hidden

    def to_logits(rows, weight, out, *, rounded):
        exact[0](rounded_to_tf32(rows), rounded_to_tf32(weight), out, rounded=rounded)

    def to_hidden(gradient, weight, *, rounded):
        return exact[1](rounded_to_tf32(gradient), rounded_to_tf32(weight), rounded=rounded)

    monkeypatch.setattr(softmax_blocks, "to_logits", to_logits)
    monkeypatch.setattr(softmax_blocks, "to_hidden", to_hidden)
    lost = cached_kl(hidden, head, *reference_statistics(reference_hidden, head))
    assert error(lost, hidden, expected) > 0.01


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_tf32_is_off_inside_and_as_it_was_outside(device):
    matmul = torch.backends.cuda.matmul  # settings alone: no GPU is needed
    name, on, off = ("fp32_precision", "tf32", "ieee") if hasattr(matmul, "fp32_precision") else ("allow_tf32", 1, 0)
    before = getattr(matmul, name)
    try:
        setattr(matmul, name, on)
        with softmax_blocks.exact_products(torch.device(device)):
            assert getattr(matmul, name) == (off if device == "cuda" else on)
        assert getattr(matmul, name) == on
    finally:
        setattr(matmul, name, before)


# -- refusals


def test_refuses_what_would_be_wrong():
    hidden, reference_hidden, head, targets = make()
    kept = reference_statistics(reference_hidden, head)
    capped = Head(head.weight, soft_cap=30.0)
    with pytest.raises(ValueError, match=r"soft cap \(30.0\) is not linear.*Keep the base's hidden states"):
        reference_statistics(reference_hidden, capped)
    with pytest.raises(ValueError, match="soft cap"):
        cached_kl(hidden, capped, *kept)
    for trained in (
        Head(head.weight.clone().requires_grad_()),
        Head(head.weight, torch.zeros(50, dtype=torch.float64).requires_grad_()),
    ):
        with pytest.raises(ValueError, match="The head is trained"):
            cached_kl(hidden, trained, *kept)
    with pytest.raises(ValueError, match="bfloat16 alone costs a twentieth"):
        reference_statistics(reference_hidden, head, storage=torch.bfloat16)
    with pytest.raises(ValueError, match="needs targets"):
        reference_statistics(reference_hidden, head, mask="target")
    with pytest.raises(ValueError, match="mask must be one of"):
        reference_statistics(reference_hidden, head, targets, mask="y")
    with pytest.raises(ValueError, match="chunk_rows must be at least 1"):
        reference_statistics(reference_hidden, head, chunk_rows=0)
    with pytest.raises(ValueError, match="Every position needs its statistics"):
        cached_kl(hidden[1:], head, *kept)
    with pytest.raises(ValueError, match="Every position needs one target"):
        cached_kl(hidden, head, *kept, targets[1:])
    with pytest.raises(ValueError, match="Unknown reduction"):
        cached_kl(hidden, head, *kept, reduction="mean_of_all")
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(cached_kl(hidden, head, *kept), hidden, create_graph=True)


@pytest.mark.parametrize("factor", [1e6, 1e-8])
def test_refuses_numbers_that_float16_cannot_hold(factor):
    _, reference_hidden, head, _ = make(dtype=torch.float32)
    moved = Head(head.weight * factor, scale=1 / factor)
    with pytest.raises(ValueError, match="do not fit float16"):
        reference_statistics(reference_hidden, moved, storage=torch.float16)
    assert reference_statistics(reference_hidden, moved).mean_weight.dtype == torch.float32
