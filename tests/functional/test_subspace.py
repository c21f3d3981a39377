"""Laws of the protected subspace, against float64 linear algebra written out in full."""

import pytest
import torch
from holdfast.functional import named
from holdfast.functional.subspace import (
    components,
    gram,
    halves,
    held,
    leakage,
    project,
    rank,
    span,
    split_half_cosine,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st

SIZES = {"one block": [60], "three blocks": [10, 35, 15]}


def problem(seed, k, p=60, parallel=0.0):
    """Reference gradients of very different lengths, some nearly parallel, a direction and a metric."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(k, p, generator=generator)
    for i in range(1, k):
        if parallel:
            rows[i] = rows[0] + parallel * rows[i]
    rows *= torch.logspace(-4, 3, k)[:, None] if k > 1 else 1.0
    direction = torch.randn(p, generator=generator)
    metric = torch.rand(p, generator=generator) ** 4 * 10
    return rows, direction, metric


def dense(rows, direction, metric=None):
    """The projection by the textbook, in float64: d - D G' pinv(G D G') G d."""
    g, d = rows.double(), direction.double()
    g = g / g.norm(dim=1, keepdim=True).clamp(min=1e-300)
    weights = torch.ones_like(d) if metric is None else metric.double()
    half = g * weights.sqrt()
    return d - weights.sqrt() * (torch.linalg.pinv(half, rtol=1e-9) @ (g @ d))


def worst_cosine(rows, direction):
    g, d = rows.double(), direction.double()
    lengths = g.norm(dim=1) * d.norm()
    return float(((g @ d).abs() / lengths.clamp(min=1e-300)).max())


seeds = st.integers(0, 10_000)
ranks = st.integers(1, 8)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@given(seed=seeds, k=ranks)
@settings(max_examples=40, deadline=None)
def test_a_projection_is_one(sizes, seed, k):
    """P^2 = P, |P d| <= |d|, G P d = 0, and P d is P d of any other basis of the same span."""
    rows, direction, _ = problem(seed, k)
    space = span(rows, sizes)
    projected = project(space, direction)
    assert torch.allclose(project(space, projected), projected, atol=1e-6)
    assert projected.norm() <= direction.norm() * (1 + 1e-6)
    start = 0
    for size in sizes:
        block = slice(start, start + size)
        assert worst_cosine(rows[:, block], projected[block]) <= 1e-6
        start += size
    mixed = torch.linalg.qr(torch.randn(k, k, generator=torch.Generator().manual_seed(seed)))[0] @ (
        rows / rows.norm(dim=1, keepdim=True)
    )
    assert torch.allclose(project(span(mixed, sizes), direction), projected, atol=2e-5)


@given(seed=seeds, k=ranks)
@settings(max_examples=40, deadline=None)
def test_it_is_the_textbooks(seed, k):
    rows, direction, metric = problem(seed, k)
    space = span(rows, [60])
    assert torch.allclose(project(space, direction).double(), dense(rows, direction), atol=1e-5)
    ours = project(space, direction, metric=metric).double()
    theirs = dense(rows, direction, metric)
    assert (ours - theirs).norm() <= 1e-4 * max(theirs.norm(), direction.norm())


@pytest.mark.parametrize("parallel", [1e-2, 1e-4, 1e-5, 1e-6, 0.0])
@pytest.mark.parametrize("metric", ["euclidean", "optimizer"])
def test_nothing_leaks_from_nearly_parallel_references(parallel, metric):
    """Duplicates, and directions that differ in the last digits of float32, neither leak nor blow up."""
    for seed in range(20):
        rows, direction, weights = problem(seed, 4, parallel=parallel)
        if parallel == 0.0:
            rows = rows[:1].expand(4, -1) * torch.tensor([1.0, 2.0, 4.0, 1e-3])[:, None]
        space = span(rows, [60])
        direction = direction + 30 * rows[0] / rows[0].norm()
        projected = project(space, direction, metric=weights if metric == "optimizer" else None)
        assert worst_cosine(rows, projected) <= 1e-6
        assert int(rank(space)) in {0.0: (1,), 1e-6: (1, 2, 3, 4)}.get(parallel, (4,))  # 1e-6: the last digits
        inner = space.basis.double() @ space.basis.double().T
        assert (inner - torch.diag((inner.diagonal() > 0.5).double())).abs().max() <= 3e-6
        if metric == "euclidean":
            assert projected.norm() <= direction.norm()


@given(seed=seeds, k=ranks)
@settings(max_examples=40, deadline=None)
def test_in_the_optimizers_metric_descent_stays_descent(seed, k):
    """For d = D g:  g · d' >= 0, and zero entries of D do not move."""
    rows, gradient, metric = problem(seed, k)
    metric = metric * (torch.arange(60) % 3 > 0)
    space = span(rows, [60])
    projected = project(space, metric * gradient, metric=metric)
    assert worst_cosine(rows, projected) <= 1e-6
    assert gradient @ projected >= -1e-5 * gradient.norm() * projected.norm()
    assert projected[metric == 0].abs().max() <= 1e-5 * projected.norm()


def test_a_euclidean_projection_of_adams_step_may_ascend():
    """Why the metric exists: the same step, projected the short way, goes up the task's loss."""
    gradient, metric = torch.tensor([1.0, 1.0]), torch.tensor([1.0, 4.0])
    rows = torch.tensor([[0.45, 0.9]])
    step = metric * gradient
    euclidean = project(span(rows, [2]), step)
    assert gradient @ euclidean < 0 <= gradient @ project(span(rows, [2]), step, metric=metric) + 1e-6


@pytest.mark.parametrize("weighted", [False, True])
@given(seed=seeds, k=ranks)
@settings(max_examples=40, deadline=None)
def test_one_sided_solves_the_quadratic_program(weighted, seed, k):
    """KKT: feasible, multipliers >= 0, complementary; and no further from d than the two-sided projection."""
    rows, direction, metric = problem(seed, k)
    metric = metric + 0.01 if weighted else None
    weights = torch.ones(60).double() if metric is None else metric.double()
    space = span(rows, [60])
    found = project(space, direction, metric=metric, sides="one").double()
    unit = (rows / rows.norm(dim=1, keepdim=True)).double()
    slack = unit @ found
    size = float(direction.norm())
    assert slack.min() >= -2e-5 * size
    moved = (found - direction.double()) / weights  # = G' λ
    multipliers = torch.linalg.lstsq(unit.T, moved[:, None]).solution[:, 0]
    assert (unit.T @ multipliers - moved).norm() <= 1e-4 * max(1.0, float(moved.norm()))
    assert multipliers.min() >= -1e-3 * max(1.0, float(multipliers.abs().max()))
    assert (multipliers * slack).abs().max() <= 1e-3 * size * max(1.0, float(multipliers.abs().max()))
    two = project(space, direction, metric=metric).double()
    assert ((found - direction) ** 2 / weights).sum() <= ((two - direction) ** 2 / weights).sum() * (1 + 1e-4)


def test_one_sided_lets_what_helps_through():
    rows, _, _ = problem(3, 1)
    helps = rows[0] + 0.1 * torch.randn(60, generator=torch.Generator().manual_seed(0))
    assert torch.equal(project(span(rows, [60]), helps, sides="one"), helps)
    assert abs(worst_cosine(rows, project(span(rows, [60]), -helps, sides="one"))) <= 1e-6


@pytest.mark.parametrize("sides", ["one", "two"])
def test_demanded_descent(sides):
    rows, direction, metric = problem(5, 3)
    unit = rows / rows.norm(dim=1, keepdim=True)
    demanded = torch.tensor([[0.5, 0.0, 1.0]], dtype=torch.float64)
    for weights in (None, metric + 0.01):
        found = project(span(rows, [60]), direction, metric=weights, sides=sides, demanded=demanded)
        got = (unit @ found).double()
        if sides == "two":
            assert torch.allclose(got, demanded[0], atol=1e-5)
        else:
            assert (got >= demanded[0] - 1e-5).all()


@given(seed=seeds, k=ranks, shards=st.integers(2, 4))
@settings(max_examples=20, deadline=None)
def test_shards_make_no_difference(seed, k, shards):
    """Each process holds some columns; only small sums cross. Played here in turn: sums first, then each shard."""
    rows, direction, metric = problem(seed, k)
    whole = project(span(rows, [60]), direction, metric=metric)
    widths = [60 // shards] * (shards - 1)
    widths.append(60 - sum(widths))
    parts = list(zip(rows.split(widths, 1), direction.split(widths), metric.split(widths), strict=True))

    class Wait(Exception):
        pass

    def run(part, known):
        """Run one shard until it asks for a sum that is not known yet; then give its own share of it."""
        asked = iter(range(1000))

        def reduce(tensor):
            number = next(asked)
            if number < len(known):
                return known[number]
            raise Wait(tensor)

        try:
            g, d, m = part
            return project(span(g, [len(d)], reduce=reduce), d, metric=m, reduce=reduce), None
        except Wait as wait:
            return None, wait.args[0]

    known = []
    while True:
        results = [run(part, known) for part in parts]
        if results[0][0] is not None:
            break
        known.append(sum(share for _, share in results))
    assert torch.allclose(torch.cat([done for done, _ in results]), whole, atol=1e-5)


def test_blocks_that_span_less_than_others():
    """A reference that is zero in a block (a fresh LoRA's A) constrains nothing there, and nothing is divided by it."""
    rows = torch.zeros(2, 6)
    rows[0, 3:] = torch.tensor([1.0, 2.0, 3.0])
    space = span(rows, [3, 3])
    assert rank(space).tolist() == [0, 1]
    direction = torch.arange(6.0)
    projected = project(space, direction)
    assert torch.equal(projected[:3], direction[:3])
    assert worst_cosine(rows[:1], projected) <= 1e-6
    nothing = span(torch.zeros(2, 6), [6])
    for sides in ("one", "two"):
        assert torch.equal(project(nothing, direction, sides=sides), direction)
    assert leakage(nothing, direction) == 0


def test_leakage_bounds_the_cosine_with_every_reference():
    rows, direction, _ = problem(7, 5)
    share = float(leakage(span(rows, [60]), direction))
    assert worst_cosine(rows, direction) <= share <= 1
    inside = components(span(rows, [60]), direction)
    assert share == pytest.approx(float(inside.norm() / direction.double().norm()), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_long_vector_in_float32_is_close_to_float64(dtype):
    """300,000 numbers, 16 gradients: the float32 passes leave less than 1e-6 of the direction in the span."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(16, 300_000, generator=generator)
    rows[1] = rows[0] + 1e-4 * rows[1]
    direction = torch.randn(300_000, generator=generator) + rows.sum(0)
    space = span(rows, [300_000])
    if dtype == torch.bfloat16:
        space = type(space)(space.basis.to(dtype), space.coordinates, space.sizes)
    projected = project(space, direction)
    assert worst_cosine(rows[2:], projected) <= (1e-6 if dtype == torch.float32 else 1e-4)


def test_gram_of_two_kinds_of_rows():
    rows, direction, metric = problem(1, 3)
    expected = (rows.double() * metric.double()) @ torch.stack([direction, metric]).double().T
    got = gram(rows, [60], metric, other=torch.stack([direction, metric]))
    assert torch.allclose(got[0], expected, rtol=1e-9)


# --- signal or noise ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("noise", "low", "high"), [(0.0, 0.999, 1.0), (1.0, 0.6, 0.99), (30.0, -0.3, 0.3)])
def test_split_half_cosine_tells_signal_from_noise(noise, low, high):
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(400, generator=generator)
    rows = (mean + noise * torch.randn(8, 400, generator=generator)).double()
    counts = torch.full((8,), 10.0)
    cosine = float(split_half_cosine(rows @ rows.T, counts))
    even, odd = rows[::2].mean(0), rows[1::2].mean(0)
    assert cosine == pytest.approx(float(torch.cosine_similarity(even, odd, dim=0)), abs=1e-9)
    assert low <= cosine <= high


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_held_is_the_mean_share_of_energy(sizes):
    """All of its own rows, whatever their lengths; of others what a projection takes out; zero rows do not count."""
    rows, _, _ = problem(3, 4)
    space = span(rows, sizes)
    assert float(held(space, rows * torch.tensor([1.0, 1e3, 1e-3, 5.0])[:, None])) == pytest.approx(1.0, abs=1e-6)
    others = torch.randn(3, 60, generator=torch.Generator().manual_seed(8))
    kept = others - torch.stack([project(space, row) for row in others])
    expected = (kept.norm(dim=1) ** 2 / others.norm(dim=1) ** 2).mean()
    assert float(held(space, others)) == pytest.approx(float(expected), rel=1e-4)
    assert float(held(space, torch.cat([others, torch.zeros(2, 60)]))) == pytest.approx(float(expected), rel=1e-4)


def test_halves_weigh_by_tokens():
    even, odd = halves(torch.tensor([3.0, 5.0, 1.0]))
    assert even.tolist() == [0.75, 0.0, 0.25]
    assert odd.tolist() == [0.0, 1.0, 0.0]


@given(st.lists(st.integers(1, 7), min_size=1, max_size=5))
@settings(max_examples=20, deadline=None)
def test_flatten_and_views_are_inverse(sizes):
    assume(sum(sizes) > 0)
    tensors = {f"p{i}": torch.randn(size, 2) for i, size in enumerate(sizes)}
    back = named.views(named.flatten(tensors), tensors)
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())
    without = {name: tensor for name, tensor in tensors.items() if name != "p0"}
    assert not named.views(named.flatten(without, tensors), tensors)["p0"].any()
