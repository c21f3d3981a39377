"""The readable forms obey the laws of a divergence, and are the quantities the papers define."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from holdfast.functional.divergence import Divergence, full_kl, logit_divergence, target_masked_kl
from hypothesis import given, settings
from hypothesis import strategies as st

MEMBERS = [
    Divergence(*fields)
    for fields in itertools.product(("target", "none"), (0.0, 0.5, 1.0), ("forward", "reverse", "js"), (None, 0.3))
]
DIRECTIONS = ("forward", "reverse", "js")


def logits_and_targets(seed=0, tokens=4, vocab=6, size=2.0):
    generator = torch.Generator().manual_seed(seed)
    z, b = (size * torch.randn(tokens, vocab, generator=generator, dtype=torch.float64) for _ in range(2))
    return z.requires_grad_(), b, torch.randint(vocab, (tokens,), generator=generator)


cases = st.builds(
    logits_and_targets,
    seed=st.integers(0, 10**6),
    tokens=st.integers(1, 5),
    vocab=st.integers(2, 30),
    size=st.floats(0.01, 15.0),
)
members = st.sampled_from(MEMBERS)


@pytest.mark.parametrize("member", MEMBERS, ids=str)
def test_gradient_agrees_with_finite_differences(member):
    z, b, y = logits_and_targets()
    assert torch.autograd.gradcheck(lambda z: logit_divergence(z, b, y, member), z)


@settings(max_examples=80, deadline=None)
@given(cases, members)
def test_never_negative_and_zero_exactly_at_the_base(case, member):
    z, b, y = case
    values = logit_divergence(z, b, y, member, reduction="none")
    assert (values >= -1e-13).all()
    at_base = logit_divergence(z, z.detach(), y, member)
    assert at_base == 0
    assert torch.autograd.grad(at_base, z)[0].abs().max() < 1e-14


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(DIRECTIONS))
def test_positive_as_soon_as_two_other_tokens_differ(seed, direction):
    z, b, _ = logits_and_targets(seed, tokens=1)
    y = torch.tensor([0])
    assert target_masked_kl(z, b, y, direction=direction) > 0
    moved = b.clone()
    moved[0, 0] += 3.0  # the target alone: seen by the full KL, invisible to the masked one
    assert target_masked_kl(moved, b, y, direction=direction) == 0
    assert full_kl(moved, b, y, direction=direction) > 0


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("shift", [30.0, -30.0])
def test_the_target_logit_is_free(direction, shift):
    z, b, y = logits_and_targets(seed=1)
    value = target_masked_kl(z, b, y, direction=direction)
    (gradient,) = torch.autograd.grad(value, z)
    assert (gradient.gather(1, y[:, None]) == 0).all()

    moved = z.detach().clone().scatter_add_(1, y[:, None], torch.full((len(y), 1), shift, dtype=z.dtype))
    moved.requires_grad_()
    moved_value = target_masked_kl(moved, b, y, direction=direction)
    assert moved_value == value
    assert torch.equal(torch.autograd.grad(moved_value, moved)[0], gradient)


@settings(max_examples=50, deadline=None)
@given(cases)
def test_is_the_non_target_part_of_decoupled_distillation(case):
    """NCKD of arXiv 2203.08679, equation 5, from probabilities, at temperature 1."""
    z, b, y = case
    p, q = z.softmax(-1), b.softmax(-1)
    total = torch.zeros((), dtype=torch.float64)
    for row, target in enumerate(y.tolist()):
        others = [v for v in range(p.shape[1]) if v != target]
        p_hat, q_hat = p[row, others] / p[row, others].sum(), q[row, others] / q[row, others].sum()
        total = total + (q_hat * (q_hat / p_hat).log()).sum()
    torch.testing.assert_close(target_masked_kl(z, b, y), total, rtol=1e-9, atol=1e-11)


@settings(max_examples=50, deadline=None)
@given(cases)
def test_full_kl_is_a_choice_of_the_target_plus_the_weighted_masked_kl(case):
    z, b, y = (tensor.detach() for tensor in case)
    p, q = (x.softmax(-1).gather(1, y[:, None]).squeeze(1) for x in (z, b))
    no_p, no_q = (x.scatter(1, y[:, None], -math.inf).logsumexp(1).sub(x.logsumexp(1)).exp() for x in (z, b))
    parts = q * (q / p).log() + no_q * (no_q / no_p).log()
    third = target_masked_kl(z, b, y, gamma=1.0, reduction="none")
    torch.testing.assert_close(full_kl(z, b, y, reduction="none"), parts + third, rtol=1e-9, atol=1e-11)


def test_full_kl_is_the_one_of_torch():
    z, b, y = logits_and_targets(seed=2)
    expected = F.kl_div(z.log_softmax(-1), b.log_softmax(-1), reduction="sum", log_target=True)
    torch.testing.assert_close(full_kl(z, b, y), expected)
    torch.testing.assert_close(full_kl(z, b, (y + 1) % 6), expected)  # the target plays no part
    swapped = F.kl_div(b.log_softmax(-1), z.log_softmax(-1), reduction="sum", log_target=True)
    torch.testing.assert_close(full_kl(z, b, y, direction="reverse"), swapped)


def test_js_is_symmetric_and_bounded_by_log_2():
    z, b, y = logits_and_targets(seed=3, size=20.0)
    there = full_kl(z, b, y, direction="js", reduction="none")
    torch.testing.assert_close(there, full_kl(b, z.detach(), y, direction="js", reduction="none"))
    assert (there <= math.log(2) + 1e-12).all()


def test_gamma_weighs_by_what_the_base_leaves_to_the_others():
    z, b, y = logits_and_targets(seed=4)
    miss = 1 - b.softmax(-1).gather(1, y[:, None]).squeeze(1)
    plain = target_masked_kl(z, b, y, reduction="none")
    torch.testing.assert_close(target_masked_kl(z, b, y, gamma=0.5, reduction="none"), miss.sqrt() * plain)
    assert not target_masked_kl(z, b.requires_grad_(), y, gamma=1.0).isnan()
    assert torch.autograd.grad(target_masked_kl(z, b, y, gamma=1.0), b, allow_unused=True) == (None,)


def test_exclusion_drops_positions_the_base_is_sure_of_and_the_two_means_differ():
    b = torch.tensor([[12.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])  # p_base(y): 0.99999, 0.58, 0.33
    z, y = b + torch.tensor([0.0, 1.0, 0.0]), torch.zeros(3, dtype=torch.long)
    values = target_masked_kl(z, b, y, reduction="none")
    cut = target_masked_kl(z, b, y, exclusion=1e-4, reduction="none")
    assert cut.tolist() == [0.0, *values[1:].tolist()]
    total = values[1:].sum()
    torch.testing.assert_close(target_masked_kl(z, b, y, exclusion=1e-4), total)
    torch.testing.assert_close(target_masked_kl(z, b, y, exclusion=1e-4, reduction="mean"), total / 3)
    torch.testing.assert_close(target_masked_kl(z, b, y, exclusion=1e-4, reduction="mean_kept"), total / 2)


def test_ignored_positions_count_for_nothing_and_keep_their_place():
    z, b, y = logits_and_targets(seed=5, tokens=6)
    mixed = y.clone()
    mixed[[1, 4]] = -100
    rest = [0, 2, 3, 5]
    (gradient,) = torch.autograd.grad(target_masked_kl(z, b, mixed, reduction="mean"), z)
    assert (gradient[[1, 4]] == 0).all()
    values = target_masked_kl(z.view(2, 3, -1), b.view(2, 3, -1), mixed.view(2, 3), reduction="none")
    assert values.shape == (2, 3)
    assert (values.flatten()[[1, 4]] == 0).all()
    torch.testing.assert_close(values.flatten()[rest], target_masked_kl(z[rest], b[rest], y[rest], reduction="none"))


@pytest.mark.parametrize("member", MEMBERS[:3] + MEMBERS[-3:], ids=str)
@pytest.mark.parametrize("reduction", ["sum", "mean", "mean_kept"])
def test_no_supervised_position_gives_a_connected_zero(member, reduction):
    z, b, y = logits_and_targets(tokens=3)
    value = logit_divergence(z, b, torch.full_like(y, -100), member, reduction=reduction)
    value.backward()
    assert value == 0
    assert (z.grad == 0).all()


@pytest.mark.parametrize("gap", [20.0, 40.0, 80.0, -math.log(1e-7)])
def test_confident_targets_in_float32(gap):
    """The masked form never sees the target, so its float32 error does not grow with the gap."""
    z, b, y = logits_and_targets(seed=6, tokens=8, vocab=200)
    for x in (z.data, b):
        x.scatter_(1, y[:, None], x.logsumexp(1, keepdim=True) + gap)
    z32, b32 = z.detach().float().requires_grad_(), b.float()
    exact = z32.detach().double().requires_grad_()
    for gamma in (0.0, 1.0):
        value, expected = (
            target_masked_kl(z32, b32, y, gamma=gamma),
            target_masked_kl(exact, b32.double(), y, gamma=gamma),
        )
        assert expected > 0
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=0)
        found, wanted = torch.autograd.grad(value, z32)[0].double(), torch.autograd.grad(expected, exact)[0]
        assert (found - wanted).norm() <= 1e-5 * wanted.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_result_is_at_least_float32(dtype):
    z, b, y = logits_and_targets()
    value = target_masked_kl(z.detach().to(dtype), b.to(dtype), y)
    assert value.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)


def test_faults_are_named_with_what_to_do():
    z, b, y = logits_and_targets()
    with pytest.raises(ValueError, match=r"mask must .*'y'.*direction must .*'kl'.*gamma .* -1.*exclusion .* 2"):
        Divergence("y", -1.0, "kl", 2.0)
    with pytest.raises(ValueError, match=r"score the same tokens.*\[4, 6\].*\[4, 5\]"):
        target_masked_kl(z, b[:, :5], y)
    with pytest.raises(ValueError, match=r"targets \[3\].*shape \[4\], already shifted"):
        target_masked_kl(z, b, y[:3])
    with pytest.raises(ValueError, match=r"below 6, but they run from -1 to"):
        target_masked_kl(z, b, torch.tensor([0, -1, 2, 3]))
    with pytest.raises(ValueError, match="at least two tokens"):
        target_masked_kl(z[:, :1], b[:, :1], torch.zeros(4, dtype=torch.long))
    with pytest.raises(ValueError, match="Unknown reduction 'batch'"):
        target_masked_kl(z, b, y, reduction="batch")
