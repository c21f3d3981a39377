"""Where float32 breaks easily: sure targets, logits moved beyond exp, the smallest KL, rows that do not count."""

import pytest
import torch
import torch.nn.functional as F
from holdfast.functional.divergence import Divergence, logit_divergence, target_masked_kl
from holdfast.functional.head import Head
from holdfast.functional.linear_divergence import (
    linear_cross_entropy,
    linear_cross_entropy_with_divergence,
    linear_divergence,
    linear_target_masked_kl,
)

from functional.in_triton.cases import QUIET, gradient, make, relative_error, truth

pytestmark = QUIET


@pytest.mark.parametrize("gap", [16.1, 40.0])
@pytest.mark.parametrize("mask", ["target", "none"])
def test_sure_targets(kernel, gap, mask):
    """The target leads all others together by `gap`; the head is the identity."""
    generator = torch.Generator().manual_seed(0)
    b, z = (2 * torch.randn(3, 48, generator=generator) for _ in range(2))
    y = torch.randint(48, (3, 1), generator=generator)
    for x in (b, z):
        x.scatter_(1, y, x.scatter(1, y, -1e30).logsumexp(1, keepdim=True) + gap)
    z.requires_grad_()
    exact, head = z.detach().double().requires_grad_(), Head(torch.eye(48))
    gap_z, gap_b = (x.gather(1, y).squeeze(1) - x.scatter(1, y, -1e30).logsumexp(1) for x in (exact, b.double()))
    nll = F.softplus(-gap_z).sum()
    expected = target_masked_kl(exact, b.double(), y.squeeze(1), gamma=float(mask == "none"))
    if mask == "none":
        yes, no, turn = torch.sigmoid(gap_b), torch.sigmoid(-gap_b), gap_z - gap_b
        expected = expected + torch.log1p(yes * torch.expm1(no * turn) + no * torch.expm1(-yes * turn)).sum()
    targets = y.squeeze(1)
    for found, wanted in (
        (linear_divergence(z, b, head, targets, Divergence(mask)), expected),
        (linear_cross_entropy(z, head, targets), nll),
        (linear_cross_entropy_with_divergence(z, b, head, targets, Divergence(mask)).loss, expected + nll),
    ):
        assert found.item() == pytest.approx(wanted.item(), rel=1e-5)
        (theirs,) = torch.autograd.grad(wanted, exact, retain_graph=True)
        assert relative_error(torch.autograd.grad(found, z)[0], theirs) <= 1e-5


@pytest.mark.parametrize("mask", ["target", "none"])
def test_logits_that_moved_beyond_what_exp_can_hold(kernel, mask):
    b = torch.tensor([[0.0, -150.0, 1.0, 2.0], [0.0, 1.0, 2.0, 3.0], [0.0, 60.0, 0.0, 0.0]])
    z = torch.tensor([[0.0, 150.0, 1.0, 2.0], [300.0, 1.0, 2.0, -300.0], [0.0, -60.0, 0.0, 1.0]], requires_grad=True)
    y, member = torch.tensor([3, 0, 3]), Divergence(mask)
    fast = linear_divergence(z, b, Head(torch.eye(4)), y, member)
    exact = z.detach().double().requires_grad_()
    slow = logit_divergence(exact, b.double(), y, member)
    torch.testing.assert_close(fast.double(), slow, rtol=1e-5, atol=1e-6)
    found, wanted = torch.autograd.grad(fast, z)[0], torch.autograd.grad(slow, exact)[0]
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shift", [30.0, 300.0])
def test_the_target_logit_is_free(kernel, shift):
    generator = torch.Generator().manual_seed(0)
    b, z = (2 * torch.randn(3, 20, generator=generator) for _ in range(2))
    y = torch.tensor([[3], [19], [0]])
    moved = z.scatter_add(1, y, torch.full((3, 1), shift)).requires_grad_()
    one, other = (linear_target_masked_kl(x, b, Head(torch.eye(20)), y.squeeze(1)) for x in (z, moved))
    torch.testing.assert_close(one, other, rtol=1e-5, atol=0)
    assert (torch.autograd.grad(other, moved)[0].gather(1, y) == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"bias": True, "scale": 0.5, "soft_cap": 3.0}], ids=str)
def test_zero_exactly_at_the_base(kernel, dtype, options):
    hidden, _, head, targets = make(tokens=3, dtype=dtype, **options)
    for mask in ("target", "none"):
        value = linear_divergence(hidden, hidden.detach(), head, targets, Divergence(mask))
        assert value == 0
        assert (torch.autograd.grad(value, hidden)[0] == 0).all()


@pytest.mark.parametrize("mask", ["target", "none"])
def test_a_small_kl_keeps_its_digits_also_where_all_logits_moved_together(kernel, mask):
    hidden, base, head, targets = make(tokens=3, width=16, vocab=500, drift=1e-4)
    weight = torch.cat([head.weight, torch.ones(500, 1)], 1)
    together = torch.cat([hidden.detach(), torch.full((3, 1), 5.0)], 1).requires_grad_()  # 5 more on every logit
    case = together, torch.cat([base, torch.zeros(3, 1)], 1), Head(weight), targets
    value = linear_divergence(*case, Divergence(mask))
    expected, wanted = truth(case, Divergence(mask))
    assert expected < 1e-6
    assert value.item() == pytest.approx(expected, rel=0.02)
    assert relative_error(gradient(value, case)[:, :-1], wanted[:, :-1]) <= 0.01

    near = hidden, base, head, targets
    value = linear_divergence(*near, Divergence(mask))
    expected, wanted = truth(near, Divergence(mask))
    assert value.item() == pytest.approx(expected, rel=1e-3)
    assert relative_error(gradient(value, near), wanted) <= 1e-4


def test_padded_vocabulary_may_be_minus_infinity(kernel):
    hidden, base, head, targets = make(tokens=3, vocab=40)
    padded = torch.cat([head.weight, torch.zeros(30, 7)])
    bias = torch.cat([torch.zeros(40), torch.full((30,), -torch.inf)])
    wanted, found = (
        linear_cross_entropy_with_divergence(hidden, base, each, targets, Divergence("none"), statistics=True)
        for each in (head, Head(padded, bias))
    )
    torch.testing.assert_close(found.loss, wanted.loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.statistics.entropy, wanted.statistics.entropy, rtol=1e-5, atol=1e-6)
    pair = [torch.autograd.grad(each.loss, hidden)[0] for each in (found, wanted)]
    torch.testing.assert_close(*pair, rtol=1e-5, atol=1e-6)


def test_a_batch_in_which_nothing_counts_gives_a_connected_zero(kernel):
    hidden, base, head, _ = make(tokens=2)
    nothing = torch.full((2,), -100)
    for reduction in ("sum", "mean", "mean_kept"):
        value = linear_divergence(hidden, base, head, nothing, Divergence(), reduction=reduction)
        assert value == 0
        assert (torch.autograd.grad(value, hidden)[0] == 0).all()
    found = linear_cross_entropy_with_divergence(hidden, base, head, nothing, Divergence(), statistics=True)
    assert found.loss == 0
    assert all((each == 0).all() for each in found.statistics)


def test_one_row_and_the_smallest_vocabulary(kernel):
    case = make(tokens=1, vocab=2, width=1)
    value = linear_divergence(*case, Divergence("none"))
    expected, wanted = truth(case, Divergence("none"))
    assert value.item() == pytest.approx(expected, rel=1e-5)
    assert relative_error(gradient(value, case), wanted) <= 1e-5
    assert linear_divergence(*case, Divergence()) == 0  # one token is left, with probability 1 on both sides


def test_a_row_that_is_not_a_number_stays_so(kernel):
    hidden, base, head, targets = make(tokens=2)
    broken = hidden.detach().clone()
    broken[1, 0] = torch.nan
    assert linear_divergence(broken, base, head, targets, Divergence()).isnan()
