"""Short trainings in one pass over the head and in two, for `test_one_pass` and `test_one_pass_conditions`."""

from __future__ import annotations

from typing import Any

import holdfast
import pytest
from holdfast.methods import TargetMaskedKL

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


def assert_same(one: Any, two: Any, rel: float = BAR) -> None:
    """Whether two runs logged the same and trained the same."""
    for mine, theirs in zip(shown(one), shown(two), strict=True):
        assert mine == pytest.approx(theirs, rel=rel, abs=rel)
    assert runs.difference(moved(one), moved(two)) <= rel
