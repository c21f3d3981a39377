"""Geodesic separation of AlignGuard-LoRA (arXiv 2508.02079): alignment and task parts of an update at a right angle.

    strength · Σ_layers <dW_A, dW_T>² / (‖dW_A‖² ‖dW_T‖² + ε)

Taken literally this is zero: dW_T is what an orthogonal projection leaves of dW, so <dW_A, dW_T> = 0 whatever dW is,
and its gradient too. That is `form="complement"`, a diagnostic. The forms that do something measure other parts, or
measure the angle in another metric.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

import torch
from torch import Tensor

from ...core.errors import WrongSetup
from ...core.layers import LowRankUpdate
from ...core.registry import register
from ...core.types import Auto, Setup, State, Weights
from ...functional.collision import EPSILON, geodesic_overlap
from ...functional.fisher import Part, remainder
from ...functional.lowrank import Update
from ...functional.packed_fishers import LayerFisher
from .fisher_method import LeadingMethod


@register("geodesic_separation")
@dataclass(frozen=True, kw_only=True)
class GeodesicSeparation(LeadingMethod):
    """Penalise the squared cosine between two parts of the update.

    Attributes:
        strength: 1.0: a squared cosine is at most 1 in each layer.
        form: `fishers`: dW in the leading directions of the `data` sets' Fisher, and in those of the `against` sets';
            `metric`: dW_A and dW - dW_A, with the angle measured by the Fisher of the `against` sets; `adapters`: the
            two adapters that are trained on each layer; `complement`: dW_A and dW - dW_A as the paper has it, as far as
            it is known: identically 0.
        against: names of the retain sets of the second Fisher.

    >>> GeodesicSeparation().form
    'fishers'
    """

    strength: float | Auto = 1.0
    form: Literal["fishers", "metric", "adapters", "complement"] = "fishers"
    against: tuple[str, ...] = ("task",)

    def _reads_data(self) -> bool:
        return self.form != "adapters"

    def _more_sets(self) -> tuple[str, ...]:
        return ("against",)

    def faults(self) -> Iterator[str]:
        yield from super().faults()
        if self.form not in ("fishers", "metric", "adapters", "complement"):
            yield f"form must be one of fishers, metric, adapters, complement, got {self.form!r}"

    def init(self, setup: Setup) -> State:
        state = super().init(setup)
        if self.form == "adapters":
            _pairs([u for u in setup.updates if isinstance(u, LowRankUpdate)])
        if self.form in ("fishers", "metric"):
            state |= self.fisher_state(setup, self.against, "against")
        return state

    def penalty(self, state: State, weights: Weights) -> Tensor:
        if self.form == "adapters":
            pairs = _pairs([u for u in weights.updates if isinstance(u, LowRankUpdate)])
            return self.strength * torch.stack([geodesic_overlap(a.change({}), b.change({})) for a, b in pairs]).sum()
        others = self.fishers(state, "against") or [{}]
        terms = [
            self._overlap(update, part, other.get(layer))
            for layer, update, part in self.parts(state, weights)
            for other in others
        ]
        return self.strength / (self.sets(state) * len(others)) * torch.stack(terms).sum()

    def _overlap(self, update: Update, part: Part, other: LayerFisher | None) -> Tensor:
        if self.form == "fishers":
            assert other is not None
            return geodesic_overlap(part.update, other.part(update, self.top, self.most).update)
        rest = remainder(update, part)[0]
        if self.form == "complement":
            return geodesic_overlap(part.update, rest)
        assert other is not None
        one, two = other.quadratic(part.update), other.quadratic(rest)
        between = (other.quadratic(update) - one - two) / 2  # polarisation
        return between.square() / (one * two + EPSILON)


def _pairs(updates: list[LowRankUpdate]) -> list[tuple[LowRankUpdate, LowRankUpdate]]:
    """Return the two adapters of each layer."""
    layers: Mapping[str, list[LowRankUpdate]] = {
        layer: list(group) for layer, group in groupby(sorted(updates, key=lambda u: u.layer), key=lambda u: u.layer)
    }
    if odd := [layer for layer, group in layers.items() if len(group) != 2]:
        raise WrongSetup(
            f"geodesic_separation with form='adapters' compares the two adapters that are trained on each layer, and "
            f"{odd[0]} has {len(layers[odd[0]])}. Activate two (model.base_model.set_adapter(['one', 'two'])), or "
            "choose form='fishers'."
        )
    return [(group[0], group[1]) for group in layers.values()]
