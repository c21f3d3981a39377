"""Where the frozen base comes from: the model with its adapter off, or a frozen copy of where it started.

A wrong reference is the worst silent bug of this field, so the choice is explicit (`base`, `start` or a path), the
logits of the reference are compared with the model's own at attach, and whatever cannot be proved is refused.
The reference always runs without gradient, in evaluation mode, on the very arguments of the student's forward, and
where student and base have frozen lower layers in common, from the first touched layer on. Read next: `prefix`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from ..functional.divergence import Divergence
from ..functional.head import Head
from .errors import WrongSetup
from .selection import base_weights, thawed, trainable, unwrap
from .tap import Call, Tap, evaluation, language_model
from .types import NamedTensors


class Reference(ABC):
    """The frozen base as run in training.

    Attributes:
        description: in a line, as `explain()` shows it.
        is_of_student: whether it is made of the student's own model, so that they may share frozen lower layers.
    """

    description: ClassVar[str]
    is_of_student: ClassVar[bool] = False

    @abstractmethod
    def hidden(self, tap: Tap, call: Call) -> Tensor:
        """Return the reference's last hidden states [B, T, H] for the student's forward `call`."""

    @abstractmethod
    def head(self, tap: Tap) -> Head:
        """Return the head that makes the reference's logits."""

    def state(self) -> NamedTensors:
        """Return what a checkpoint must hold for a resumed run to have the same reference."""
        return {}

    def load(self, state: NamedTensors) -> None:
        """Restore what `state` returned."""


class AdapterOff(Reference):
    """The model with its adapters switched off: no memory at all, right only if the base weights are untouched.

    Args:
        off: makes the context in which adapters are off.
    """

    description = "the base model: adapter switched off"
    is_of_student = True

    def __init__(self, off: Callable[[], AbstractContextManager[object]]) -> None:
        self._off = off

    def hidden(self, tap: Tap, call: Call) -> Tensor:
        if name := thawed(tap.tree.find(weights_of_base)):
            raise WrongSetup(
                f"{name} is trained, and it is the base's own: with the adapter off the reference would move along "
                "with it. Freeze it, train a copy (modules_to_save), or have it trained before holdfast is attached, "
                "which then keeps a copy of it."
            )
        with tap.sharing(call), torch.no_grad(), evaluation(tap.tree), call.autocasting(), self._off():
            return tap.run(call.args, call.kwargs).hidden

    def head(self, tap: Tap) -> Head:
        return tap.head(original=True)


class FrozenCopy(Reference):
    """A frozen copy of the trainable parameters as they were: memory of their size, right for any initialisation.

    Args:
        model: copied now, so make this before the first step.
    """

    description = "a frozen copy of the trainable weights at the start"
    is_of_student = True

    def __init__(self, model: nn.Module) -> None:
        self._copy = {name: p.detach().clone() for name, p in trainable(model).items()}

    def hidden(self, tap: Tap, call: Call) -> Tensor:
        if name := thawed(tap.tree.find(self._not_copied)):
            raise WrongSetup(
                f"{name} is trained, and it was frozen, or not there, when the reference was copied, so the reference "
                "would move along with it. Freeze it, or have it trained before holdfast is attached."
            )
        places = tap.tree.find(self._places)
        with tap.sharing(call), torch.no_grad(), evaluation(tap.tree), call.autocasting(), _put(places):
            return tap.run(call.args, call.kwargs).hidden

    def head(self, tap: Tap) -> Head:
        head, copies = tap.head(), {id(own[key]): copy for own, key, copy in tap.tree.find(self._places)}
        weight = copies.get(id(head.weight), head.weight.detach())
        bias = None if head.bias is None else copies.get(id(head.bias), head.bias.detach())
        return Head(weight, bias, scale=head.scale, soft_cap=head.soft_cap)

    def _places(self, model: nn.Module) -> list[_Place]:
        """Return where in the model the weights are that were copied; one may hang in several places."""
        copies = {id(p): self._copy[name] for name, p in model.named_parameters() if name in self._copy}
        tables = [module._parameters for module in model.modules()]
        return [(own, key, copies[id(p)]) for own in tables for key, p in own.items() if id(p) in copies]

    def _not_copied(self, model: nn.Module) -> list[tuple[str, Tensor]]:
        """Return all other parameters: the base's, and of adapters, which stay on here and so are part of it."""
        return [(name, p) for name, p in model.named_parameters() if name not in self._copy]

    def state(self) -> NamedTensors:
        return dict(self._copy)

    def load(self, state: NamedTensors) -> None:
        for name, tensor in self._copy.items():
            tensor.copy_(state[name])


_Place = tuple[dict[str, nn.Parameter | None], str, Tensor]


@contextmanager
def _put(places: Sequence[_Place]) -> Iterator[None]:
    """Put copies into a model's tables in place of the weights there, and those back afterwards."""
    before = [own[key] for own, key, _ in places]
    for own, key, copy in places:
        own[key] = copy  # type: ignore[assignment] # a plain tensor does in a forward
    try:
        yield
    finally:
        for (own, key, _), weight in zip(places, before, strict=True):
            own[key] = weight


def weights_of_base(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Return the weights that are the base model's own, by name: parameters that no adapter brought along."""
    return [(n, weight) for n, weight in base_weights(language_model(model)) if isinstance(weight, nn.Parameter)]


class OtherModel(Reference):
    """A second, frozen model: the memory of a whole model, for a base that the student cannot be turned back into.

    Args:
        model: run as it is; it must share the student's tokenizer.
    """

    description = "another frozen model"

    def __init__(self, model: nn.Module) -> None:
        self.model = unwrap(model).requires_grad_(False).eval()
        self._tap = Tap(self.model)

    def hidden(self, tap: Tap, call: Call) -> Tensor:
        with torch.no_grad(), call.autocasting():
            return self._tap.run(call.args, call.kwargs).hidden

    def head(self, tap: Tap) -> Head:
        return self._tap.head()


class KeptBase(Protocol):
    """What is kept of the base on the sequences of a pool; a number is a sequence's place in it."""

    @property
    def whole(self) -> bool:
        """Whether hidden states are kept, which give any divergence; else only the sums of one are to be had."""

    def hidden(self, numbers: Sequence[int], device: torch.device) -> Tensor:
        """Return the base's hidden states, of rows padded on the right, [B, T, H]; if `whole`."""

    def total(self, hidden: Tensor, head: Head, numbers: Sequence[int], mask: Tensor, chunk_rows: int | None) -> Tensor:
        """Return the divergence of a student from the base, summed over the positions of `mask` [B, T-1]."""

    def describe(self) -> str:
        """Say what is kept, and where."""


Keep = Callable[[Tap, Reference, Sequence[Tensor], Divergence | None], KeptBase | None]
"""Keeps of the base on these sequences what gives this divergence, or any for None; None if it does not pay."""


def logits_of(reference: Reference | None, tap: Tap, batch: dict[str, Tensor]) -> Tensor:
    """Return the reference's logits on a batch (the student's own for None), [B, T, V], in evaluation mode."""
    with torch.no_grad(), evaluation(tap.model):
        call = tap.run((), batch)
    if reference is None:
        return tap.head().logits(call.hidden)
    return reference.head(tap).logits(reference.hidden(tap, call))


def probe_batch(model: nn.Module, length: int = 12, padding: int = 0) -> dict[str, Tensor]:
    """Return two short rows of token ids spread over the vocabulary, the same on every call; the second is padded."""
    inner = language_model(model)
    embeddings = inner.get_input_embeddings()  # type: ignore[operator]
    size, device = embeddings.weight.shape[0], embeddings.weight.device
    ids = (torch.arange(2 * length, device=device).view(2, length) * 7919 + 13) % size
    mask = torch.ones_like(ids)
    mask[1, length - padding :] = 0
    return {"input_ids": ids, "attention_mask": mask}
