"""Passes over one long vector: exact against float64, in place, without a copy, and with no wait for the device."""

from contextlib import contextmanager

import holdfast
import pytest
import torch
from holdfast.core.errors import NotYetSupported
from holdfast.core.session import Session
from holdfast.core.types import Step
from holdfast.core.update import metric
from holdfast.functional import flat, named
from holdfast.functional.subspace import project, span
from holdfast.methods import AGEM, L2SP, OrthogonalProjection, PCGrad, RandomSubspace
from torch.utils._python_dispatch import TorchDispatchMode

import tiny

pytestmark = pytest.mark.filterwarnings("ignore:orthogonal_projection. halves of the retain rows")
LENGTHS = [0, 1, 60, flat.SHORT, 3 * flat.SHORT + 17]


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + 0.3


# --- the passes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sums", [torch.mv, flat._by_elements], ids=["on a CPU", "on a GPU"])
def test_dots_are_those_of_float64(length, dtype, sums, monkeypatch):
    monkeypatch.setattr(torch, "mv", sums)
    rows, vector = numbers(5, length).to(dtype), numbers(length, seed=1)
    sizes = rows.double().norm(dim=1) * vector.double().norm()
    assert ((flat.dots(rows, vector) - rows.double() @ vector.double()).abs() <= 1e-7 * sizes).all()


@pytest.mark.parametrize("length", LENGTHS)
def test_energy_is_that_of_float64(length):
    vector = numbers(length)
    assert float(flat.energy(vector)) == pytest.approx(float(vector.double().square().sum()), rel=5e-7)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weighted", [False, True])
def test_subtract_is_in_place_and_that_of_float64(length, dtype, weighted):
    rows, vector, c = numbers(5, length).to(dtype), numbers(length, seed=1), numbers(5, seed=2).double()
    weights = numbers(length, seed=3).square() if weighted else None
    along = rows.double().T @ c
    expected = vector.double() - (along if weights is None else weights.double() * along)
    assert flat.subtract_(vector, rows, c, weights) is vector
    assert torch.allclose(vector.double(), expected, rtol=0, atol=2e-6 * (1.0 if weights is None else 20.0))


@pytest.mark.parametrize("sizes", [[300], [64, 0, 200, 36]], ids=str)
@pytest.mark.parametrize("sides", ["one", "two"])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_projection_into_its_own_direction_is_the_same_and_one_into_new_memory_leaves_it_alone(
    sizes, sides, weighted
):
    rows = numbers(4, 300)
    space, direction = span(rows, sizes), numbers(300, seed=1) - rows.sum(0)  # against all: something is to be removed
    kept, weights = direction.clone(), numbers(300, seed=2).square() if weighted else None
    fresh = project(space, direction, metric=weights, sides=sides)
    assert torch.equal(direction, kept)
    assert not torch.equal(fresh, kept)
    assert project(space, direction, metric=weights, sides=sides, out=direction) is direction
    assert torch.equal(direction, fresh)


# --- the vector ------------------------------------------------------------------------------------------------------


def test_pieces_of_one_memory_are_not_copied():
    whole = numbers(3, 12)
    like = {"a": torch.zeros(2, 3), "b": torch.zeros(0), "c": torch.zeros(6)}
    pieces = named.views(whole[1], like)
    for x in (pieces, dict(reversed(pieces.items()))):
        vector = named.flatten(x, like)
        assert vector.data_ptr() == whole[1].data_ptr()
        assert torch.equal(vector, whole[1])


@pytest.mark.parametrize("odd", ["order", "gap", "a name is missing", "transposed", "needs a gradient", "other memory"])
def test_anything_else_is_copied_in_the_right_order(odd):
    whole = numbers(12)
    like = {"a": torch.zeros(2, 3), "b": torch.zeros(2, 3)}
    pieces = named.views(whole, like)
    if odd == "order":
        like = {"b": like["b"], "a": like["a"]}
    elif odd == "gap":
        pieces = named.views(numbers(14)[1:13], like) | {"b": whole[6:].view(2, 3)}
    elif odd == "a name is missing":
        del pieces["b"]
    elif odd == "transposed":
        pieces["a"], like["a"] = whole[:6].view(3, 2).T, torch.zeros(2, 3)
    elif odd == "needs a gradient":
        pieces = {name: piece.clone().requires_grad_() for name, piece in pieces.items()}
    else:
        pieces["b"] = pieces["b"].clone()
    vector = named.flatten(pieces, like)
    expected = [pieces[name].reshape(-1) if name in pieces else torch.zeros(6) for name in like]
    assert torch.equal(vector, torch.cat(expected))
    assert vector.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr()


def test_bfloat16_is_widened_and_a_gradient_flows_through_a_copy():
    tensors = {"a": numbers(3).requires_grad_(), "b": numbers(2).bfloat16()}
    vector = named.flatten(tensors)
    assert vector.dtype == torch.float32
    vector.square().sum().backward()
    assert torch.equal(tensors["a"].grad, 2 * tensors["a"].detach())


# --- distances -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_squared_distance_and_both_its_gradients(dtype):
    x = {"a": numbers(3, 4).to(dtype).requires_grad_(), "b": numbers(5, seed=1).to(dtype).requires_grad_()}
    y = {"b": numbers(5, seed=2).to(dtype).requires_grad_(), "a": numbers(3, 4, seed=3).to(dtype)}  # another order
    total = named.squared_distance(x, y)
    with torch.no_grad():
        expected = sum((x[name].double() - y[name].double()).square().sum() for name in x)
    assert float(total.detach()) == pytest.approx(float(expected), rel=1e-6)
    gradients = torch.autograd.grad(3 * total, [x["a"], x["b"], y["b"]])
    differences = [6 * (x[n].detach().double() - y[n].detach().double()) for n in ("a", "b")]
    for found, exact in zip(gradients, [*differences, -differences[1]], strict=True):
        assert found.dtype == dtype
        assert torch.allclose(found.double(), exact, rtol=4e-3 if dtype == torch.bfloat16 else 1e-6, atol=0)


def test_a_distance_of_nothing_has_no_gradient():
    x = {"a": numbers(4).requires_grad_()}
    total = named.squared_distance(x, named.clone(x))
    assert total == 0
    assert torch.equal(torch.autograd.grad(total, [x["a"]])[0], torch.zeros(4))


# --- methods ---------------------------------------------------------------------------------------------------------


def transformed(method, state, directions, params=None):
    logged = {}
    params = params or directions
    step = Step(directions, params, 3, log=lambda name, value: logged.update({name: float(value)}))
    with torch.no_grad():
        return named.flatten(method.transform(state, step).direction).double(), logged


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_agem_against_float64_and_twice_is_once(sign):
    names = {"a": torch.zeros(3, 4), "b": torch.zeros(7)}
    reference = numbers(19)
    direction = sign * reference + 0.5 * numbers(19, seed=1)
    state = named.views(reference, names)
    found, logged = transformed(AGEM(), state, named.views(direction.clone(), names))
    g, r = direction.double(), reference.double()
    expected = g - min(0.0, float(g @ r)) / float(r @ r) * r
    assert torch.allclose(found, expected, atol=1e-6)
    assert logged["cosine"] == pytest.approx(float(g @ r / (g.norm() * r.norm())), rel=1e-6)
    again, _ = transformed(AGEM(), state, named.views(found.float(), names))
    assert torch.allclose(again, expected, atol=1e-6)


def test_agem_reads_the_reference_where_a_gradient_is():
    """A parameter that this backward did not reach counts on neither side."""
    state = {"a": torch.tensor([1.0, 0.0]), "b": torch.tensor([100.0])}
    found, _ = transformed(AGEM(), state, {"a": torch.tensor([-2.0, 1.0])}, params=state)
    assert found.tolist() == [0.0, 1.0]


@pytest.mark.parametrize("seed", range(4))
def test_pcgrad_of_three_objectives_by_the_books(seed):
    names = {"a": torch.zeros(3), "b": torch.zeros(2)}
    gradients = numbers(3, 5, seed=seed)
    gradients[2] *= seed > 0  # one objective without a gradient
    orders = torch.stack([torch.randperm(3, generator=torch.Generator().manual_seed(i)) for i in range(3)])
    found, logged = transformed(
        PCGrad(strength=0.5), {"rows": gradients[1:], "orders": orders}, named.views(gradients[0].clone(), names)
    )
    given, own = gradients.double(), gradients.double().clone()
    for i, order in enumerate(orders.tolist()):
        for j in order:
            if j != i and own[i] @ given[j] < 0:
                own[i] -= own[i] @ given[j] / (given[j] @ given[j]) * given[j]
    assert torch.allclose(found, own[0] + 0.5 * own[1:].sum(0), atol=1e-6)
    assert logged["conflicts"] == sum(float(given[0] @ g < 0) for g in given[1:]) / 2


# --- in a session ----------------------------------------------------------------------------------------------------


class Waits(TorchDispatchMode):
    """Counts what makes a host wait for its device: numbers read off tensors, and results of unknown size."""

    def __init__(self):
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen += function.overloadpacket in (
            torch.ops.aten._local_scalar_dense,
            torch.ops.aten.nonzero,
            torch.ops.aten.masked_select,
        )
        return function(*args, **(kwargs or {}))


@contextmanager
def running(methods, optimizer=torch.optim.SGD, **settings):
    """A session on a tiny LoRA, at the end of its second backward."""
    model = tiny.lora(tiny.llama()).eval()
    tiny.shake(model)
    made = optimizer([p for p in model.parameters() if p.requires_grad], lr=1e-2, **settings)
    with holdfast.preserve(model, made, methods, retain=tiny.batches(4)) as session:
        model(**tiny.batches(1, seed=9)[0]).loss.backward()
        session.gradients_ready()
        made.step()
        made.zero_grad()
        model(**tiny.batches(1, seed=10)[0]).loss.backward()
        yield session, made, model


@pytest.mark.parametrize(
    ("methods", "waits"),
    [
        ([OrthogonalProjection(rank=4)], 2),  # whether gradients are finite, and the age of a basis, kept on the host
        ([OrthogonalProjection(rank=4, apply_to="gradient", strength=0.5)], 2),
        ([RandomSubspace(rank=4, scope="tensor")], 2),
        ([AGEM(refresh_every=10)], 1),
        ([AGEM(refresh_every=10, apply_to="update")], 1),
        ([L2SP()], 1),
    ],
    ids=str,
)
def test_a_step_waits_for_no_tensor(methods, waits):
    """The model trains 28 tensors: a number read of each would show."""
    with running(methods) as (session, optimizer, _), Waits() as mode:
        session.gradients_ready()
        optimizer.step()
        assert mode.seen == waits


def test_the_optimizers_metric_waits_for_no_tensor_and_is_adams():
    with running([OrthogonalProjection(rank=4, metric="optimizer")], torch.optim.Adam, eps=1e-4) as (_, adam, model):
        params = {name: p for name, p in model.named_parameters() if p.requires_grad}
        with Waits() as mode:
            found = metric(adam, params)
        assert mode.seen == 0
        for name, p in params.items():
            squares = adam.state[p]["exp_avg_sq"].double() / (1 - 0.999 ** int(adam.state[p]["step"]))
            exact = torch.where(squares > 0, 1e-2 / (squares.sqrt() + 1e-4), 0.0)
            assert torch.allclose(found[name].double(), exact, rtol=1e-6)


@pytest.mark.parametrize("method", [OrthogonalProjection(rank=4, apply_to="gradient"), AGEM(), PCGrad()], ids=str)
def test_a_host_that_keeps_gradients_in_one_memory_gets_the_same_there(method):
    """Apart or side by side makes no difference, bit for bit; where they lie is the host's business."""
    results = []
    for together in (False, True):
        with running([method]) as (session, _, model):
            params = {name: p for name, p in model.named_parameters() if p.requires_grad}
            whole = -torch.cat([p.grad.flatten() for p in params.values()])  # up the loss, so that every method acts
            before = whole.clone()
            for name, piece in named.views(whole, params).items():
                params[name].grad = piece if together else piece.clone()
            session.gradients_ready()
            results.append(torch.cat([p.grad.flatten() for p in params.values()]))
            assert torch.equal(whole, results[-1]) is together
            assert not torch.equal(before, results[-1])
    assert torch.equal(*results)


def test_parameters_on_several_devices_are_refused_by_name():
    model = torch.nn.ModuleDict({"here": torch.nn.Linear(2, 2), "there": torch.nn.Linear(2, 2, device="meta")})
    with pytest.raises(NotYetSupported, match=r"random_subspace.*several devices.*here.*cpu.*there.*meta.*select"):
        Session(model, [RandomSubspace()])
    Session(model, [RandomSubspace(select=("here*",))])
