"""How large the state of a method will be, to the byte, from the shapes of what is trained: what `explain()` shows.

It is what a checkpoint holds too. A method from elsewhere says for itself, about (`Method.state_bytes`).
Read next: `memory_methods`, what else a method needs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from ..analysis import memory_states as sizes
from ..core.layers import DenseUpdate, LowRankUpdate
from ..core.method import Method, OutputMethod
from ..core.retain import Retain
from ..core.selection import layer_updates, trainable
from ..core.types import FisherSpec, NamedTensors
from ..methods.gradient.agem import AGEM
from ..methods.gradient.orthogonal_projection import KINDS, OrthogonalProjection
from ..methods.gradient.pcgrad import PCGrad
from ..methods.gradient.reference_groups import _deal, _has
from ..methods.gradient.subspace_method import SubspaceMethod, block_sizes
from ..methods.weight.fisher_method import FisherMethod, UpdateMethod
from ..methods.weight.geodesic_separation import GeodesicSeparation
from ..methods.weight.l2_sp import L2SP
from ..methods.weight.orthogonal_lora import OrthogonalLoRA
from ..methods.weight.task_stability import TaskStability
from .memory_facts import Facts, shape_of

SCALAR = sizes.LONG  # of a state: a step number in int64, a loss or a cosine in float64


def state_size(method: Method, facts: Facts) -> int:
    """Return the bytes of a method's state after its first `init`."""
    params = selected(method, facts)
    count = numbers(params)
    if isinstance(method, SubspaceMethod):
        return _subspace(method, facts, params)
    if isinstance(method, PCGrad):
        rows = len(set_names(facts))
        return sizes.basis(rows, count) + SCALAR * (1 + rows) ** 2
    if isinstance(method, AGEM):
        return sizes.basis(1, count)
    if isinstance(method, L2SP):
        return sum(p.numel() * p.element_size() for p in params.values())
    if isinstance(method, UpdateMethod):
        return starts(method, facts) + _of_data(method, facts)
    return 0 if isinstance(method, OutputMethod) else method.state_bytes(count)


def selected(method: Method, facts: Facts) -> NamedTensors:
    """Return the trained parameters that a method acts on."""
    whole = facts.skeleton.trained
    return whole if method.select == ("*",) else dict(trainable(facts.skeleton.model, method.select))


def numbers(params: NamedTensors) -> int:
    """Return how many numbers parameters have."""
    return sum(p.numel() for p in params.values())


def set_names(facts: Facts, names: Iterable[str] = ()) -> list[str]:
    """Return the retain sets that a method reads; one is taken to be there where none is known yet."""
    return list(names) or list(facts.retain) or ["retain"]


# --- gradient methods ----------------------------------------------------------------------------------------------


def rank_of(method: SubspaceMethod, facts: Facts) -> tuple[int, int, int]:
    """Return how many directions a subspace has, of how many streams, from how many groups of rows."""
    if not isinstance(method, OrthogonalProjection):
        rank = int(getattr(method, "rank", 1))
        return rank, 0, rank
    drawn = list(Retain(facts.retain).draw(method.samples, True).values()) or [[]]
    if method.rolling is not None:
        drawn = [[batch for batches in drawn for batch in batches]]
    losses = KINDS[method.references]
    streams = [(each, loss) for each in drawn for loss in losses if len(losses) == 1 or _has(each, loss)]
    share = max(2, (method.rank or 0) // max(len(streams), 1))
    groups = sum(len(_deal(each, share)) if each else share for each, _ in streams)
    halves = method.rank is None or method.rank < 2 * len(streams)
    return (len(streams) if halves else groups), len(streams), groups


def _subspace(method: SubspaceMethod, facts: Facts, params: NamedTensors) -> int:
    rank, streams, _ = rank_of(method, facts)
    count, blocks = numbers(params), len(block_sizes(params, method.scope))
    size = sizes.basis(rank, count, method.bytes_each) + sizes.coordinates(rank, blocks) + SCALAR
    if isinstance(method, OrthogonalProjection):
        size += SCALAR * (streams + 1)  # losses, split-half cosine
        if method.rolling is not None:
            size += sizes.basis(rank, count) + sizes.coordinates(rank, blocks) + SCALAR
        size += sizes.basis(1, count) if method.leak else 0
        size += SCALAR * (streams + rank) if method.repair else 0
        size += SCALAR * (method.refresh_every == "auto")
    return size


# --- weight methods ------------------------------------------------------------------------------------------------


def layers_of(method: Method, facts: Facts) -> dict[str, tuple[int, int]]:
    """Return [out, in] of every layer whose update a method sees."""
    return {update.layer: shape_of(update) for update in _updates(method, facts)}


def _updates(method: Method, facts: Facts) -> list[LowRankUpdate | DenseUpdate]:
    if method.select == ("*",):
        return facts.skeleton.updates
    return layer_updates(facts.skeleton.model, selected(method, facts))


def starts(method: Method, facts: Facts) -> int:
    """Return the bytes of where layers started that are trained themselves."""
    whole = {each.name: each.weight for each in _updates(method, facts) if isinstance(each, DenseUpdate)}
    return sum(weight.numel() * weight.element_size() for weight in whole.values())


def fisher_sets(method: FisherMethod) -> list[tuple[str, ...]]:
    """Return the names of retain sets whose Fisher is in a method's state, by place; an empty tuple is all of them."""
    if not method._reads_data() or isinstance(method, OrthogonalLoRA):
        return []
    more: list[tuple[str, ...]] = []
    if isinstance(method, GeodesicSeparation) and method.form in ("fishers", "metric"):
        more = [method.against]
    elif isinstance(method, TaskStability) and method.metric == "task":
        more = [method.task]
    return [method.data, *more]


def _of_data(method: UpdateMethod, facts: Facts) -> int:
    if not isinstance(method, FisherMethod):
        return 0
    layers = layers_of(method, facts)
    size = SCALAR * len(method.compare)  # how far each agrees, in float64
    for names in fisher_sets(method):
        for name in set_names(facts, names):
            size += fisher_size(method.spec, layers, facts, name, rotated=method.rotated)
            size += 2 * sizes.LONG * len(layers) * (method.kind != "samples")  # which factors a layer has
    return size + (_earlier(method, layers, facts) if isinstance(method, OrthogonalLoRA) else 0)


def fisher_size(
    spec: FisherSpec, layers: Mapping[str, tuple[int, int]], facts: Facts, name: str, *, rotated: bool = False
) -> int:
    """Return the bytes of the Fisher of one retain set.

    Args:
        spec: how it is estimated.
        layers: [out, in] of each.
        facts: of the stage; it knows which layers share an input.
        name: of the set.
        rotated: with eigenvectors drawn anew, for each layer its own.
    """
    if spec.kind == "samples":
        there = sum(len(batch["input_ids"]) for batch in facts.retain.get(name, ()))
        return sizes.sample_gram(min(spec.rows, there or spec.rows), spec.keep, layers.values(), facts.wide)
    first = {layer: layer if rotated else facts.skeleton.inputs.get(layer, layer) for layer in layers}
    inputs = {first[layer]: into for layer, (_, into) in layers.items()}
    outputs = [out for out, _ in layers.values()]
    diagonal = spec.kind == "diagonal"
    return sizes.kronecker(outputs, inputs.values(), spec.keep, diagonal=diagonal, element=facts.wide)


def _earlier(method: OrthogonalLoRA, layers: Mapping[str, tuple[int, int]], facts: Facts) -> int:
    """Return the bytes of what earlier learning reads: rows of its A, or leading input directions of retain data."""
    if method.earlier is None:
        wanted = min(method.directions, method.keep) * len(set_names(facts, method.data))
        return facts.wide * sum(into * min(into, wanted) for _, into in layers.values())
    from safetensors import safe_open

    file, size = Path(method.earlier) / "adapter_model.safetensors", 0
    if file.is_file():
        with safe_open(str(file), "pt") as stored:
            for layer in layers:
                rank, into = stored.get_slice(f"{layer}.lora_A.weight").get_shape()
                size += 4 * into * (rank if method.as_published else min(rank, into))
    return size
