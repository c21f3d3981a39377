"""One stage in TRL's hands: its arguments with defaults that run anywhere, its trainer, its checkpoints.

TRL's options are passed through untouched. Only where the machine has no accelerator do three defaults change, unless
the recipe says otherwise: bf16, gradient checkpointing and pinned memory are off. `dpo_reference` looks at a built
trainer and says what the loss of DPO compares the student with, which TRL decides and does not tell.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor

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


def make_trainer(
    stage: Stage, rows: Dataset, model: Any, tokenizer: Any, peft_config: Any, folder: Path, seed: int
) -> Any:
    """Return TRL's trainer for a stage on `rows`; a new adapter is drawn from `seed`, so a restart begins alike."""
    from trl import DPOTrainer, SFTTrainer

    from ..integrations import adalora

    trainer_class = SFTTrainer if stage.trainer == "sft" else DPOTrainer
    trainer = trainer_class(
        model=model,
        args=training_arguments(stage.trainer, stage.options, folder, seed),
        train_dataset=rows,
        eval_dataset=stage.eval_data.rows() if stage.eval_data else None,
        processing_class=tokenizer,
        peft_config=peft_config,
    )
    if adalora.is_adalora(trainer.model):
        adalora.attach(trainer)
    return trainer


START = "the model as this stage begins"


def dpo_reference(trainer: Any) -> str:
    """Return, in one sentence, what a DPO trainer that has not started compares its student with.

    Nothing is taken on trust: TRL's copy of an adapter or a model is compared with the original, tensor by tensor, and
    where it is not whole, or the adapter is switched off instead, the outputs are compared.
    """
    model, options = trainer.model, trainer.args
    if trainer.ref_model is not None:
        moving = f", then moved towards the student every {options.ref_model_sync_steps} steps (sync_ref_model)"
        return _loaded_again(trainer) + (moving if options.sync_ref_model else "") + "."
    before = "; its log-probabilities were computed before training" if options.precompute_ref_log_probs else ""
    if not hasattr(model, "peft_config"):
        return f"{START}{before}."
    return (_kept_beside(trainer) if "ref" in model.peft_config else _switched_off(trainer)) + before + "."


def _loaded_again(trainer: Any) -> str:
    import torch

    place = getattr(trainer.ref_model.config, "_name_or_path", "")
    now = dict(trainer.model.named_parameters())
    theirs = dict(trainer.ref_model.named_parameters())
    if theirs.keys() == now.keys() and all(torch.equal(p.to(now[name]), now[name]) for name, p in theirs.items()):
        return f"{START}, loaded by TRL once more from {place}"
    return f"the model that TRL loaded from {place}, which is NOT {START} (another revision?)"


def _kept_beside(trainer: Any) -> str:
    import torch

    params = dict(trainer.model.named_parameters())
    pairs = {name: name.replace(".default", ".ref") for name in params if ".default" in name}
    lost = [name for name, ref in pairs.items() if ref not in params or not torch.equal(params[name], params[ref])]
    if not lost:
        return f"{START}, kept by TRL as the adapter 'ref'"
    # TRL 1.16 copies what has '.default.' in its name, and many kinds of adapter end their names with '.default'
    why = f"({len(lost)} of {len(pairs)} tensors, {lost[0]} for one)"
    if not _sharded(trainer) and _alike(_logits(trainer.model, "ref"), _logits(trainer.model, None)):
        return f"the base, NOT {START}: TRL did not copy the adapter into its adapter 'ref' {why}"
    return f"neither the base nor {START}: TRL copied only a part of the adapter into its adapter 'ref', not all {why}"


def _switched_off(trainer: Any) -> str:
    from ..integrations.peft import CHANGES_BASE, MOVES_BASE_INTO_ADAPTER

    config = trainer.model.active_peft_config
    init = str(getattr(config, "init_lora_weights", "")).lower()
    biases = any(p.requires_grad and "bias" in name.split(".")[-1] for name, p in trainer.model.named_parameters())
    moving = f", but for biases, which are trained in place (bias={config.bias!r})" if biases else ""
    if init.startswith(MOVES_BASE_INTO_ADAPTER + CHANGES_BASE):
        return f"neither the base nor {START}, but the weights that {init!r} left under the adapter{moving}"
    if _sharded(trainer) or _alike(_logits(trainer.model, "default"), _logits(trainer.model, None)):
        return f"the base, which is the model with its adapter switched off{moving}"
    return f"the base, which is the model with its adapter switched off, NOT {START}{moving}"


def _sharded(trainer: Any) -> bool:
    """Say whether a forward is not to be had before training."""
    return bool(trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled)


def _logits(model: Any, adapter: str | None) -> Tensor:
    """Return logits on a probe with an adapter, or with none, switched as TRL's DPO does it."""
    import torch
    from trl.trainer.utils import use_adapter

    from ..core.reference import probe_batch
    from ..core.tap import evaluation

    batch = probe_batch(model)
    with torch.no_grad(), evaluation(model), use_adapter(model, adapter):
        logits: Tensor = model(**batch).logits[:, -batch["input_ids"].shape[1] :]  # virtual tokens come first
    return logits.float()


def _alike(ours: Tensor, theirs: Tensor) -> bool:
    return bool((ours - theirs).abs().max() <= 1e-5 * ours.abs().max().clamp(min=1e-3))


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
