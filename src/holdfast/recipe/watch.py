"""Drift while a model is trained: `holdfast.watch(trainer)` measures it every so many steps, and can stop the training.

    holdfast.watch(trainer, every=100, gate="gate.yaml", when_exceeded="stop")
    trainer.train()

Read next: `watch_callback`, which measures; `watch_settings`, what is measured; docs/watch.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ..analysis.budgets import Gate
from ..core.errors import ConfigError, NotYetSupported, WrongSetup
from ..core.selection import unwrap
from ..drift.probe import Probe
from .watch_settings import BOTH_PUT_BACK, Watching, WhenExceeded
from .watch_sides import refuse_lost_base, shares_weights, tokenizer_of

if TYPE_CHECKING:
    from .watch_callback import DriftCallback

__all__ = ["watch"]


def watch(
    trainer: Any,
    suite: str | Path | Sequence[Probe] = "",
    *,
    every: int = 100,
    gate: Gate | str | Path | None = None,
    when_exceeded: WhenExceeded = "log",
    ledger: str | Path | None = None,
    base: nn.Module | None = None,
    batch_size: int = 16,
    limit: int | None = None,
    max_new_tokens: int = 32,
) -> DriftCallback:
    """Measure drift while a trainer trains; call it before `trainer.train()`.

    Args:
        trainer: a transformers `Trainer`, a TRL `SFTTrainer` or `DPOTrainer`, or a subclass.
        suite: as for `holdfast drift --suite`, its validation split: `lab`, `core` or a file of prompts (empty: `lab`
            for the lab's models, else `core`); or probes.
        every: optimizer steps between two looks; the base is measured before the first step, and the end in any case.
        gate: budgets, or their file. Its level is that of each look (docs/watch.md).
        when_exceeded: `log` warns; `stop` ends the training after a checkpoint; `keep_best` goes on, and at the end
            puts back the trained weights of the last look that was within budget.
        ledger: `ledger.jsonl` in the trainer's output folder if None.
        base: the model before tuning, frozen, where the model in training cannot be switched back to it. It is moved to
            the trainer's device.
        batch_size: answers written at a time; scores do not depend on it.
        limit: pairs of the suite, or items of each of the lab's skills; all of them if None.
        max_new_tokens: where answers to a suite's prompts are cut off.

    Returns:
        The callback, which the trainer has already; its `looks` are what was found.

    Raises:
        ConfigError: lists everything that is wrong with the arguments.
        WrongSetup: if the base cannot be had from this model.
        NotYetSupported: for sharded models (FSDP, DeepSpeed, tensor parallelism).
    """
    from transformers import Trainer

    from .watch_callback import DriftCallback

    if not isinstance(trainer, Trainer):
        raise WrongSetup(
            f"holdfast.watch needs a trainer of transformers or TRL, got a {type(trainer).__name__}. In a loop of your "
            "own, call holdfast.drift.measuring.measure between steps."
        )
    asked = Watching(
        suite if isinstance(suite, str | Path) else tuple(suite),
        every, gate, when_exceeded, batch_size, limit, max_new_tokens,
    )  # fmt: skip
    if faults := [*(fault for _, fault in asked.faults()), *_trainer_faults(trainer, asked, base)]:
        raise ConfigError("holdfast.watch", faults)
    _refuse_shards(trainer)
    refuse_lost_base(unwrap(trainer.model), base)
    callback = DriftCallback(trainer, asked, Path(ledger or Path(trainer.args.output_dir) / "ledger.jsonl"), base)
    trainer.add_callback(callback)
    return callback


def _trainer_faults(trainer: Any, asked: Watching, base: nn.Module | None) -> list[str]:
    from .watch_callback import DriftCallback

    faults = []
    if not hasattr(tokenizer_of(trainer), "decode"):
        faults.append("the trainer has no tokenizer to ask with: give it one, Trainer(..., processing_class=tokenizer)")
    if any(isinstance(callback, DriftCallback) for callback in trainer.callback_handler.callbacks):
        faults.append("this trainer is watched already: trainer.remove_callback(...) first, or ask for everything once")
    if asked.when_exceeded == "keep_best" and trainer.args.load_best_model_at_end:
        faults.append(BOTH_PUT_BACK)
    if base is not None and shares_weights(unwrap(trainer.model), base):
        faults.append("base shares its weights with the model in training and would move along: load it once more")
    return faults


def _refuse_shards(trainer: Any) -> None:
    parallel = getattr(trainer.accelerator, "parallelism_config", None)
    split = any((getattr(parallel, f"{kind}_size", 1) or 1) > 1 for kind in ("tp", "cp", "sp"))
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled or split:
        kind = (
            "FSDP" if trainer.is_fsdp_enabled else "DeepSpeed" if trainer.is_deepspeed_enabled else "This parallelism"
        )
        raise NotYetSupported(
            f"{kind} holds the model in parts, and drift is measured in one process. Save checkpoints and measure "
            "them: holdfast drift BASE --adapter output/checkpoint-100. Or use DDP."
        )
