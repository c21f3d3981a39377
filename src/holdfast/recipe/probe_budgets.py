"""Budgets on scores, for `strength: auto`: what share of the base's score the model in training has lost.

    lost = (base - tuned) / |base|      where more is better; where less is better, with the other sign

What is asked, and by whom, is as in `holdfast.watch`: the suite of the recipe's `drift`, on the validation split. A
gain counts as nothing lost. Read next: `holdfast.core.budget`, which finds the strength; docs/budget.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn

from ..analysis.scores import find
from ..core.budget_settings import parted
from ..core.errors import ConfigError
from ..core.held_out import Measure
from ..core.method import Method
from ..core.selection import unwrap
from ..drift.measuring import measure
from ..drift.models import Models
from ..drift.probe import BASE, Probe
from .watch_settings import Watching
from .watch_sides import always, base_side, logits, name_of, refuse_lost_base, tokenizer_of, untouched

TUNED = "tuned"


def scores_of(methods: Sequence[Method]) -> list[str]:
    """Return the names of the scores that methods have budgets on."""
    return [str(parted(method.budget)[0]) for method in methods if method.is_auto and not method.needs_held_out]


def probe_measures(
    trainer: Any, methods: Sequence[Method], asked: Watching, other: Callable[[], nn.Module | None]
) -> dict[str, Measure]:
    """Measure the base, once, and return for each score that a budget is on how to measure what has been lost of it.

    Args:
        trainer: whose model it is, before its first step.
        methods: of the run.
        asked: the suite and how it is asked.
        other: gives the base, where the model in training cannot be switched back to it; else None.

    Raises:
        ConfigError: lists every score that no probe of the suite gives, or of which no share can be lost.
        WrongSetup: if the base cannot be had from this model.
    """
    names = scores_of(methods)
    if not names:
        return {}
    model, precision, base = unwrap(trainer.model), trainer.accelerator.autocast, other()
    refuse_lost_base(model, base)
    sides = {BASE: base_side(model, base, precision)[0], TUNED: always(model, precision)}
    models = Models(sides, tokenizer_of(trainer), batch_size=asked.batch_size)
    found: dict[str, tuple[Probe, float]] = {}
    with untouched(model):
        for probe in asked.probes(name_of(model)):
            scores = measure(models, [probe], sides=[BASE])[BASE].scores
            found |= {name: (probe, score.value) for name, score in scores.items()}
            if found.keys() >= set(names):
                break
    if faults := [fault for name in names if (fault := _fault(name, found))]:
        raise ConfigError("budget", faults)

    def lost(name: str, model: nn.Module) -> float:
        probe, before = found[name]
        if not bool(logits(model, precision).isfinite().all()):
            return math.nan
        models.forget(TUNED)
        with untouched(model):
            now = measure(models, [probe], sides=[TUNED])[TUNED].scores[name].value
        kind = find(name)
        assert kind is not None  # the recipe was refused otherwise
        return (before - now if kind.higher_is_better else now - before) / abs(before)

    return {name: partial(lost, name) for name in names}


def _fault(name: str, found: Mapping[str, tuple[Probe, float]]) -> str:
    if name not in found:
        return f"no probe of this suite gives {name!r}; there are: {', '.join(found)}"
    if not (math.isfinite(found[name][1]) and found[name][1]):
        return f"{name} is {found[name][1]:g} for the base, so no share of it can be lost (a KL's budget has no name)"
    return ""
