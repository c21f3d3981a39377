"""Reads the final hidden states in the host's own forward, and knows how the head makes logits of them.

TRL's trainers build no logits, so every output loss works on (hidden, head) pairs. The tap hooks the backbone, keeps
the last hidden state while gradients are on, and remembers how the backbone was called, so that the reference can be
called with the very same ids, masks and positions. At attach `check` proves head(hidden) == logits, or refuses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ..functional.head import Head
from .errors import NotYetSupported, WrongSetup
from .module_tree import ModuleTree
from .selection import unwrap

if TYPE_CHECKING:
    from .prefix import SharedPrefix


@dataclass(frozen=True)
class Call:
    """One forward of the backbone: what went in, what came out, and under which autocast.

    Where student and base share frozen lower layers, `entered` is what came out of those (see `prefix`).
    """

    hidden: Tensor  # [B, T, H]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    autocast: tuple[str, torch.dtype, bool]
    entered: Tensor | None = None  # [B, T, H]

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any, entered: Tensor | None = None) -> Call:
        """Note a call of the backbone that has just returned `output`."""
        hidden = last_hidden_state(output)
        device = hidden.device.type
        if getattr(output, "past_key_values", False) is None:
            # the host ran without a cache (checkpointing turns it off); transformers tells packed documents apart
            # only then, so a repetition in evaluation mode must not turn it on again
            kwargs = {**kwargs, "use_cache": False}
        autocast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        return cls(hidden, args, kwargs, autocast, entered)

    def autocasting(self) -> torch.autocast:
        """Return the context that repeats the call's precision (the host may autocast only its own forward)."""
        device, dtype, enabled = self.autocast
        return torch.autocast(device, dtype=dtype, enabled=enabled)


def last_hidden_state(output: Any) -> Tensor:
    """Return the last hidden state from whatever a backbone returns: an object, a tuple, or the tensor itself."""
    hidden = getattr(output, "last_hidden_state", None)
    if hidden is None:
        hidden = output if isinstance(output, Tensor) else output[0]
    return cast(Tensor, hidden)


def language_model(model: nn.Module) -> nn.Module:
    """Return the causal language model inside wrappers and adapters."""
    inner = unwrap(model)
    peel: Callable[[], nn.Module] | None = getattr(inner, "get_base_model", None)
    return peel() if peel is not None else inner


def _read_scale_and_cap(config: Any) -> tuple[float, float | None]:
    """Read how a configuration says that logits are scaled and capped; `check` verifies the reading."""
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    cap = getattr(config, "final_logit_softcapping", None)
    for field in ("logit_scale", "output_multiplier", "lm_head_multiplier"):  # Cohere, Muse, Falcon-H1
        if isinstance(value := getattr(config, field, None), int | float):
            return float(value), cap
    scaling = getattr(config, "logits_scaling", None)  # Granite divides by it, HyperCLOVA X multiplies
    if isinstance(scaling, int | float):
        return float(scaling if getattr(config, "model_type", "") == "hyperclovax" else 1 / scaling), cap
    return 1.0, cap


class Tap:
    """Hooks the backbone of a causal language model.

    Args:
        model: a transformers causal language model, plain or in PEFT or DDP; or any module for which `backbone` and
            `head` are named.
        backbone: name of the submodule whose output is the last hidden state (a tensor, a tuple that starts with it,
            or an object with `last_hidden_state`).
        head: name of the linear submodule that makes logits of it.

    Attributes:
        tree: the model's modules, found once.
        prefix: the frozen lower layers that student and base share, if a session has looked for them.

    Raises:
        WrongSetup: if backbone or head cannot be found.
        NotYetSupported: if the head is not a plain linear map (an adapter sits on it, say).
    """

    def __init__(self, model: nn.Module, backbone: str | None = None, head: str | None = None) -> None:
        self.model = unwrap(model)
        self.language_model = language_model(model)
        self._head_name = head
        found = self._submodule(backbone) if backbone else getattr(self.language_model, "base_model", None)
        if found is None or found is self.language_model:
            raise WrongSetup(
                f"Cannot find the backbone of {type(self.language_model).__name__}: it has no `base_model`. "
                "Name the submodule that returns the last hidden state: backbone='...', and the head: head='...'."
            )
        self.backbone: nn.Module = found
        self.scale, self.soft_cap = _read_scale_and_cap(getattr(self.language_model, "config", None))
        self.head()  # refuses a head that is not linear
        covered = {id(p) for part in (found, self.head_module()) for p in part.parameters()}
        if lost := [n for n, p in self.model.named_parameters() if p.requires_grad and id(p) not in covered]:
            raise WrongSetup(
                f"{lost[0]} is trained but lies outside the backbone and the head, so the reference, which repeats the "
                "call of the backbone, would see its trained value. Name a backbone that holds every trained layer."
            )
        self.tree = ModuleTree(self.model)
        self.prefix: SharedPrefix | None = None
        self._calls: list[Call] = []
        self._hook = self.backbone.register_forward_hook(self._note, with_kwargs=True)

    def _note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if torch.is_grad_enabled():  # else a reference, an evaluation or a generation, not the student's forward
            self._calls.append(Call.of(args, kwargs, output, self._entered()))

    def _entered(self) -> Tensor | None:
        return self.prefix.taken() if self.prefix is not None else None

    def take(self) -> Call:
        """Return the student's forward of this micro-batch and forget it.

        Raises:
            WrongSetup: if the student did not run, ran more than once, or its hidden states carry no gradient.
        """
        calls, self._calls = self._calls, []
        if len(calls) != 1:
            why = "did not run with gradients on" if not calls else f"ran {len(calls)} times"
            raise WrongSetup(
                f"The model {why} since the last session.loss(...). For every micro-batch call the model once, then "
                "session.loss(batch); wrap evaluation in torch.no_grad()."
            )
        if not calls[0].hidden.requires_grad and not self.head().weight.requires_grad:
            raise WrongSetup(
                "The student's hidden states carry no gradient and its head is frozen, so the added loss would do "
                "nothing. With reentrant gradient checkpointing call model.enable_input_require_grads(), or "
                "use_reentrant=False."
            )
        return calls[0]

    def forget(self) -> None:
        """Drop what was noted (a forward whose loss the session will not join)."""
        self._calls.clear()

    def head_module(self) -> nn.Module:
        """Return the head as the model holds it now: a linear map, or PEFT's wrapper around two of them."""
        if self._head_name is not None:
            return self._submodule(self._head_name)
        find = getattr(self.language_model, "get_output_embeddings", None)
        module: nn.Module | None = find() if find is not None else None
        if module is None:
            raise WrongSetup(f"Cannot find the head of {type(self.language_model).__name__}: name it, head='...'.")
        return module

    def _submodule(self, name: str) -> nn.Module:
        try:
            return self.language_model.get_submodule(name)
        except AttributeError:
            raise WrongSetup(f"{type(self.language_model).__name__} has no submodule {name!r}.") from None

    def head(self, *, original: bool = False) -> Head:
        """Return the student's head, or with `original` the one that was there before PEFT's `modules_to_save`."""
        module = self.head_module()
        if hasattr(module, "original_module"):
            active = module.active_adapters[0]  # type: ignore[index]
            module = module.original_module if original else module.modules_to_save[active]  # type: ignore[assignment, index]
        if type(module) is not nn.Linear:
            raise NotYetSupported(
                f"The head is a {type(module).__name__}, not a plain linear map: an output loss cannot read its "
                "weight. Leave the head out of target_modules, or train a copy: modules_to_save=['lm_head']."
            )
        return Head(module.weight, module.bias, scale=self.scale, soft_cap=self.soft_cap)

    def inputs(self, batch: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return what the backbone needs of a batch of the session's own (retain data)."""
        inputs: dict[str, Any] = {k: batch[k] for k in ("input_ids", "attention_mask", "position_ids") if k in batch}
        return inputs | ({"use_cache": False} if hasattr(self.backbone, "config") else {})

    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
        """Call the backbone in whatever state it is and return the call; the hook takes no note."""
        before = list(self._calls)
        output = self.backbone(*args, **kwargs)
        noted, self._calls = self._calls[len(before) :], before
        return noted[0] if noted else Call.of(args, kwargs, output)

    def sharing(self, call: Call) -> AbstractContextManager[None]:
        """Return the context of a base's pass on a call: it starts above the layers that student and base share."""
        return self.prefix.sharing(call) if self.prefix is not None else nullcontext()

    def check(self, batch: Mapping[str, Tensor]) -> None:
        """Prove on a real forward that head(hidden) gives the model's own logits.

        Raises:
            NotYetSupported: if it does not; the message gives the difference and the scale and cap in use.
        """
        kept: list[Call] = []
        hook = self.backbone.register_forward_hook(
            lambda module, args, kwargs, output: kept.append(Call.of(args, kwargs, output)), with_kwargs=True
        )
        try:
            with torch.no_grad(), evaluation(self.model):
                output = self.language_model(**batch)
        finally:
            hook.remove()
        logits = getattr(output, "logits", output)
        ours = self.head().logits(kept[-1].hidden)
        size = logits.float().abs().max().item()
        gap = (logits.float() - ours.float()).abs().max().item()
        tolerance = (1e-4 if logits.dtype in (torch.float32, torch.float64) else 2e-2) * max(size, 1e-3)
        if not gap <= tolerance:
            raise NotYetSupported(
                f"head(hidden) is not the logits of {type(self.language_model).__name__}: they differ by {gap:.2g} "
                f"(logits up to {size:.2g}; scale {self.scale}, soft-cap {self.soft_cap}). The model does something "
                "between its backbone and its logits that holdfast does not know, so an output loss would be wrong. "
                "Weight and gradient methods still work."
            )

    def remove(self) -> None:
        """Take the hook off the model."""
        self._hook.remove()
        if self.prefix is not None:
            self.prefix.close()
        self.forget()


class evaluation:
    """Context: the whole model in evaluation mode (dropout off); afterwards every module is as it was."""

    def __init__(self, *models: nn.Module | ModuleTree) -> None:
        self._training = [module for model in models for module in model.modules() if module.training]

    def __enter__(self) -> None:
        _set_training(self._training, on=False)

    def __exit__(self, *_: object) -> None:
        _set_training(self._training, on=True)


def _set_training(modules: list[nn.Module], *, on: bool) -> None:
    for module in modules:
        if "training" in (own := vars(module)):
            own["training"] = on  # what module.training = on does in the end, after a search that costs more
        else:
            module.training = on
