"""Short trainings in one pass over the head and in two, for `test_one_pass` and `test_one_pass_conditions`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import holdfast
import pytest
import torch
from holdfast.methods import TargetMaskedKL
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import runs
import tiny

BAR = 1e-5
TMKL = TargetMaskedKL(strength=2.0)


def attached(host: str, methods: Any, one_pass: bool = True, model: Any = None, **options: Any) -> Any:
    """A trainer that has not begun. SGD: AdamW would blow rounding up to a full step where there is no gradient."""
    made = runs.trainer(host, model, **({"optim": "sgd", "learning_rate": 0.5} | options))
    made.start = tiny.trained(made.model)
    holdfast.attach(made, methods, retain=tiny.texts(), one_pass=one_pass)
    return made


def trained(*args: Any, **options: Any) -> Any:
    """A trainer that has been trained."""
    made = attached(*args, **options)
    made.train()
    return made


def shown(trainer: Any) -> list[dict[str, float]]:
    """All that the host logged, but for how long it took."""
    timing = ("runtime", "per_second", "flos")
    return [{k: v for k, v in e.items() if not any(t in k for t in timing)} for e in trainer.state.log_history]


def moved(trainer: Any) -> dict[str, Any]:
    """How training changed the weights."""
    return {k: v - trainer.start[k] for k, v in tiny.trained(trainer.model).items()}


def assert_close(one: Any, two: Any, rel: float, absolute: float | None = None) -> None:
    """Whether two runs logged the same; what a method logs is small, and close in proportion."""
    for mine, theirs in zip(shown(one), shown(two), strict=True):
        assert mine.keys() == theirs.keys()
        for key in mine:
            margin = rel * 1e-3 if key.startswith("holdfast/") else absolute if absolute is not None else rel
            assert mine[key] == pytest.approx(theirs[key], rel=rel, abs=margin), key


def assert_same(one: Any, two: Any, rel: float = BAR) -> None:
    """Whether two runs logged the same and trained the same."""
    assert_close(one, two, rel)
    assert runs.difference(moved(one), moved(two)) <= rel


class Waits(TorchDispatchMode):
    """Notes who asks a tensor for a number, for which a GPU would have to be waited for: our own functions."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self._lists = _Lists(self.note)

    def __enter__(self) -> Any:
        self._lists.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._lists.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        ops = torch.ops.aten
        if func.overloadpacket in (ops._local_scalar_dense, ops.nonzero, ops.equal):
            self.note()
        return func(*args, **(kwargs or {}))

    def note(self) -> None:
        frame: Any = sys._getframe()
        while "/torch/" in frame.f_code.co_filename or frame.f_code.co_filename == __file__:
            frame = frame.f_back
        if "/holdfast/" in frame.f_code.co_filename:
            self.seen.append(f"{Path(frame.f_code.co_filename).stem}.{frame.f_code.co_name}")


class _Lists(TorchFunctionMode):
    """Sees `tolist`, which on a CPU asks no operator."""

    def __init__(self, note: Callable[[], None]) -> None:
        super().__init__()
        self._note = note

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.tolist:
            self._note()
        return func(*args, **(kwargs or {}))
