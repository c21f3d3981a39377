"""Each kernel in turn, asked for and had."""

import pytest
from holdfast.functional.chunked import Objective
from holdfast.functional.divergence import Divergence
from holdfast.functional.triton.dispatch import choose

from functional.in_triton.cases import make


@pytest.fixture(params=["rows", "tiles"])
def kernel(request, monkeypatch):
    """Ask for a kernel, and make sure that it is this one that will compute."""
    monkeypatch.setenv("HOLDFAST_KERNEL", request.param)
    hidden, _, head, _ = make(tokens=1)
    assert choose(hidden, head, Objective(Divergence())).kernel == request.param
    return request.param
