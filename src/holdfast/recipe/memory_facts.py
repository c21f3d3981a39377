"""What of a stage the arithmetic of memory reads: shapes from the skeleton of its model, numbers from its settings.

Read next: `memory`, which makes bytes of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch

from ..analysis import memory
from ..analysis.memory import Decoder
from ..core.layers import DenseUpdate, LowRankUpdate
from ..core.types import Batch
from .config import Recipe, Stage
from .skeleton import Skeleton
from .training import CHECKPOINTING, training_arguments

Base = Literal["none", "off", "copy", "other"]
LENGTH = 1024  # of a sequence, where neither the recipe nor the model says one


@dataclass(frozen=True)
class Facts:
    """What of a stage the arithmetic reads.

    Attributes:
        skeleton: of the model.
        batch: sequences of a micro-batch (of DPO, two for each pair).
        length: tokens of each.
        accumulation: micro-batches of a step.
        autocast: bytes of a number under the host's autocast; 0: there is none.
        checkpointing: whether activations are computed twice instead of kept.
        on_cpu: whether there is no accelerator.
        optimizer: as transformers names it.
        reference: where the base's side comes from.
        retain: batches of the retain sets, by name, as the host makes them.
        again: how often the base is loaded beside the student: for DPO, or to measure drift.
        own_copy: whether DPO keeps a copy of the adapter.
        kept: bytes of a number in the cache of the base on the task; 0: there is none.
        rows: of the task, where that is known.
    """

    skeleton: Skeleton
    batch: int
    length: int
    accumulation: int = 1
    autocast: int = 0
    checkpointing: bool = False
    on_cpu: bool = False
    optimizer: str = "adamw_torch"
    reference: Base = "none"
    retain: Mapping[str, Sequence[Batch]] = field(default_factory=dict)
    again: int = 0
    own_copy: bool = False
    kept: int = 0
    rows: int = 0

    @cached_property
    def decoder(self) -> Decoder:
        """Sizes of the model."""
        return self.skeleton.decoder()

    @cached_property
    def trained(self) -> dict[str, Any]:
        """What is trained, by name."""
        return self.skeleton.trained

    @property
    def tokens(self) -> int:
        """Of a micro-batch, padding included."""
        return self.batch * self.length

    @property
    def trained_bytes(self) -> int:
        """Of all that is trained."""
        return sum(p.numel() * p.element_size() for p in self.trained.values())

    @cached_property
    def weight(self) -> int:
        """Bytes of a number of the base's weights, and so of its hidden states."""
        return int(next(self.skeleton.model.parameters()).element_size())

    @property
    def element(self) -> int:
        """Bytes of an activation."""
        return self.autocast or self.weight

    @property
    def wide(self) -> int:
        """Bytes of a number in sums: 4, or 8 in a model of float64."""
        return max(self.weight, memory.WIDE)


def facts_of(
    recipe: Recipe,
    stage: Stage,
    skeleton: Skeleton,
    *,
    batch: int | None = None,
    length: int | None = None,
    on_cpu: bool | None = None,
    **more: Any,
) -> Facts:
    """Return the facts of a stage.

    Args:
        recipe: whose stage it is.
        stage: of the recipe.
        skeleton: of its model.
        batch: sequences of a micro-batch; None: as the stage says.
        length: tokens of a sequence; None: the stage's `max_length`, or what the model takes at most.
        on_cpu: whether there is no accelerator; None: as here.
        more: further fields of `Facts`.
    """
    options = training_arguments(stage.trainer, stage.options, recipe.output / "unused", recipe.seed)
    on_cpu = not torch.cuda.is_available() if on_cpu is None else on_cpu
    longest = getattr(skeleton.config, "max_position_embeddings", None)
    asked = length or options.max_length or longest or LENGTH
    dpo = stage.trainer == "dpo"
    dense = not recipe.model.peft_type
    autocast, checkpointing = _precision(stage.options, options, on_cpu)
    return Facts(
        skeleton,
        batch=(batch or options.per_device_train_batch_size) * (2 if dpo else 1),
        length=min(asked, longest or asked) if length is None else length,
        accumulation=options.gradient_accumulation_steps,
        autocast=autocast,
        checkpointing=checkpointing,
        on_cpu=on_cpu,
        optimizer=str(getattr(options.optim, "value", options.optim)),
        again=(dpo and dense) + (recipe.drift is not None and dense),
        own_copy=dpo and not dense and stage is not recipe.stages[0],
        kept=_kept(recipe.cache),
        **more,
    )


def _precision(given: Mapping[str, Any], options: Any, on_cpu: bool) -> tuple[int, bool]:
    """Return bytes under autocast, and whether activations are computed twice; of another machine by TRL's defaults."""
    if on_cpu or torch.cuda.is_available():
        half, twice = options.bf16 or options.fp16, any(getattr(options, name, False) for name in CHECKPOINTING)
    else:
        half = given.get("bf16", True) or given.get("fp16", False)
        asked = [given[name] for name in CHECKPOINTING if name in given]
        twice = any(asked) if asked else True
    return (2 if half else 0), bool(twice)


def _kept(cache: object) -> int:
    """Return bytes of a number in the cache that a recipe asks for."""
    if cache is False:
        return 0
    return 2 if isinstance(cache, Mapping) and cache.get("dtype") == "float16" else memory.WIDE


def shape_of(update: LowRankUpdate | DenseUpdate) -> tuple[int, int]:
    """Return [out, in] of an update."""
    if isinstance(update, LowRankUpdate):
        return update.b.shape[0], update.a.shape[1]
    out, into = update.weight.shape[::-1] if update.transposed else update.weight.shape
    return out, into
