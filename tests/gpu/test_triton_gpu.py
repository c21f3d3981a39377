"""The kernels on a real GPU: against float64, without a word to the host, in the time and memory they promise."""

import statistics

import pytest
import torch
from holdfast.functional.chunked import Objective
from holdfast.functional.divergence import Divergence, logit_divergence
from holdfast.functional.head import Head
from holdfast.functional.linear_divergence import linear_cross_entropy_with_divergence, linear_divergence
from holdfast.functional.triton.dispatch import choose

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0),
        reason="the kernels need compute capability 8.0 (Ampere) or more",
    ),
]


@pytest.fixture(params=["rows", "tiles"])
def kernel(request, monkeypatch):
    """Ask for each kernel in turn; no warning, so it is had."""
    pytest.importorskip("triton", reason="Triton is not installed (Linux: pip install 'holdfast[triton]')")
    monkeypatch.setenv("HOLDFAST_KERNEL", request.param)
    hidden, _, head, _ = make(8, 64, 300)
    assert choose(hidden, head, Objective(Divergence())).kernel == request.param
    return request.param


def make(rows, width, vocab, dtype=torch.bfloat16, drift=0.0145, **head):
    """Logits of standard deviation 3.2, a student whose KL is near 1e-3, every seventh row ignored."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, device="cuda")

    base = normal(rows, width)
    hidden = (base + drift * normal(rows, width)).to(dtype).requires_grad_()
    weight = (3.2 / width**0.5 * normal(vocab, width)).to(dtype)
    bias = normal(vocab).to(dtype) if head.pop("bias", False) else None
    targets = torch.randint(vocab, (rows,), generator=generator, device="cuda")
    targets[::7] = -100
    return hidden, base.to(dtype), Head(weight, bias, **head), targets


def truth(case, member, strength, cross_entropy):
    """The same numbers in float64 on whole logits."""
    hidden, base, head, targets = case
    bias = None if head.bias is None else head.bias.double()
    wide = Head(head.weight.double(), bias, head.scale, head.soft_cap)
    exact = hidden.detach().double().requires_grad_()
    z = wide.logits(exact)
    value = strength * logit_divergence(z, wide.logits(base.double()), targets, member)
    if cross_entropy:
        value = value + torch.nn.functional.cross_entropy(z, targets, reduction="sum")
    return value.item(), torch.autograd.grad(value, exact)[0]


HEADS = [{}, {"bias": True, "scale": 0.5, "soft_cap": 30.0}]
SHAPES = [(1, 64, 300), (37, 120, 50_257), (300, 896, 32_000), (1500, 256, 5003)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("options", HEADS, ids=str)
@pytest.mark.parametrize("mask", ["target", "none"])
def test_the_gradient_of_a_small_kl_in_bfloat16(kernel, shape, options, mask):
    case, member = make(*shape, **options), Divergence(mask)
    if shape[0] == 1:
        case[3][0] = 5
    value = linear_divergence(*case, member)
    expected, wanted = truth(case, member, 1.0, 0.0)
    assert value.item() == pytest.approx(expected, rel=0.02)
    (found,) = torch.autograd.grad(value, case[0])
    bar = 0.03 if kernel == "rows" else 0.01
    assert ((found.double() - wanted).norm() / wanted.norm()).item() <= bar


@pytest.mark.parametrize("options", HEADS, ids=str)
def test_both_in_one_pass_in_float32(kernel, options, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    case, member = make(130, 200, 10_001, torch.float32, drift=0.3, **options), Divergence("none", gamma=0.5)
    found = linear_cross_entropy_with_divergence(*case, member, 0.7, chunk_rows=64, statistics=True)
    expected, wanted = truth(case, member, 0.7, 1.0)
    assert found.loss.item() == pytest.approx(expected, rel=1e-4)
    (gradient,) = torch.autograd.grad(found.loss, case[0])
    assert ((gradient.double() - wanted).norm() / wanted.norm()).item() <= 1e-4
    p = case[2].logits(case[0]).double().softmax(1)
    counts = case[3] != -100
    torch.testing.assert_close(
        found.statistics.entropy.double(), torch.special.entr(p).sum(1) * counts, rtol=1e-3, atol=1e-3
    )
    assert torch.equal(found.statistics.top1, (p.argmax(1) == case[3]) & counts)


def test_nothing_returns_to_the_host(kernel):
    case = make(300, 256, 5003)
    linear_divergence(*case, Divergence(), reduction="mean").backward()  # compiled and compared by now
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for reduction in ("mean", "mean_kept"):
            linear_divergence(*case, Divergence(), reduction=reduction).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_more_logits_than_an_int32_counts(kernel):
    """Row 16,900 of 131,072 tokens starts beyond 2^31: its loss must be that of a row alone."""
    rows, vocab = 16_900, 131_072
    if torch.cuda.get_device_properties(0).total_memory < 24 * 2**30:
        pytest.skip("needs 24 GiB of GPU memory")
    hidden, base, head, targets = make(rows, 64, vocab, drift=0.3)
    targets[-1] = 7
    alone = linear_divergence(hidden[-1:], base[-1:], head, targets[-1:], Divergence())
    (wanted,) = torch.autograd.grad(alone, hidden)
    targets[:-1] = -100
    whole = linear_divergence(hidden, base, head, targets, Divergence(), chunk_rows=rows)
    (found,) = torch.autograd.grad(whole, hidden)
    torch.testing.assert_close(whole, alone, rtol=2e-3, atol=0)
    torch.testing.assert_close(found[-1], wanted[-1], rtol=0.02, atol=1e-3)
    assert not found[:-1].any()


def passes(case):
    """One forward and backward pass."""
    found = linear_cross_entropy_with_divergence(*case, Divergence())
    found.loss.backward()


def test_memory_is_a_chunk_and_not_all_logits(kernel):
    rows, width, vocab = 4096, 512, 65_536
    case = make(rows, width, vocab)
    passes(case)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    passes(case)
    peak = torch.cuda.max_memory_allocated() - before
    chunk, states = 1024 * vocab * 2, 8 * rows * width * 4
    assert peak <= (2 if kernel == "rows" else 1) * chunk + states  # whole logits of one side alone: 4 chunks


def test_rows_are_no_slower_than_the_plain_path(kernel, monkeypatch):
    """The kernel does in two visits what torch does in a dozen: medians of nine turns, each with CUDA events."""
    if kernel == "tiles":
        pytest.skip("tiles take five products where the plain path takes three: their gain is precision and memory")
    case, times = make(2048, 1024, 65_536), {"rows": [], "plain": []}
    for turn in range(11):
        for name, seconds in times.items():
            monkeypatch.setenv("HOLDFAST_KERNEL", name)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            passes(case)
            end.record()
            torch.cuda.synchronize()
            if turn >= 2:  # the first compile
                seconds.append(start.elapsed_time(end))
    assert statistics.median(times["rows"]) <= statistics.median(times["plain"]), times
