"""Who computes, what is refused, and that nothing returns to the host."""

import pytest
import torch
from holdfast.functional.chunked import Objective
from holdfast.functional.divergence import Divergence
from holdfast.functional.head import Head
from holdfast.functional.linear_divergence import linear_cross_entropy_with_divergence, linear_divergence
from holdfast.functional.triton import dispatch, rows, tiles
from holdfast.functional.triton.dispatch import choose, fault_on
from torch.utils._python_dispatch import TorchDispatchMode

from functional.in_triton.cases import QUIET, make

pytestmark = QUIET


def test_on_a_cpu_the_interpreter_runs_only_where_a_kernel_is_asked_for(monkeypatch):
    hidden, _, head, _ = make()
    monkeypatch.delenv("HOLDFAST_KERNEL", raising=False)
    assert choose(hidden, head, Objective(Divergence())).kernel == "plain"
    monkeypatch.setenv("HOLDFAST_KERNEL", "rows")
    assert choose(hidden, head, Objective(Divergence())).kernel == "rows"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden": torch.ones(2, 7).double()}, "torch.float32 and torch.float64, not bfloat16 or float32"),
        ({"head": Head(torch.ones(5, 7).half())}, "torch.float16"),
        ({"head": Head(torch.ones(7, 5).t())}, "not contiguous"),
        ({"head": Head(torch.ones(5, 7, requires_grad=True))}, "the head is trained"),
        ({"reference_head": Head(torch.ones(5, 7))}, "the base has a head of its own"),
        ({"objective": Objective(Divergence(direction="js"))}, "the direction is js, not forward"),
        ({"hidden": torch.ones(0, 7)}, "there are no rows"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_kernels_do_not_do_is_said(kernel, change, words):
    given = {"hidden": torch.ones(2, 7), "head": Head(torch.ones(5, 7)), "objective": Objective(Divergence()), **change}
    with pytest.warns(RuntimeWarning, match=words):
        choice = choose(**given)
    assert choice.kernel == "plain"
    assert words in choice.reason


def test_every_obstacle_at_once(kernel):
    head = Head(torch.ones(5, 7, dtype=torch.float64, requires_grad=True))
    with pytest.warns(RuntimeWarning, match=r"float64.*; the head is trained; the direction is reverse"):
        choose(torch.ones(2, 7), head, Objective(Divergence(direction="reverse")))
    with torch.no_grad(), pytest.warns(RuntimeWarning, match=r"float64[^;]*\."):  # no gradient: not being trained
        assert "trained" not in choose(torch.ones(2, 7), head, Objective(Divergence())).reason


def test_the_first_call_compares_the_kernel_with_its_twin(kernel, monkeypatch):
    device = torch.device("cpu")
    fault_on.cache_clear()
    for dtype in (torch.float32, torch.bfloat16):
        assert fault_on(device, kernel, dtype) is None
    fault_on.cache_clear()
    monkeypatch.setattr(rows.Values, "sums", lambda self, work: (self.nll.sum(), *[self.nll.sum()] * 3))
    with pytest.warns(RuntimeWarning, match=f"the {kernel} kernel is off by .*% on cpu. The plain path computes"):
        assert "off by" in fault_on(device, kernel, torch.float32)
    fault_on.cache_clear()
    broken = rows if kernel == "rows" else tiles
    monkeypatch.setattr(broken, "RowLoss" if kernel == "rows" else "TileLoss", None)
    with pytest.warns(RuntimeWarning, match=r"does not run on cpu \(AttributeError"):
        assert "does not run" in fault_on(device, kernel, torch.float32)
    fault_on.cache_clear()


def test_nothing_returns_to_the_host(kernel):
    asked = []

    class Listen(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            asked.append(function.name())
            return function(*args, **(kwargs or {}))

    hidden, base, head, targets = make(tokens=4)
    with Listen():
        for reduction in ("sum", "mean"):
            found = linear_cross_entropy_with_divergence(
                hidden, base, head, targets, Divergence(), reduction=reduction, statistics=True, chunk_rows=3
            )
            found.loss.backward()
        linear_divergence(hidden, base, head, targets, Divergence(), reduction="mean_kept").backward()
    assert "aten::mm.out" in asked
    returning = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "_to_cpu")
    assert not [name for name in asked if name.split("::")[1].split(".")[0] in returning]


def test_no_second_derivative_and_no_gradient_where_none_is_asked_for(kernel):
    hidden, base, head, targets = make(tokens=2)
    value = linear_divergence(hidden, base, head, targets, Divergence())
    with pytest.raises(RuntimeError, match=r"no second derivative.*use logit_divergence"):
        torch.autograd.grad(value, hidden, create_graph=True)
    with torch.no_grad():
        silent = linear_divergence(hidden, base, head, targets, Divergence())
    assert silent == value
    assert not silent.requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = linear_divergence(hidden, base, head, targets, Divergence())
    assert cast == value
    assert torch.equal(torch.autograd.grad(cast, hidden)[0], torch.autograd.grad(value, hidden)[0])


def test_faults_of_shape_and_target(kernel):
    hidden, base, head, targets = make(tokens=3)
    with pytest.raises(ValueError, match=r"hidden must have shape \[\.\.\., 7\]"):
        linear_divergence(hidden[:, :6], base, head, targets, Divergence())
    with pytest.raises(ValueError, match=r"reference_hidden has shape \[2, 7\]"):
        linear_divergence(hidden, base[:2], head, targets, Divergence())
    with pytest.raises(ValueError, match="chunk_rows must be at least 1, got 0"):
        linear_divergence(hidden, base, head, targets, Divergence(), chunk_rows=0)
    with pytest.raises(ValueError, match="at least two tokens"):
        linear_divergence(hidden, base, Head(torch.ones(1, 7)), targets.clamp(max=0), Divergence())
    for wrong in (75, -1):
        with pytest.raises(RuntimeError, match="Targets must be token numbers below 75"):
            linear_divergence(hidden, base, head, targets.masked_fill(targets < 0, wrong), Divergence())


def test_the_workspace_of_rows_is_padded_to_whole_vectors():
    buffer = rows.padded(3, torch.empty(50_257, 1, dtype=torch.bfloat16))
    assert buffer.shape == (3, 50_257)
    assert buffer.stride() == (50_304, 1)
    assert dispatch.CHUNK_ROWS == 1024
