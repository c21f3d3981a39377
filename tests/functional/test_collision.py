"""Overlaps of two parts of an update, against their formulas on the dense parts in float64."""

import pytest
import torch
from holdfast.functional.collision import geodesic_overlap, riemannian_overlap
from holdfast.functional.fisher import Factor, Kronecker, remainder
from holdfast.functional.lowrank import Dense, LowRank

OUT, INTO, RANK = 12, 10, 3
SETTINGS = {
    "as published": {},
    "sum": {"reduction": "sum"},
    "signed": {"signed": True},
    "sharp": {"threshold": 0.5, "temperature": 0.05, "weight": 9.0},
    "own scale": {"threshold": None, "quantile": 0.7, "temperature": None},
    "own threshold": {"threshold": None, "temperature": 0.1},
}


def draw(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def whole(update):
    return update.rows(0, update.shape[0])


def factors():
    return draw(RANK, INTO, seed=0).requires_grad_(), draw(OUT, RANK, seed=1).requires_grad_()


def fisher(seed):
    def side(size):
        values, vectors = torch.linalg.eigh(draw(size, 2 * size, seed=seed).mm(draw(size, 2 * size, seed=seed).T))
        return Factor(vectors.flip(1)[:, :5], values.flip(0)[:5], values[:-5].mean())

    return Kronecker(side(OUT), side(INTO))


def split(a, b, as_whole=False):
    update = LowRank.of(a, b, 0.1)
    update = Dense(whole(update)) if as_whole else update
    part = fisher(3).part(update, 0.9, 4)
    return part.update, remainder(update, part)[0]


def dense_overlap(
    part, rest, weight=4.0, threshold=0.01, quantile=0.5, temperature=1.0, reduction="mean", signed=False
):
    a, t = whole(part), whole(rest)
    size = (a + t).detach()
    if threshold is None:
        ordered = size.abs().flatten().sort().values
        threshold = ordered[int(quantile * len(ordered))]
    if temperature is None:
        temperature = size.std(correction=0)
    eta = 1 + weight * torch.sigmoid((size.abs() - threshold) / temperature)
    product = eta * a * t if signed else eta * (a * t).abs()
    return product.mean() if reduction == "mean" else product.sum()


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("as_whole", [False, True], ids=["low rank", "dense"])
@pytest.mark.parametrize("tile", [1, 5, 256])
def test_riemannian_value_and_slopes_are_those_of_the_dense_form(settings, as_whole, tile):
    a, b = factors()
    part, rest = split(a, b, as_whole)
    ours, plain = riemannian_overlap(part, rest, tile=tile, **settings), dense_overlap(part, rest, **settings)
    torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-14)
    slopes = torch.autograd.grad(ours, (a, b), retain_graph=True)
    for slope, exact in zip(slopes, torch.autograd.grad(plain, (a, b)), strict=True):
        assert exact.abs().max() > 0
        torch.testing.assert_close(slope, exact, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("as_whole", [False, True])
def test_riemannian_slopes_against_differences(as_whole):
    """With weight 0, η is 1: else differences would see it move, which it does without a gradient."""
    assert torch.autograd.gradcheck(
        lambda a, b: riemannian_overlap(*split(a, b, as_whole), weight=0.0, reduction="sum", tile=5), factors()
    )


def test_geodesic_is_a_squared_cosine():
    a, b = factors()
    update, other = LowRank.of(a, b, 0.1), LowRank.of(draw(2, INTO, seed=5), draw(OUT, 2, seed=6), 1.0)
    cosine = torch.nn.functional.cosine_similarity(whole(update).flatten(), whole(other).flatten(), dim=0)
    for x in (update, Dense(whole(update))):
        for y in (other, Dense(whole(other))):
            torch.testing.assert_close(geodesic_overlap(x, y), cosine.square(), rtol=1e-10, atol=1e-12)
    assert torch.autograd.gradcheck(lambda a, b: geodesic_overlap(LowRank.of(a, b, 0.1), other), (a, b))


def test_geodesic_of_an_orthogonal_split_is_zero_and_of_two_fishers_is_not():
    a, b = factors()
    part, rest = split(a, b)
    assert geodesic_overlap(part, rest) < 1e-24
    update = LowRank.of(a, b, 0.1)
    other = fisher(4).part(update, 0.9, 4).update
    overlap = geodesic_overlap(part, other)
    cosine = torch.nn.functional.cosine_similarity(whole(part).flatten(), whole(other).flatten(), dim=0)
    torch.testing.assert_close(overlap, cosine.square(), rtol=1e-8, atol=1e-12)
    assert overlap > 1e-6
    assert torch.autograd.grad(overlap, b)[0].abs().max() > 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_nothing_collides_where_lora_starts(settings, dtype):
    a, b = draw(RANK, INTO, seed=0).to(dtype).requires_grad_(), torch.zeros(OUT, RANK, dtype=dtype, requires_grad=True)
    part, rest = split(a, b)
    other = LowRank.of(draw(2, INTO, seed=5).to(dtype), draw(OUT, 2, seed=6).to(dtype), 1.0)
    for overlap in (
        riemannian_overlap(part, rest, **settings),
        geodesic_overlap(part, rest),
        geodesic_overlap(part, other),
    ):
        assert overlap == 0
        for slope in torch.autograd.grad(overlap, (a, b), retain_graph=True):
            assert torch.equal(slope, torch.zeros_like(slope))


def test_the_split_between_the_factors_does_not_matter():
    a, b = factors()
    turn = torch.eye(RANK, dtype=torch.float64) + 0.3 * draw(RANK, RANK, seed=9)
    here, there = split(a, b), split(torch.linalg.inv(turn) @ a, b @ turn)
    own = SETTINGS["own scale"]
    torch.testing.assert_close(riemannian_overlap(*here, **own), riemannian_overlap(*there, **own), rtol=1e-9, atol=0)


def test_only_factors_are_saved_for_the_backward_pass():
    out, into, tile = 600, 700, 32
    part = LowRank(torch.randn(out, 4, requires_grad=True), torch.randn(4, into))
    rest = LowRank(torch.randn(out, 6, requires_grad=True), torch.randn(6, into, requires_grad=True))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        overlap = riemannian_overlap(part, rest, tile=tile)
    overlap.backward()
    assert rest.right.grad is not None
    assert 0 < max(saved) <= 6 * max(out, into)


def test_what_a_tile_takes_is_all_the_memory_there_is():
    """No operation of the forward pass gives more numbers than a tile has, or a factor."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Sizes(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                Sizes.largest = max(Sizes.largest, result.numel())
            return result

    part = LowRank(torch.randn(600, 4, requires_grad=True), torch.randn(4, 700))
    rest = LowRank(torch.randn(600, 6, requires_grad=True), torch.randn(6, 700, requires_grad=True))
    with Sizes():
        riemannian_overlap(part, rest, tile=32)
    assert Sizes.largest == 32 * 700


def test_a_second_derivative_is_refused_rather_than_zero():
    a, b = factors()
    overlap = riemannian_overlap(*split(a, b))
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(overlap, a, create_graph=True)


def test_a_wrong_reduction_is_named():
    a, b = factors()
    with pytest.raises(ValueError, match="'mean' or 'sum', got 'max'"):
        riemannian_overlap(*split(a, b), reduction="max")
