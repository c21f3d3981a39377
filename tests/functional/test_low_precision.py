"""In bfloat16 the gradient of a small KL survives here, and is lost by widening logits that are already rounded."""

import pytest
import torch
from holdfast.functional import chunked
from holdfast.functional.divergence import Divergence, full_kl, target_masked_kl
from holdfast.functional.head import Head
from holdfast.functional.linear_divergence import linear_cross_entropy, linear_full_kl, linear_target_masked_kl

TOKENS, WIDTH, VOCAB = 16, 512, 32_000
PRODUCTS = pytest.mark.parametrize("rounded", [False, True], ids=["widened tiles", "products in bfloat16"])


def setting(drift):
    """Hidden states and a head in bfloat16, logits of standard deviation 3.2, a student `drift` away from its base."""
    generator = torch.Generator().manual_seed(0)
    h0 = torch.randn(TOKENS, WIDTH, generator=generator)
    h = h0 + drift * torch.randn(TOKENS, WIDTH, generator=generator)
    head = Head((3.2 / WIDTH**0.5 * torch.randn(VOCAB, WIDTH, generator=generator)).bfloat16())
    targets = torch.randint(VOCAB, (TOKENS,), generator=generator)
    return h.bfloat16().requires_grad_(), h0.bfloat16(), head, targets


def truth(hidden, reference_hidden, head, targets, divergence):
    """Value per token and gradient, in float64, of the very same bfloat16 numbers."""
    exact = hidden.detach().double().requires_grad_()
    wide = Head(head.weight.double())
    value = divergence(wide.logits(exact), wide.logits(reference_hidden.double()), targets)
    return value.item() / TOKENS, torch.autograd.grad(value, exact)[0]


def error(value, hidden, expected):
    return ((torch.autograd.grad(value, hidden)[0].double() - expected).norm() / expected.norm()).item()


@PRODUCTS
@pytest.mark.parametrize("fast_and_slow", [(linear_target_masked_kl, target_masked_kl), (linear_full_kl, full_kl)])
def test_gradient_of_a_small_kl(rounded, fast_and_slow, monkeypatch):
    fast, slow = fast_and_slow
    monkeypatch.setattr(chunked, "multiplies_bfloat16", lambda device: rounded)
    hidden, reference_hidden, head, targets = setting(drift=0.0145)
    kl, expected = truth(hidden, reference_hidden, head, targets, slow)
    assert 0.9e-3 < kl < 1.1e-3

    value = fast(hidden, reference_hidden, head, targets)
    assert value.item() / TOKENS == pytest.approx(kl, rel=0.01)
    assert error(value, hidden, expected) <= 0.03

    # the control: what comes of rounding both sides' logits to bfloat16 and widening them before the softmax
    usual = slow(head.logits(hidden).float(), head.logits(reference_hidden).float(), targets)
    assert error(usual, hidden, expected) > 0.5


@PRODUCTS
def test_gradient_of_a_small_kl_with_every_extra_of_a_head(rounded, monkeypatch):
    monkeypatch.setattr(chunked, "multiplies_bfloat16", lambda device: rounded)
    hidden, reference_hidden, head, targets = setting(drift=0.0145)
    bias = torch.linspace(-1, 1, VOCAB).bfloat16()
    head = Head(head.weight, bias, scale=0.9, soft_cap=20.0)
    exact = hidden.detach().double().requires_grad_()
    wide = Head(head.weight.double(), bias.double(), scale=0.9, soft_cap=20.0)
    value = target_masked_kl(wide.logits(exact), wide.logits(reference_hidden.double()), targets)
    (expected,) = torch.autograd.grad(value, exact)
    assert error(linear_target_masked_kl(hidden, reference_hidden, head, targets), hidden, expected) <= 0.03


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_another_reference_head_is_never_rounded(dtype, monkeypatch):
    monkeypatch.setattr(chunked, "multiplies_bfloat16", lambda device: True)
    hidden, reference_hidden, head, targets = setting(drift=0.0)
    hidden, reference_hidden = (x.detach().to(dtype) for x in (hidden, reference_hidden))
    weight = head.weight.to(dtype)
    moved = Head(
        (weight.double() + 5e-4 * torch.randn(VOCAB, WIDTH, generator=torch.Generator().manual_seed(1))).to(dtype)
    )
    exact = hidden.double().requires_grad_()
    value = target_masked_kl(
        exact @ moved.weight.double().t(), reference_hidden.double() @ weight.double().t(), targets
    )
    hidden.requires_grad_()
    fast = linear_target_masked_kl(hidden, reference_hidden, moved, targets, reference_head=Head(weight))
    assert fast.item() == pytest.approx(value.item(), rel=1e-4)
    assert error(fast, hidden, torch.autograd.grad(value, exact)[0]) <= 0.01


@PRODUCTS
def test_trainable_head_in_bfloat16(rounded, monkeypatch):
    monkeypatch.setattr(chunked, "multiplies_bfloat16", lambda device: rounded)
    hidden, reference_hidden, head, targets = setting(drift=0.1)
    weight = head.weight[:500].clone().requires_grad_()
    targets = targets % 500
    wide = weight.detach().double().requires_grad_()
    b = reference_hidden.double() @ wide.detach().t()
    (expected,) = torch.autograd.grad(target_masked_kl(hidden.detach().double() @ wide.t(), b, targets), wide)
    value = linear_target_masked_kl(hidden, reference_hidden, Head(weight), targets)
    assert error(value, weight, expected) <= (0.03 if rounded else 0.005)


@PRODUCTS
def test_cross_entropy(rounded, monkeypatch):
    monkeypatch.setattr(chunked, "multiplies_bfloat16", lambda device: rounded)
    hidden, _, head, targets = setting(drift=0.1)
    exact = hidden.detach().double().requires_grad_()
    value = torch.nn.functional.cross_entropy(exact @ head.weight.double().t(), targets, reduction="sum")
    fast = linear_cross_entropy(hidden, head, targets)
    assert fast.item() == pytest.approx(value.item(), rel=2e-3)
    assert error(fast, hidden, torch.autograd.grad(value, exact)[0]) <= 0.01


def test_members_accept_mixed_dtypes():
    """Norms often give float32 hidden states before a bfloat16 head."""
    hidden, reference_hidden, head, targets = setting(drift=0.1)
    wide = linear_target_masked_kl(hidden.detach().float().requires_grad_(), reference_hidden.float(), head, targets)
    narrow = linear_target_masked_kl(hidden, reference_hidden, head, targets)
    assert wide.dtype is narrow.dtype is torch.float32
    torch.testing.assert_close(wide, narrow)
    assert Divergence() == Divergence("target")
