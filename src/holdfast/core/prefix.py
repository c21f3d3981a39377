"""The frozen lower layers of a model run once, for student and base: the base's pass starts at the first touched layer.

    student   embeddings → layer 0 → ... → layer k-1 → h_k → layer k (trained) → ... → hidden
    base                                       └─ the same h_k → layer k (adapter off) → ... → hidden

With LoRA on the upper half of the layers a base's pass costs half. h_k is noted in the student's own forward; in the
base's pass the layers below k compute nothing, and layer k is given it by the very hook that noted it: so whatever
else is hooked on acts as often on the base as in a whole pass. All else (masks, positions, the layers from k
on) runs as it always does, on the same arguments. It is done only where it is proved:

- at the start, on a small batch: see `prefix_proof`; and a pass that starts at k ends where the whole one does;
- in the first micro-batch, which runs the base whole: h_k of the student in its training mode is h_k of the base;
- in every pass: no module was added or replaced, else all is proved anew. (Weights that are thawed are refused by the
  reference itself.)

Where a proof fails the base runs whole, as without this, and `explain()` says why. Read next: `prefix_proof`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .errors import HoldfastError
from .prefix_proof import apart, decoder_layers, drawing, entering, first_touched, given, tolerance, unchained
from .tap import Call, Tap, evaluation

if TYPE_CHECKING:
    from .reference import Reference


class SharedPrefix:
    """What student and base have in common, below the first layer that is trained or holds an adapter.

    Args:
        tap: the student's.
        reference: the base, made of the student's own model.
        batch: a small one to prove the sharing on.

    Attributes:
        first: the number of the first touched layer.
        why_not: why the base runs whole; empty where it does not.
    """

    def __init__(self, tap: Tap, reference: Reference, batch: Mapping[str, Tensor]) -> None:
        self._tap, self._reference, self._batch = tap, reference, batch
        self._hooks: list[Any] = []
        tap.prefix = self  # the proof runs student and base, which ask the tap for it
        self._find()

    def _find(self) -> None:
        """Find the layers and prove that they can be shared, or say why not."""
        self.close()
        self._entered: Tensor | None = None
        self._handed: Tensor | None = None
        self._seen: list[Tensor | None] | None = None
        self._proved: set[bool] = set()  # in which modes of the student: training or not
        self._walks, backbone = self._tap.tree.look(), self._tap.backbone
        self._layers = decoder_layers(backbone)
        self.first, self.why_not = first_touched(backbone, self._layers)
        self.why_not = self.why_not or drawing(backbone, self._layers[self.first :])
        if self.why_not:
            return
        self._hooks = [
            backbone.register_forward_pre_hook(self._forget),
            self._layers[self.first].register_forward_pre_hook(self._at_first, with_kwargs=True),
        ]
        try:
            with evaluation(self._tap.tree):
                self.why_not = self._unproved()
        except HoldfastError:
            raise
        except Exception as error:  # any model's own code: what it needs of a skipped layer is for it to say
            self.why_not = f"a pass that starts at layer {self.first} fails ({type(error).__name__}: {error})"
        if self.why_not:
            self.close()

    def _unproved(self) -> str:
        """Say what keeps the lower layers from being shared; nothing where a small batch proves that they can be."""
        inputs = self._tap.inputs(self._batch)
        with torch.enable_grad():
            if why := unchained(self._tap.model, self._layers[: self.first + 1], lambda: self._tap.run((), inputs)):
                return why
            call = self._tap.run((), inputs)
        if call.entered is None:
            return "the hidden state that enters a layer is not to be seen"
        whole = self._reference.hidden(self._tap, call)  # this compares what enters, and the next one skips
        if self.why_not:
            return self.why_not
        if apart(self._reference.hidden(self._tap, call), whole) > tolerance(call):
            return f"a pass that starts at layer {self.first} does not end where the whole one ends"
        return ""

    def describe(self) -> str:
        """Return what is shared, or why nothing is, as `explain()` shows it."""
        if self.why_not:
            return f"it runs whole: {self.why_not}"
        return f"layers 0 to {self.first - 1} of {len(self._layers)} are frozen and run once, for student and base"

    def close(self) -> None:
        """Take the hooks off the model."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    # --- the student's forward ------------------------------------------------------------------------------------

    def _forget(self, *_: object) -> None:
        self._entered = None

    def _at_first(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What enters the first touched layer: noted, or in the base's pass put there, in one place among all hooks."""
        if self._handed is not None:
            return given(self._handed, args, kwargs)
        if self._seen is not None:
            self._seen.append(entering(args, kwargs))
        elif torch.is_grad_enabled():  # else it is no forward of the student's
            self._entered = entering(args, kwargs)
        return None

    def taken(self) -> Tensor | None:
        """Return what entered the first touched layer in the forward that has just run, and forget it."""
        entered, self._entered = self._entered, None
        return None if entered is None else entered.detach()

    # --- the base's pass ------------------------------------------------------------------------------------------

    def sharing(self, call: Call) -> AbstractContextManager[None]:
        """Return the context of a base's pass on a call of the student's: it starts at the first touched layer.

        Call it while the model is still in the student's mode.
        """
        if self._walks != self._tap.tree.look():
            self._find()  # what this call noted is of the layers as they were
            return nullcontext()
        if self.why_not or call.entered is None:
            return nullcontext()
        training = self._layers[0].training
        return self._handing_on(call.entered) if training in self._proved else self._proving(call, training)

    @contextmanager
    def _handing_on(self, entered: Tensor) -> Iterator[None]:
        """Let the first touched layer be entered by this, and the layers below it compute nothing."""
        below = [vars(layer) for layer in self._layers[: self.first]]
        before = [own.get("forward") for own in below]  # accelerate's hooks put one there
        for own in below:
            own["forward"] = lambda *args, **kwargs: entered  # of the right shape for whatever is hooked on
        self._handed = entered
        try:
            yield
        finally:
            self._handed = None
            for own, forward in zip(below, before, strict=True):
                if forward is None:
                    del own["forward"]
                else:
                    own["forward"] = forward

    @contextmanager
    def _proving(self, call: Call, training: bool) -> Iterator[None]:
        """Let the base run whole, and see whether the same enters the first touched layer as in the student."""
        seen = self._seen = []
        try:
            yield
        finally:
            self._seen = None
        of_student, of_base = call.entered, seen[-1] if len(seen) == 1 else None
        gap = apart(of_student, of_base) if of_student is not None and of_base is not None else math.inf
        if gap <= tolerance(call):
            self._proved.add(training)
            return
        self.why_not = (
            f"what enters layer {self.first} in the student's forward is not what enters it in the base's (they differ "
            f"by {gap:.1g} of its size), so something below draws random numbers, or changes with the mode"
        )
        self.close()
        warnings.warn(f"The base runs whole from here on, at its full cost: {self.why_not}.", stacklevel=2)
