"""Both kernels against float64 on whole logits and against their plain twins: values, gradients, what hosts log."""

import functools

import pytest
import torch
from holdfast.functional.chunked import Objective, chunked_sums
from holdfast.functional.divergence import Divergence
from holdfast.functional.head import Head
from holdfast.functional.linear_divergence import (
    linear_cross_entropy,
    linear_cross_entropy_with_divergence,
    linear_divergence,
)
from holdfast.functional.triton import tiles
from holdfast.functional.triton.rows import Work, operands
from holdfast.functional.triton.tiles import TileShape, plain_statistics, statistics
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from functional.in_triton.cases import QUIET, gradient, make, relative_error, truth, wide

pytestmark = QUIET

MEMBERS = [
    (Divergence(), {}),
    (Divergence(gamma=0.5, exclusion=0.9), {"bias": True, "scale": 0.5}),
    (Divergence("none"), {"bias": True}),
    (Divergence("none", gamma=1.0), {"scale": -1.5, "soft_cap": 4.0}),
]


@pytest.mark.parametrize(("member", "options"), MEMBERS, ids=str)
def test_a_divergence_equals_its_float64_truth(kernel, member, options):
    case = make(**options)
    value = linear_divergence(*case, member, chunk_rows=3)
    expected, wanted = truth(case, member)
    assert value.dtype is torch.float32
    assert value.item() == pytest.approx(expected, rel=2e-6)
    assert relative_error(gradient(value, case), wanted) <= 2e-6


@pytest.mark.parametrize("reduction", ["mean", "mean_kept"])
def test_counts_are_taken_on_the_device(kernel, reduction):
    case, member = make(tokens=4), Divergence(exclusion=0.998)
    (hidden, base, head, targets), plain = case, {"reference_head": None, "ignore_index": -100, "chunk_rows": None}
    sums = chunked_sums(hidden, base, head, targets, Objective(member), **plain)
    assert 0 < sums.kept < sums.supervised == 3
    value = linear_divergence(*case, member, reduction=reduction)
    assert value.item() == pytest.approx(sums.total.item() / (3 if reduction == "mean" else sums.kept.item()), rel=1e-6)


def test_cross_entropy(kernel):
    case = make(bias=True)
    value = linear_cross_entropy(case[0], case[2], case[3], chunk_rows=4)
    expected, wanted = truth(case, None, cross_entropy=1.0)
    assert value.item() == pytest.approx(expected, rel=2e-6)
    assert relative_error(gradient(value, case), wanted) <= 2e-6


@pytest.mark.parametrize("mask", ["target", "none"])
def test_one_pass_and_what_hosts_log(kernel, mask):
    case, member = make(tokens=6), Divergence(mask)
    with torch.no_grad():  # the target of row 0 is the likeliest token, and has a twin that comes later; row 1: earlier
        case[2].weight[[10, 70]] = 3 * case[0][0]
        case[2].weight[[11, 71]] = 3 * case[0][1]
    case[3][:2] = torch.tensor([10, 71])
    shaped = case[0].view(2, 3, -1), case[1].view(2, 3, -1), case[2], case[3].view(2, 3)
    found = linear_cross_entropy_with_divergence(*shaped, member, 0.7, chunk_rows=4, statistics=True)
    expected, wanted = truth(case, member, strength=0.7, cross_entropy=1.0)
    assert found.loss.item() == pytest.approx(expected, rel=2e-6)
    assert relative_error(gradient(found.loss, case), wanted) <= 2e-6
    twin = chunked_sums(
        *wide(case),
        Objective(member, 0.7, 1.0),
        reference_head=None,
        ignore_index=-100,
        chunk_rows=None,
        statistics=True,
    )
    assert found.divergence.item() == pytest.approx(twin.divergence.item(), rel=2e-6)
    assert found.cross_entropy.item() == pytest.approx(twin.cross_entropy.item(), rel=2e-6)
    assert not found.divergence.requires_grad
    for mine, theirs in zip(found.statistics, twin.statistics, strict=True):
        assert mine.shape == (2, 3)
        torch.testing.assert_close(mine.flatten().double(), theirs.double(), rtol=2e-6, atol=1e-6)
    assert found.statistics.top1.flatten()[:3].tolist() == [True, False, False]


def test_a_row_of_many_tiles_in_rows_of_ragged_length(kernel):
    case = make(tokens=2, vocab=5003 if kernel == "rows" else 200, width=40, drift=0.1)
    value = linear_divergence(*case, Divergence())
    expected, wanted = truth(case, Divergence())
    assert value.item() == pytest.approx(expected, rel=1e-5)
    assert relative_error(gradient(value, case), wanted) <= 1e-5


@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(2, 90), st.integers(1, 40), st.integers(1, 5))
def test_any_shape(kernel, seed, tokens, vocab, width, chunk_rows):
    case = make(seed, tokens, width, vocab, ignored=1)
    value = linear_divergence(*case, Divergence("none"), chunk_rows=chunk_rows)
    expected, wanted = truth(case, Divergence("none"))
    assert value >= 0
    torch.testing.assert_close(value.double(), torch.tensor(expected).double(), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(gradient(value, case).double(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("extras", [{}, {"bias": True, "scale": 0.9, "soft_cap": 20.0}], ids=str)
def test_the_gradient_of_a_small_kl_survives_bfloat16(kernel, extras, monkeypatch):
    monkeypatch.setattr(tiles, "shape_for", lambda device, dtype: TileShape(16, 1024, 64))  # fewer steps in numpy
    case = make(tokens=3, width=64, vocab=4000, drift=0.0145, ignored=9)
    hidden, base, head, targets = case
    case = hidden.detach().bfloat16().requires_grad_(), base.bfloat16(), narrow(head, extras), targets
    expected, wanted = truth(case, Divergence())
    assert 0.5e-3 < expected / 3 < 1.3e-3
    value = linear_divergence(*case, Divergence())
    assert value.item() == pytest.approx(expected, rel=0.01)
    found = gradient(value, case)
    assert found.dtype is torch.bfloat16
    assert relative_error(found, wanted) <= (0.03 if kernel == "rows" else 0.006)


def narrow(head, extras):
    """The head in bfloat16, logits of standard deviation 3.2."""
    options = dict(extras)
    bias = torch.linspace(-1, 1, 4000).bfloat16() if options.pop("bias", False) else None
    return Head((0.4 * head.weight).bfloat16(), bias, **options)


def test_forward_statistics_of_tiles_equal_the_plain_ones():
    """L, L0, t and z_y, in three parts of the vocabulary, at ragged edges."""
    case = make(tokens=19, width=24, vocab=75)
    hidden, base, head, targets = case
    y = targets.clamp(min=0)[:, None]
    work = Work(head, targets, Objective(Divergence(), 1.0, 1.0), -100, 64, False, False)
    found = statistics(operands(hidden.detach(), base, head), work, TileShape(16, 32, 16))
    exact = wide(case)
    lse0, lse, t, z_y = plain_statistics(exact[2].logits(exact[1]), exact[2].logits(exact[0]).detach(), y)
    counts = (targets != -100).double()
    assert counts.sum() == 18
    for mine, theirs in (
        (found.numbers[0], lse0),
        (found.numbers[0].double() + found.numbers[1], lse),
        (found.values.divergence, t - lse0 + lse),
        (found.values.nll, torch.nn.functional.softplus(lse - z_y)),
    ):
        torch.testing.assert_close(mine.double(), theirs * counts, rtol=1e-6, atol=2e-6)


@functools.cache
def whole():
    case = make(tokens=6)
    value = linear_divergence(*case, Divergence())
    return value.detach(), gradient(value, case)


def test_padding_and_order_change_nothing(kernel):
    hidden, base, head, targets = make(tokens=6)
    value, wanted = whole()
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    filler = torch.full((2, 7), torch.nan)
    h = torch.cat([filler, hidden[order]])
    padded = linear_divergence(
        h,
        torch.cat([-filler, base[order]]),
        head,
        torch.cat([torch.tensor([-100, -100]), targets[order]]),
        Divergence(),
    )
    torch.testing.assert_close(padded, value, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.autograd.grad(padded, hidden)[0], wanted, rtol=1e-4, atol=1e-6)
