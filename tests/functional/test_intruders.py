"""Intruder dimensions, against eigenvectors of W Wᵀ found one by one."""

import numpy as np
import pytest
import torch
from holdfast.functional.intruders import intruders
from holdfast.functional.lowrank import Dense, LowRank
from hypothesis import assume, given, settings
from hypothesis import strategies as st

shapes = st.tuples(st.integers(0, 10_000), st.integers(2, 12), st.integers(2, 12), st.integers(1, 3))


def left_vectors(weight):
    """Directions of the output that the weight uses, the strongest first, with their strengths."""
    values, vectors = np.linalg.eigh(weight @ weight.T)
    strengths = np.sqrt(np.maximum(values, 0))
    return [(vectors[:, i], strengths[i]) for i in np.argsort(-values) if strengths[i] > 1e-6 * strengths.max()]


def slowly(base, change, threshold, top):
    """The part in intruder dimensions written out, how many there are, and how near the closest call was."""
    base, tuned = np.asarray(base, np.float64), np.asarray(base, np.float64) + np.asarray(change, np.float64)
    part, count, near = np.zeros_like(tuned), 0, np.inf
    for u, _ in left_vectors(tuned)[:top]:
        likeness = max(abs(u @ known) for known, _ in left_vectors(base))
        near = min(near, abs(likeness - threshold))
        if likeness < threshold:
            part += np.outer(u, u @ tuned)
            count += 1
    return part, count, near


@given(shapes, st.sampled_from([0.3, 0.5, 0.8]), st.integers(1, 12))
@settings(max_examples=60, deadline=None)
def test_the_part_is_that_of_the_definition(shape, threshold, top):
    seed, out, into, r = shape
    random = np.random.default_rng(seed)
    base, b, a = random.normal(size=(out, into)), random.normal(size=(out, r)), random.normal(size=(r, into))
    update = LowRank(torch.tensor(2 * b), torch.tensor(a))
    part, count, near = slowly(base, 2 * b @ a, threshold, top)
    assume(near > 1e-6)
    for one in (update, Dense(torch.tensor(2 * b @ a))):
        found = intruders(torch.tensor(base), one, threshold=threshold, top=top)
        assert found.left.shape[1] == count
        np.testing.assert_allclose((found.left @ found.right).numpy(), part, atol=1e-7)


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)])
def test_no_update_has_no_intruder_even_where_the_base_has_no_full_rank(shape):
    base = torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    base[:, -1] = base[:, 0]
    none = LowRank(torch.zeros(shape[0], 1, dtype=torch.float64), torch.zeros(1, shape[1], dtype=torch.float64))
    assert intruders(base, none, threshold=0.99, top=10).left.shape[1] == 0


def test_directions_without_strength_are_no_intruders():
    """The update leaves a weight of rank 1, in whole numbers and so exactly: its other vectors are arbitrary."""
    random = np.random.default_rng(0)
    kept = 100 * np.outer(random.integers(1, 5, 6), random.integers(1, 5, 6))
    taken = random.integers(-5, 6, (6, 6))
    assert slowly(kept + taken, -taken, 0.9, 6)[1] == 0
    found = intruders(torch.tensor(kept + taken).double(), Dense(torch.tensor(-taken).double()), threshold=0.9, top=6)
    assert found.left.shape[1] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_runs_in_float32_at_least(dtype):
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(8, 6, generator=generator).to(dtype)
    update = LowRank.of(torch.randn(2, 6, generator=generator).to(dtype), torch.randn(8, 2, generator=generator), 3.0)
    found = intruders(base, update, threshold=0.7)
    assert found.left.dtype == torch.float32
    part, count, _ = slowly(base.double(), (update.left @ update.right).double(), 0.7, 10)
    assert found.left.shape[1] == count > 0
    np.testing.assert_allclose((found.left @ found.right).numpy(), part, atol=1e-4)
