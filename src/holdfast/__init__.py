"""holdfast: fine-tune language models with LoRA without losing what they knew or how they were aligned.

    holdfast.attach(trainer, [holdfast.methods.TargetMaskedKL()])        # a TRL or transformers trainer
    with holdfast.preserve(model, optimizer, [...]) as session: ...      # a loop of your own

Importing this costs torch alone; transformers, TRL and PEFT load when a host is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from . import methods as methods
    from .core.session import Session as Session
    from .integrations.hf_trainer import PreservingMixin as PreservingMixin
    from .integrations.hf_trainer import attach as attach
    from .integrations.hf_trainer import detach as detach
    from .integrations.plain_loop import preserve as preserve
    from .recipe.watch import watch as watch

_WHERE = {
    "attach": "integrations.hf_trainer",
    "detach": "integrations.hf_trainer",
    "PreservingMixin": "integrations.hf_trainer",
    "preserve": "integrations.plain_loop",
    "Session": "core.session",
    "watch": "recipe.watch",
}
__all__ = ["PreservingMixin", "Session", "attach", "detach", "methods", "preserve", "watch"]


def __getattr__(name: str) -> Any:
    if name == "methods":
        return import_module(f"{__name__}.methods")
    if name not in _WHERE:
        raise AttributeError(f"holdfast has no {name!r}; it has {', '.join(__all__)}.")
    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
