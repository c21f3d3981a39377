"""Where plain float32 breaks, the fast path does not: confident targets, and logits moved beyond the range of exp.

The head is the identity throughout, so that hidden states are logits and can be set to any value.
"""

import pytest
import torch
import torch.nn.functional as F
from holdfast.functional.divergence import Divergence, logit_divergence, target_masked_kl
from holdfast.functional.head import Head
from holdfast.functional.linear_divergence import linear_cross_entropy, linear_divergence, linear_target_masked_kl


def relative_error(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("gap", [16.1, 20.0, 40.0])
@pytest.mark.parametrize("mask", ["target", "none"])
@pytest.mark.parametrize("gamma", [0.0, 1.0])
def test_confident_targets_in_float32(gap, mask, gamma):
    """The target leads all others together by `gap`."""
    generator = torch.Generator().manual_seed(0)
    b, z = (2 * torch.randn(6, 200, generator=generator) for _ in range(2))
    y = torch.randint(200, (6, 1), generator=generator)
    for x in (b, z):
        x.scatter_(1, y, x.scatter(1, y, -1e30).logsumexp(1, keepdim=True) + gap)
    member, head = Divergence(mask, gamma), Head(torch.eye(200))
    z.requires_grad_()
    fast = linear_divergence(z, b, head, y.squeeze(1), member)
    nll = linear_cross_entropy(z, head, y.squeeze(1))
    exact = z.detach().double().requires_grad_()
    expected = full_or_masked(exact, b.double(), y, member)
    wanted_nll = F.softplus(exact.scatter(1, y, -1e30).logsumexp(1) - exact.gather(1, y).squeeze(1)).sum()
    for found, wanted in ((fast, expected), (nll, wanted_nll)):
        assert wanted > 0
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=0)
        assert relative_error(torch.autograd.grad(found, z)[0], torch.autograd.grad(wanted, exact)[0]) <= 1e-5


def full_or_masked(z, b, y, member):
    """The float64 oracle: the full KL by its decomposition, for 1 − p is below float64's rounding at a gap of 40."""
    masked = target_masked_kl(z, b, y.squeeze(1), gamma=member.gamma + (member.mask == "none"))
    if member.mask == "target":
        return masked
    gap_z, gap_b = (x.gather(1, y).squeeze(1) - x.scatter(1, y, -1e30).logsumexp(1) for x in (z, b))
    yes, no = torch.sigmoid(gap_b), torch.sigmoid(-gap_b)
    change = gap_z - gap_b
    coin = torch.log1p(yes * torch.expm1(no * change) + no * torch.expm1(-yes * change))
    return masked + (no**member.gamma * coin).sum()


@pytest.mark.parametrize("direction", ["forward", "reverse", "js"])
@pytest.mark.parametrize("mask", ["target", "none"])
def test_logits_that_moved_beyond_what_exp_can_hold(mask, direction):
    b = torch.tensor([[0.0, -150.0, 1.0, 2.0], [0.0, 1.0, 2.0, 3.0]])
    z = torch.tensor([[0.0, 150.0, 1.0, 2.0], [300.0, 1.0, 2.0, -300.0]], requires_grad=True)
    y, member = torch.tensor([3, 0]), Divergence(mask, direction=direction)
    fast = linear_divergence(z, b, Head(torch.eye(4)), y, member)
    exact = z.detach().double().requires_grad_()
    slow = logit_divergence(exact, b.double(), y, member)
    torch.testing.assert_close(fast.double(), slow, rtol=1e-5, atol=1e-7)
    found, wanted = torch.autograd.grad(fast, z)[0], torch.autograd.grad(slow, exact)[0]
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("shift", [30.0, -30.0, 300.0])
def test_the_target_logit_is_free(shift):
    generator = torch.Generator().manual_seed(0)
    b, z = (2 * torch.randn(6, 20, generator=generator) for _ in range(2))
    y = torch.randint(20, (6, 1), generator=generator)
    moved = z.scatter_add(1, y, torch.full((6, 1), shift)).requires_grad_()
    z.requires_grad_()
    for direction in ("forward", "reverse", "js"):
        values = [
            linear_target_masked_kl(x, b, Head(torch.eye(20)), y.squeeze(1), direction=direction) for x in (z, moved)
        ]
        torch.testing.assert_close(*values, rtol=1e-6, atol=0)
        gradient = torch.autograd.grad(values[1], moved)[0]
        assert (gradient.gather(1, y) == 0).all()
        torch.testing.assert_close(gradient, torch.autograd.grad(values[0], z)[0], rtol=1e-5, atol=1e-7)
