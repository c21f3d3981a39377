"""Cross-entropy and cached KL in two products equal the two by plain autograd in float64, and so do the statistics."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from holdfast.functional import softmax_blocks
from holdfast.functional.cached_cross_entropy import cross_entropy_with_cached_kl
from holdfast.functional.cached_divergence import cached_kl, reference_statistics
from holdfast.functional.divergence import Divergence, logit_divergence
from holdfast.functional.head import Head


def case(*, bias=False, scale=1.0, rows=11, seed=0, spread=2.0, dtype=torch.float64):
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    head = Head((normal(23, 6) * spread).to(dtype), normal(23).to(dtype) if bias else None, scale=scale)
    base, change = normal(rows, 6), normal(rows, 6)
    y = torch.randint(0, 23, (rows,), generator=draw)
    y[: rows // 2] = head.logits((base + 0.2 * change).to(dtype))[: rows // 2].argmax(-1)  # some are the likeliest
    return (base + 0.2 * change).to(dtype).requires_grad_(), base.to(dtype), head, y


def slow(hidden, base, head, y, strength, mask, weight):
    """Everything from whole logits."""
    logits = head.logits(hidden)
    nll = F.cross_entropy(logits, y, reduction="none")
    kl = logit_divergence(logits, head.logits(base), y, Divergence(mask), reduction="none")
    kl = kl if weight is None else weight * kl
    log_p = logits.log_softmax(-1)
    return nll.sum() + strength * kl.sum(), nll, kl, -(log_p.exp() * log_p).sum(-1), logits.argmax(-1) == y


@pytest.mark.parametrize("mask", ["target", "none"])
@pytest.mark.parametrize("extra", [{}, {"bias": True, "scale": 0.5}, {"scale": 2.0}], ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_equals_plain_autograd_in_float64(mask, extra, weighted):
    hidden, base, head, y = case(**extra)
    weight = torch.linspace(0, 1, len(y), dtype=torch.float64) if weighted else None
    loss, nll, kl, entropy, top1 = slow(hidden, base, head, y, 0.7, mask, weight)
    (gradient,) = torch.autograd.grad(3 * loss, hidden)
    kept = reference_statistics(base, head, y, mask=mask)
    found = cross_entropy_with_cached_kl(hidden, head, *kept, y, 0.7, weight=weight, mask=mask, chunk_rows=4)
    (ours,) = torch.autograd.grad(3 * found.loss, hidden)
    for value, expected in (
        (found.loss, loss), (found.cross_entropy, nll.sum()), (found.divergence, kl.sum()),
        (found.statistics.cross_entropy, nll), (found.statistics.entropy, entropy), (ours, gradient),
    ):  # fmt: skip
        torch.testing.assert_close(value, expected, rtol=1e-11, atol=1e-11)
    assert torch.equal(found.statistics.top1, top1)
    assert 0 < top1.sum() < len(y)


@pytest.mark.parametrize("mask", ["target", "none"])
def test_a_confident_target_keeps_its_gradient_in_float32(mask):
    """At a gap of 20 and more, 1 − p_y is below float32's rounding of 1; the cross-entropy is not."""
    hidden, base, head, y = case(spread=12.0, dtype=torch.float32)
    wide = [part.detach().double() for part in (hidden, base)]
    exact = Head(head.weight.double())
    own = wide[0].clone().requires_grad_()
    loss, nll, _, entropy, _ = slow(own, wide[1], exact, y, 0.5, mask, None)
    assert nll.min() < 1e-7
    (gradient,) = torch.autograd.grad(loss, own)
    kept = reference_statistics(base, head, y, mask=mask)
    found = cross_entropy_with_cached_kl(hidden, head, *kept, y, 0.5, mask=mask)
    (ours,) = torch.autograd.grad(found.loss, hidden)
    assert (ours - gradient).norm() < 1e-4 * gradient.norm()
    torch.testing.assert_close(found.statistics.cross_entropy.double(), nll, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.statistics.entropy.double(), entropy, rtol=1e-4, atol=2e-5)
    assert (found.statistics.entropy >= -1e-5).all()


def test_weights_of_the_kl_alone():
    hidden, base, head, y = case()
    kept, weight = reference_statistics(base, head, y, mask="target"), torch.linspace(0, 2, len(y), dtype=torch.float64)
    each = logit_divergence(head.logits(hidden), head.logits(base), y, Divergence(), reduction="none")
    expected = (weight * each).sum()
    value = cached_kl(hidden, head, *kept, y, weight=weight, mask="target", chunk_rows=3)
    torch.testing.assert_close(value, expected, rtol=1e-11, atol=1e-12)
    (ours,) = torch.autograd.grad(value, hidden)
    torch.testing.assert_close(ours, torch.autograd.grad(expected, hidden)[0], rtol=1e-10, atol=1e-12)
    with pytest.raises(ValueError, match=r"weight has shape \[3\]"):
        cached_kl(hidden, head, *kept, y, weight=weight[:3], mask="target")


@pytest.mark.parametrize("mask", ["target", "none"])
def test_it_takes_the_products_of_a_cross_entropy(mask, monkeypatch):
    """One to the logits and one back, for each chunk."""
    hidden, base, head, y = case(bias=True)
    kept, taken = reference_statistics(base, head, y, mask=mask), []
    for name in ("to_logits", "to_hidden"):
        plain = getattr(softmax_blocks, name)
        counted = partial(lambda plain, name, *given, **more: taken.append(name) or plain(*given, **more), plain, name)
        monkeypatch.setattr(softmax_blocks, name, counted)
    cross_entropy_with_cached_kl(hidden, head, *kept, y, mask=mask, chunk_rows=6).loss.backward()
    assert taken == ["to_logits", "to_hidden"] * 2  # eleven rows are two chunks


def test_nothing_and_what_is_refused():
    hidden, base, head, y = case()
    kept = reference_statistics(base, head, y, mask="target")
    none = slice(0, 0)
    empty = cross_entropy_with_cached_kl(hidden[none], head, kept[0][none], kept[1][none], y[none])
    assert empty.loss == 0
    assert torch.autograd.grad(empty.loss, hidden)[0].abs().sum() == 0
    with torch.no_grad():
        assert not cross_entropy_with_cached_kl(hidden, head, *kept, y).loss.requires_grad
    with pytest.raises(ValueError, match="Every row needs its statistics"):
        cross_entropy_with_cached_kl(hidden, head, kept[0][:3], kept[1][:3], y)
    with pytest.raises(ValueError, match="soft cap"):
        cross_entropy_with_cached_kl(hidden, Head(head.weight, soft_cap=3.0), *kept, y)
    with pytest.raises(ValueError, match="The head is trained"):
        cross_entropy_with_cached_kl(hidden, Head(head.weight.clone().requires_grad_()), *kept, y)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(cross_entropy_with_cached_kl(hidden, head, *kept, y).loss, hidden, create_graph=True)
