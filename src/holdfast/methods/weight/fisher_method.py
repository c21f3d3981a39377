"""What the methods on the weight update share: how dW is read off a model, and what a Fisher in their state is.

dW is s · B A of an adapted layer, or weight minus start of a layer that is trained itself, so a penalty on it depends
neither on how the factors share it nor on how they were initialised. `functional/fisher.py` holds the mathematics.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...core.errors import NeverSupported, WrongSetup
from ...core.layers import DenseUpdate, LowRankUpdate
from ...core.method import WeightMethod
from ...core.types import FisherSpec, Setup, State, Weights
from ...functional.fisher import Kind, Kronecker, Labels, Part, principal_cosines
from ...functional.lowrank import Update, plus, squared_norm
from ...functional.packed_fishers import LayerFisher, pack, unpack

EVERY = 10  # steps between two readings of a diagnostic
WHOLE = ("", "dora")  # variants whose change of the base weights is s · B A (of DoRA: of their direction)


@dataclass(frozen=True, kw_only=True)
class UpdateMethod(WeightMethod):
    """A penalty on the weight updates dW, summed over layers."""

    def init(self, setup: Setup) -> State:
        """Check that every selected parameter is part of an update, and keep the starts of layers trained whole.

        Raises:
            NeverSupported: for an initialisation or variant whose change of the base weights is not s · B A.
            WrongSetup: if no update is selected.
        """
        for update in setup.updates:
            if isinstance(update, LowRankUpdate) and update.variant not in WHOLE:
                raise NeverSupported(
                    f"{self.name} on {update.variant} ({update.name}): its change of the base weights is not s · B A, "
                    "so a penalty on s · B A would pull to the wrong place. Use plain LoRA, rsLoRA or DoRA; l2_sp "
                    "works with any."
                )
        if not setup.updates:
            raise WrongSetup(
                f"{self.name} penalises weight updates, and nothing that is trained forms one: no LoRA factors, and no "
                f"weight of a linear layer (trained: {', '.join(list(setup.params)[:3])}, ...). Change `select`, or "
                "use l2_sp."
            )
        kept = {f"start/{u.name}": u.weight.detach().clone() for u in setup.updates if isinstance(u, DenseUpdate)}
        if lost := set(setup.params) - _parts(setup):
            warnings.warn(
                f"{self.name} does not see {len(lost)} of the trained parameters, which are part of no linear layer's "
                f"update ({sorted(lost)[0]}, ...).",
                stacklevel=2,
            )
        return kept

    def state_bytes(self, parameters: int) -> int:
        return 0

    def updates(self, state: State, weights: Weights) -> dict[str, Update]:
        """Return the update dW of every selected layer, in float32 at least; two adapters of a layer add up."""
        start = {name.removeprefix("start/"): t for name, t in state.items() if name.startswith("start/")}
        found: dict[str, Update] = {}
        for each in weights.updates:
            update, before = each.change(start), found.get(each.layer)
            found[each.layer] = update if before is None else plus(before, update)
        return found


def _parts(setup: Setup) -> set[str]:
    """Return the names of parameters that are part of an update."""
    tensors = [t for u in setup.updates for t in ((u.a, u.b) if isinstance(u, LowRankUpdate) else (u.weight,))]
    places = {t.data_ptr() for t in tensors}
    return {name for name, p in setup.params.items() if p.data_ptr() in places}


@dataclass(frozen=True, kw_only=True)
class FisherMethod(UpdateMethod):
    """A penalty that knows a Fisher of the base model.

    Attributes:
        data: names of the retain sets that the Fisher is of; several are averaged, each normalised first. Empty: all.
        rows: rows of each set that it is estimated on.
        kind: `kronecker`, `diagonal` (of the Kronecker factors), or `samples`: exact, for small models and checks.
        labels: `data`: the empirical Fisher, of the answers in the data; `model`: answers drawn from the model, the
            true Fisher.
        keep: eigenvectors kept on each side of a layer; the rest of the spectrum counts as isotropic.
        rotated: random eigenvectors with the same spectrum: the control of equal magnitude.
        compare: names of retain sets whose Fisher is compared with the first of `data` and not used: `overlap/NAME`,
            the mean squared cosine of the principal angles between the leading directions (1: the same), tells
            whether what is protected is alignment or what every text shares.
    """

    uses_retain: ClassVar[bool] = True
    data: tuple[str, ...] = ()
    rows: int = 256
    kind: Kind = "kronecker"
    labels: Labels = "data"
    keep: int = 64
    rotated: bool = False
    compare: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for setting in ("data", "compare", *self._more_sets()):
            names: object = getattr(self, setting)  # recipes speak YAML, which has no tuples
            object.__setattr__(self, setting, (names,) if isinstance(names, str) else tuple(getattr(self, setting)))
        super().__post_init__()
        object.__setattr__(self, "uses_retain", self._reads_data())  # of this configuration, not of the class

    def _reads_data(self) -> bool:
        """Return whether a Fisher is needed at all."""
        return True

    def _more_sets(self) -> tuple[str, ...]:
        """Return the names of further settings that name retain sets."""
        return ()

    def faults(self) -> Iterator[str]:
        yield from super().faults()
        known = {"kind": ("kronecker", "diagonal", "samples"), "labels": ("data", "model")}
        for setting, values in known.items():
            if getattr(self, setting) not in values:
                yield f"{setting} must be one of {', '.join(values)}, got {getattr(self, setting)!r}"
        for setting in ("rows", "keep"):
            value = getattr(self, setting)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                yield f"{setting} must be a whole number >= 1, got {value!r}"
        if self.rotated and self.kind != "kronecker":
            yield f"rotated=True turns eigenvectors, which kind={self.kind!r} has none of: use kind='kronecker'"

        if self.compare and self.kind != "kronecker":
            yield f"compare needs eigenvectors, which kind={self.kind!r} has none of: use kind='kronecker'"

    @property
    def spec(self) -> FisherSpec:
        """How the Fisher is estimated."""
        return FisherSpec(kind=self.kind, labels=self.labels, rows=self.rows, keep=self.keep)

    def init(self, setup: Setup) -> State:
        state = super().init(setup)
        if not self._reads_data():
            return state
        state |= self.fisher_state(setup, self.data, "fisher")
        if self.compare:
            first = next(iter(setup.fishers(self.data, self.spec).values()))
            for name, others in setup.fishers(self.compare, self.spec).items():
                state[f"overlap/{name}"] = overlap(first, others)
        return state

    def fisher_state(self, setup: Setup, data: tuple[str, ...], place: str) -> State:
        """Return the state that holds the Fisher of some retain sets."""
        state: State = {}
        for name, layers in setup.fishers(data, self.spec).items():
            if self.rotated:
                layers = {layer: fisher.rotated(setup.generator) for layer, fisher in layers.items()}
            state |= pack(layers, f"{place}/{name}/")
        return state

    def sets(self, state: State) -> int:
        """Return the number of retain sets behind the Fisher."""
        return len(self.fishers(state))

    def fishers(self, state: State, place: str = "fisher") -> list[Mapping[str, LayerFisher]]:
        """Return the Fisher of each layer, one mapping for each retain set."""
        memory: tuple[State, dict[str, list[Mapping[str, LayerFisher]]]] = self.__dict__.get("_unpacked", ({}, {}))
        if memory[0] is not state:
            memory = (state, {})
            object.__setattr__(self, "_unpacked", memory)  # no setting: what a Fisher has worked out stays with it
        if place not in memory[1]:
            # in one order, also after a checkpoint was read: sums of floats depend on it
            sets = sorted({key.split("/")[1] for key in state if key.startswith(f"{place}/")})
            memory[1][place] = [unpack(state, f"{place}/{name}/") for name in sets]
        return memory[1][place]

    def shows(self, weights: Weights) -> bool:
        """Return whether this step is one of those that show diagnostics, which cost about as much as the penalty."""
        return weights.number % EVERY == 0

    def show(self, state: State, weights: Weights, **values: Tensor) -> None:
        """Log diagnostics, and beside them what was found out once."""
        for name, value in (*values.items(), *((k, v) for k, v in state.items() if k.startswith("overlap/"))):
            weights.log(name, value)


@dataclass(frozen=True, kw_only=True)
class LeadingMethod(FisherMethod):
    """A penalty that parts dW into dW_A, in the m leading directions of the Fisher, and the rest dW_T = dW - dW_A.

    Attributes:
        top: m is the least whose eigenvalues hold this share of the Fisher's trace; 0.9 as in re-implementations of
            the paper.
        most: m is at most this, in each layer.
    """

    top: float = 0.9
    most: int = 64

    def faults(self) -> Iterator[str]:
        yield from super().faults()
        yield from leading_faults(self.top, self.most, self.keep, self.kind)

    def parts(self, state: State, weights: Weights) -> list[tuple[str, Update, Part]]:
        """Return dW and dW_A of each layer and retain set; log which share of |dW|² the parts are."""
        updates = self.updates(state, weights)
        found = [
            (layer, update, fishers[layer].part(update, self.top, self.most))
            for fishers in self.fishers(state)
            for layer, update in updates.items()
        ]
        if self.shows(weights):
            with torch.no_grad():
                inside = torch.stack([part.coefficients.square().sum() for _, _, part in found]).sum()
                whole = torch.stack([squared_norm(update) for _, update, _ in found]).sum()
            self.show(state, weights, alignment_share=inside / whole.clamp(min=1e-30))
        return found


def leading_faults(top: float, most: int, keep: int, kind: Kind) -> Iterator[str]:
    """Yield what is wrong with the settings that choose leading directions."""
    if not 0 < top <= 1:
        yield f"top is a share of the Fisher's trace, in (0, 1], got {top}"
    if not isinstance(most, int) or not 1 <= most <= keep:
        yield f"most must be a whole number from 1 to keep={keep}: more eigenpairs are not known, got {most!r}"
    if kind == "diagonal":
        yield "leading directions of a diagonal Fisher are single weights, which split into nothing: use 'kronecker'"


def overlap(first: Mapping[str, LayerFisher], other: Mapping[str, LayerFisher]) -> Tensor:
    """Return the mean squared cosine of the principal angles between the leading directions, over layers: a scalar."""
    found = []
    for layer, fisher in first.items():
        against = other[layer]
        assert isinstance(fisher, Kronecker)  # faults() sees to it
        assert isinstance(against, Kronecker)
        found.append(principal_cosines(fisher, against, 0.9, 64).square().mean())
    return torch.stack(found).mean()
