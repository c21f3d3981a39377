"""One stage in TRL's hands: its arguments with defaults that run anywhere, its trainer, its checkpoints.

TRL's options are passed through untouched. Only where the machine has no accelerator do three defaults change, unless
the recipe says otherwise: bf16, gradient checkpointing and pinned memory are off.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import Stage

Say = Callable[[str], None]
CHECKPOINTING = ("activation_checkpointing", "gradient_checkpointing")  # transformers' new name and its old one


def arguments_class(trainer: str) -> type:
    """Return SFTConfig or DPOConfig."""
    from trl import DPOConfig, SFTConfig

    return SFTConfig if trainer == "sft" else DPOConfig


def training_arguments(trainer: str, options: Mapping[str, Any], folder: Path, seed: int) -> Any:
    """Return the trainer's arguments; it raises ValueError for options that do not go together."""
    import torch

    config_class, defaults = arguments_class(trainer), dict[str, Any]()
    if not (torch.cuda.is_available() or torch.backends.mps.is_available()):
        defaults = {"dataloader_pin_memory": False}
        if not options.get("fp16"):
            defaults["bf16"] = False
        if not any(name in options for name in CHECKPOINTING):
            defaults[next(name for name in CHECKPOINTING if hasattr(config_class, name))] = False
    return config_class(**{**defaults, **options, "output_dir": str(folder), "seed": seed})


def make_trainer(stage: Stage, model: Any, tokenizer: Any, peft_config: Any, folder: Path, seed: int) -> Any:
    """Return TRL's trainer for a stage; a new adapter is drawn from `seed`, so a restart begins alike."""
    from trl import DPOTrainer, SFTTrainer

    trainer_class = SFTTrainer if stage.trainer == "sft" else DPOTrainer
    return trainer_class(
        model=model,
        args=training_arguments(stage.trainer, stage.options, folder, seed),
        train_dataset=stage.data.rows(),
        eval_dataset=stage.eval_data.rows() if stage.eval_data else None,
        processing_class=tokenizer,
        peft_config=peft_config,
    )


def last_complete_checkpoint(folder: Path, *, methods: bool, say: Say) -> Path | None:
    """Return the newest checkpoint that a run can go on from, and say which ones were passed over and why.

    The trainer writes `trainer_state.json` last and holdfast its own state first, so a checkpoint in which a kill
    left anything unfinished is told by what it lacks.

    Args:
        folder: the stage's folder.
        methods: whether holdfast's state must be there.
        say: where messages go.
    """
    numbered = {int(p.name.split("-")[1]): p for p in folder.glob("checkpoint-*") if p.name.split("-")[1].isdigit()}
    for _, checkpoint in sorted(numbered.items(), reverse=True):
        if not (lack := _lacks(checkpoint, methods)):
            return checkpoint
        say(f"{checkpoint} is passed over: {lack}.")
    return None


def _lacks(checkpoint: Path, methods: bool) -> str:
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text())
        if not isinstance(state, dict) or "global_step" not in state:
            return "its trainer_state.json is not whole"
    except FileNotFoundError:
        return "it is unfinished (no trainer_state.json, which is written last)"
    except ValueError:
        return "its trainer_state.json was cut off"
    if methods and not (checkpoint / "holdfast.json").is_file():
        return "it has no state of the methods (holdfast.json)"
    for name in ("optimizer", "scheduler"):
        if not any(checkpoint.glob(f"{name}*")):
            return f"it has no state of the {name} (save_only_model?), so the run could not go on as it was"
    return ""
