"""Products with low-rank updates, against the update written out."""

import pytest
import torch
from holdfast.functional.lowrank import Dense, LowRank, inner, plus, squared_norm
from hypothesis import given, settings
from hypothesis import strategies as st

shapes = st.tuples(st.integers(0, 10_000), st.integers(1, 12), st.integers(1, 12), st.integers(1, 4))


def draw(seed, out, into, r, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    b, a = torch.randn(out, r, generator=generator), torch.randn(r, into, generator=generator)
    return LowRank.of(a.to(dtype), b.to(dtype), 0.7)


def whole(update):
    return update.rows(0, update.shape[0])


@given(shapes)
@settings(max_examples=40, deadline=None)
def test_every_product_is_that_of_the_dense_update(shape):
    seed, out, into, r = shape
    x, y = draw(seed, out, into, r), draw(seed + 1, out, into, r + 1)
    dense_x, dense_y = whole(x), whole(y)
    p, q = torch.randn(out, 3, dtype=torch.float64), torch.randn(into, 2, dtype=torch.float64)
    for first, second in ((x, y), (x, Dense(dense_y)), (Dense(dense_x), y), (Dense(dense_x), Dense(dense_y))):
        torch.testing.assert_close(inner(first, second), (dense_x * dense_y).sum(), atol=1e-10, rtol=1e-10)
        torch.testing.assert_close(whole(plus(first, second)), dense_x + dense_y, atol=1e-12, rtol=1e-12)
    for update in (x, Dense(dense_x)):
        torch.testing.assert_close(squared_norm(update), dense_x.square().sum(), atol=1e-10, rtol=1e-10)
        torch.testing.assert_close(update.between(p, q), p.T @ dense_x @ q, atol=1e-10, rtol=1e-10)
        torch.testing.assert_close(update.rows(1, 3), dense_x[1:3], atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(whole(update.minus(y)), dense_x - dense_y, atol=1e-12, rtol=1e-12)


@given(shapes)
@settings(max_examples=20, deadline=None)
def test_the_split_between_the_factors_does_not_matter(shape):
    """(B R, R⁻¹ A) is the same update."""
    seed, out, into, r = shape
    update = draw(seed, out, into, r)
    turn = torch.eye(r, dtype=torch.float64) + 0.3 * torch.rand(r, r, dtype=torch.float64)
    other = LowRank(update.left @ turn, torch.linalg.inv(turn) @ update.right)
    torch.testing.assert_close(squared_norm(update), squared_norm(other), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(inner(update, other), squared_norm(update), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_sums_run_in_float32_at_least(dtype):
    update = draw(0, 8, 6, 2, dtype)
    assert update.left.dtype == update.right.dtype == torch.float32
    stored = Dense(whole(update).to(dtype))
    exact = stored.delta.float()
    assert stored.rows(0, 2).dtype == stored.between(torch.eye(8), torch.eye(6)).dtype == torch.float32
    torch.testing.assert_close(whole(stored.minus(update)), exact - whole(update))
    torch.testing.assert_close(squared_norm(stored), exact.square().sum())


@pytest.mark.parametrize("as_whole", [False, True])
def test_slopes_are_right(as_whole):
    def product(a, b):
        update = LowRank.of(a, b, 0.5)
        either = Dense(whole(update)) if as_whole else update
        return inner(either, draw(2, 8, 6, 3)) + squared_norm(either)

    a, b = torch.randn(2, 6, dtype=torch.float64), torch.randn(8, 2, dtype=torch.float64)
    assert torch.autograd.gradcheck(product, (a.requires_grad_(), b.requires_grad_()))
