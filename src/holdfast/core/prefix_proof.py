"""Whether the lower layers of a model are the same for student and base, and hand on nothing but a hidden state.

What is asked of the layers 0 to k, where k is the first that is trained or holds an adapter:

- they are the backbone's one list of layers, and run once each and in order, each on the very tensor (not an equal one)
  that the one before returned: nothing happens in between, and nothing else goes from one to the next in sight;
- what enters k has no gradient path to anything that is trained, wherever that may hang: autograd is the witness; and
  no adapter hangs outside the layers, not even a frozen one, which says the same as the base until it is thawed;
- no dropout, jitter or noise below k, by the names of settings; what has another name shows in the first micro-batch.

What goes from layer to layer out of sight (keys and values that a later layer borrows, say) makes a pass that starts at
k fail or end elsewhere: `prefix` runs one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from .selection import adapter_layers, trainable
from .tap import Call

DRAWS = ("drop", "jitter", "noise")  # parts of the names of settings that make a training pass draw random numbers


def decoder_layers(backbone: nn.Module) -> Sequence[nn.Module]:
    """Return the layers of a backbone: of its lists of modules the one that holds the most parameters.

    >>> backbone = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]), "norm": nn.LayerNorm(2)})
    >>> decoder_layers(backbone)
    [Linear(in_features=2, out_features=2, bias=True), Linear(in_features=2, out_features=2, bias=True)]
    """
    lists = [module for module in backbone.modules() if isinstance(module, nn.ModuleList)]
    sizes = [sum(p.numel() for p in each.parameters()) for each in lists]
    return list(lists[sizes.index(max(sizes))]) if lists else []


def first_touched(backbone: nn.Module, layers: Sequence[nn.Module]) -> tuple[int, str]:
    """Return the number of the first layer that is trained or holds an adapter, and why nothing can be shared."""
    if len(layers) < 2 or len({id(layer) for layer in layers}) < len(layers):
        return 0, "its backbone has no list of layers, each another module"
    if any(getattr(module, "_compiled_call_impl", None) is not None for module in (backbone, *layers)):
        return 0, "its layers are compiled in place"
    touched = (any(p.requires_grad for p in layer.parameters()) or bool(adapter_layers(layer)) for layer in layers)
    first = next((number for number, yes in enumerate(touched) if yes), None)
    if first is None:
        return 0, "no layer is trained"
    if not first:
        return 0, "the first layer is trained"
    of_layers = {id(module) for layer in layers for module in layer.modules()}
    if outside := [module for module in adapter_layers(backbone) if id(module) not in of_layers]:
        names = {id(module): name for name, module in backbone.named_modules()}
        return first, f"{names[id(outside[0])]} has an adapter, and it is outside the layers"
    return first, ""


def drawing(backbone: nn.Module, above: Sequence[nn.Module]) -> str:
    """Say what may draw random numbers in a training pass of a backbone, these layers apart."""
    own = {id(module) for layer in above for module in layer.modules()}
    for name, module in backbone.named_modules():
        if id(module) in own:
            continue
        rates = {key: value for key, value in vars(module).items() if any(word in key for word in DRAWS)}
        if isinstance(module, nn.modules.dropout._DropoutNd):
            rates["p"] = module.p
        for key, rate in rates.items():
            if isinstance(rate, float) and rate > 0:
                return f"{f'{name}.{key}'.lstrip('.')} is {rate:g}, so below the first trained layer the student draws"
    return ""


def unchained(model: nn.Module, layers: Sequence[nn.Module], run: Callable[[], Call]) -> str:
    """Say why these layers are no chain from the embeddings to what enters the last of them, untouched by training.

    Args:
        model: the student.
        layers: 0 to k of it.
        run: makes a forward of the student, with gradients.
    """
    ran: list[tuple[int, Tensor | None]] = []
    ends: dict[int, object] = {}

    def begins(number: int, layer: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        ran.append((number, entering(args, kwargs)))

    def finished(number: int, layer: nn.Module, args: object, output: object) -> None:
        ends[number] = output

    hooks = [layer.register_forward_pre_hook(partial(begins, i), with_kwargs=True) for i, layer in enumerate(layers)]
    hooks += [layer.register_forward_hook(partial(finished, i)) for i, layer in enumerate(layers)]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    order = [number for number, _ in ran]
    if order != list(range(len(layers))):
        return f"its layers do not run once each and in order (but {order})"
    if any(entered is not ends[number - 1] for number, entered in ran[1:]):
        return "its layers do not get the very tensor that the one before returned"
    if (entered := ran[-1][1]) is not None and (name := reached(model, entered)) is not None:
        return f"{name} is trained, and it acts below layer {order[-1]}"
    return ""


def reached(model: nn.Module, entered: Tensor) -> str | None:
    """Return the name of a trained parameter that this tensor was computed from, as its gradient has it."""
    if not entered.requires_grad:
        return None
    names = trainable(model)
    gradients = torch.autograd.grad(entered.sum(), list(names.values()), allow_unused=True)
    return next((name for name, gradient in zip(names, gradients, strict=True) if gradient is not None), None)


def entering(args: Sequence[object], kwargs: Mapping[str, object]) -> Tensor | None:
    """Return the hidden state among a layer's arguments: the first of them, or the one of that name."""
    hidden = args[0] if args else kwargs.get("hidden_states")
    return hidden if isinstance(hidden, Tensor) else None


def given(hidden: Tensor, args: Sequence[object], kwargs: Mapping[str, object]) -> tuple[tuple[object, ...], object]:
    """Return a layer's arguments with this hidden state in the place of theirs.

    >>> given(torch.tensor(1.0), (), {"hidden_states": None, "use_cache": False})
    ((), {'hidden_states': tensor(1.), 'use_cache': False})
    """
    return ((hidden, *args[1:]), dict(kwargs)) if args else ((), {**kwargs, "hidden_states": hidden})


def apart(ours: Tensor, theirs: Tensor) -> float:
    """Return how far apart two tensors are where they are most, |a - b| / |b| over the last axis; 0 where equal.

    By position, for one that is a hundred times as large as others (a first token's hidden state often is) would hide
    in one norm what happens to them. One that is smaller than most is measured by what most have.

    >>> two = torch.tensor([[2.0], [2.0], [200.0]])
    >>> apart(two, two), apart(two + torch.tensor([[1.0], [0.0], [0.0]]), two), apart(two[:1], two)
    (0.0, 0.5, inf)
    """
    if ours.shape != theirs.shape:
        return math.inf
    if torch.equal(ours, theirs):
        return 0.0
    precise = torch.promote_types(theirs.dtype, torch.float32)
    sizes = theirs.to(precise).norm(dim=-1)
    gaps = (ours.to(precise) - theirs.to(precise)).norm(dim=-1)
    return float((gaps / sizes.clamp(min=sizes.median()).clamp(min=1e-30)).amax())


def tolerance(call: Call) -> float:
    """Return how far apart two passes may be that did the same sums: a few roundings of the precision they ran in."""
    _, dtype, autocast = call.autocast
    return min(16 * torch.finfo(dtype if autocast else call.hidden.dtype).eps, 1e-2)
