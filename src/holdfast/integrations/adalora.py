"""AdaLoRA in a trainer: the two things that PEFT leaves to the training loop, and that neither Trainer nor TRL does.

    after every optimizer step t = 1 … T    importance of every rank, a smaller budget, the least important ones to zero
    loss + w · mean(‖A Aᵀ - I‖, ‖Bᵀ B - I‖)  its `orth_reg_weight`; PEFT adds it to a loss that TRL does not read

Zhang et al., "AdaLoRA" (arXiv 2303.10512). Without the first, AdaLoRA is a LoRA of rank `init_r` that never adapts;
without the second, its A and B are no singular vectors; both without a word. `attach` gives a trainer both, its own
number of steps as the schedule's, and a resume: importances go beside the checkpoint, and ranks are cut only when
training ends (cut in a checkpoint, as PEFT does it, they can no longer be loaded into the model that goes on).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from ..core.checkpoint import replace
from ..core.errors import NotYetSupported, WrongSetup
from ..core.selection import unwrap
from ..functional.named import wide
from .hf_trainer import PreservingMixin, _host_factor

STATE = "adalora.safetensors"
AS_THE_TRAINER_SAYS = 1 << 30  # a `total_step` for when the trainer's number of steps is not known yet
AVERAGES = ("exp_avg_ipt", "exp_avg_unc")  # what PEFT's allocator remembers from step to step


def is_adalora(model: nn.Module) -> bool:
    """Return whether the adapter that is trained is AdaLoRA's."""
    return hasattr(getattr(unwrap(model), "base_model", None), "rankallocator")


def attach(trainer: Any) -> None:
    """Make a trainer do what its AdaLoRA model needs; call it before `holdfast.attach` and `trainer.train()`.

    Args:
        trainer: TRL's `SFTTrainer` or `DPOTrainer`, or a subclass.

    Raises:
        WrongSetup: if the adapter is not AdaLoRA's, the trainer has been given this before, or has a session already.
        NotYetSupported: for a trainer whose loss is the model's own, which has PEFT's regulariser in it already.
    """
    if not is_adalora(trainer.model):
        raise WrongSetup("adalora.attach: the model of this trainer has no AdaLoRA adapter, so there is nothing to do.")
    if isinstance(trainer, AdaLoraMixin):
        raise WrongSetup("adalora.attach: this trainer does what AdaLoRA needs already, and twice would count twice.")
    if isinstance(trainer, PreservingMixin):
        raise WrongSetup("adalora.attach comes before holdfast.attach: detach first, then attach in this order.")
    if type(trainer).compute_loss is Trainer.compute_loss:
        raise NotYetSupported(
            "adalora.attach on a trainer whose loss is the model's own: PEFT adds the regulariser to that, in every "
            "micro-batch, and it would count twice. Use TRL's SFTTrainer."
        )
    trainer.__class__ = type(f"AdaLora{type(trainer).__name__}", (AdaLoraMixin, type(trainer)), {})
    trainer.add_callback(RankCallback(trainer))


def orthogonality(model: nn.Module) -> Tensor:
    """Return how far A's rows and B's columns are from orthonormal, in the mean over all factors."""
    tuner: Any = unwrap(model).base_model
    name, far = tuner.trainable_adapter_name, list[Tensor]()
    for layer in tuner.modules():
        if name in getattr(layer, "lora_E", ()):
            for rows in (wide(layer.lora_A[name]), wide(layer.lora_B[name]).T):
                far.append(torch.linalg.norm(rows @ rows.T - torch.eye(len(rows), device=rows.device)))
    return torch.stack(far).mean()


class AdaLoraMixin:
    """A trainer whose loss has AdaLoRA's regulariser in it, and whose checkpoints its importances."""

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Add the regulariser, in training only, once per optimizer step however many micro-batches it has."""
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[misc]
        config = _config(self)
        if not (config.orth_reg_weight and model.training and torch.is_grad_enabled()):
            return result
        trainer = cast(Any, self)
        undone = _host_factor(trainer, num_items_in_batch) / trainer.accelerator.num_processes
        share = undone / trainer.current_gradient_accumulation_steps  # of a step, where the host does not divide
        added = config.orth_reg_weight * share * orthogonality(model)
        return (result[0] + added, result[1]) if return_outputs else result + added

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        trainer = cast(Any, self)
        if trainer.is_world_process_zero():
            from safetensors.torch import save

            folder = Path(trainer._get_output_dir(trial=trial)) / f"checkpoint-{trainer.state.global_step}"
            folder.mkdir(parents=True, exist_ok=True)
            allocator = unwrap(trainer.model).base_model.rankallocator  # type: ignore[union-attr]
            kept = {f"{kind}/{name}": t for kind in AVERAGES for name, t in getattr(allocator, kind).items()}
            replace(folder / STATE, save({"step": torch.tensor(trainer.state.global_step), **kept}))
        super()._save_checkpoint(model, trial)  # type: ignore[misc]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
        from safetensors.torch import load_file

        file = Path(resume_from_checkpoint) / STATE
        if not file.is_file():
            raise WrongSetup(
                f"{resume_from_checkpoint} has no {STATE}, so AdaLoRA would go on as if no rank had been important so "
                "far. Delete that folder and start again from an older checkpoint or from the beginning."
            )
        here = unwrap(cast(Any, self).model)
        allocator: Any = here.base_model.rankallocator  # type: ignore[union-attr]
        device = next(here.parameters()).device
        for key, tensor in load_file(file).items():
            kind, _, name = key.partition("/")
            if name:
                getattr(allocator, kind)[name] = tensor.to(device)
                allocator.ipt[name] = torch.zeros_like(getattr(allocator, kind)[name])


class RankCallback(TrainerCallback):
    """Gives the ranks away while it trains, and cuts those that are gone when it ends.

    Args:
        trainer: whose model it is.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._pattern: dict[str, list[bool]] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Take the trainer's number of steps for the schedule's.

        Raises:
            WrongSetup: if another was given, or no step is left between `tinit` and `tfinal`.
        """
        config, steps = _config(self._trainer), state.max_steps
        if config.total_step not in (AS_THE_TRAINER_SAYS, steps):
            raise WrongSetup(
                f"AdaLoRA's total_step is {config.total_step}, but this run has {steps} steps, so its schedule would "
                "end too early or never. Leave total_step out: the run's own number is taken."
            )
        if config.tinit + config.tfinal >= steps or steps - config.tfinal < 2:  # the first step only weighs
            raise WrongSetup(
                f"AdaLoRA would never give a rank away: of {steps} steps, tinit takes {config.tinit} and tfinal "
                f"{config.tfinal}. Their sum must be below the number of steps, and two steps be left before tfinal."
            )
        config.total_step = steps
        if state.global_step >= steps - config.tfinal:
            self._pattern = self._alive()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Let PEFT weigh the ranks by the gradients that are still there, and mask."""
        if self._trainer.accelerator.optimizer_step_was_skipped:
            return  # float16 overflowed: these gradients are not finite
        config = _config(self._trainer)
        config.rank_pattern = self._pattern
        unwrap(self._trainer.model).base_model.update_and_allocate(state.global_step + 1)  # type: ignore[operator, union-attr]
        self._pattern, config.rank_pattern = config.rank_pattern, None  # a checkpoint keeps all ranks

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """From here on the adapter is saved with the ranks that it has left."""
        _config(self._trainer).rank_pattern = self._alive()

    def _alive(self) -> dict[str, list[bool]]:
        tuner: Any = unwrap(self._trainer.model).base_model
        part = f"lora_E.{tuner.trainable_adapter_name}"
        return {name: (p != 0).view(-1).tolist() for name, p in tuner.model.named_parameters() if part in name}


def _config(trainer: Any) -> Any:
    tuner: Any = unwrap(trainer.model).base_model
    return tuner.peft_config[tuner.trainable_adapter_name]
