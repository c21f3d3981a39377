"""Methods inside a transformers `Trainer` or any TRL trainer built on it: a mixin over six of its methods.

No callback fires between backward and clipping, so the mixin acts at the end of `training_step`, when gradients are
synchronised; TRL builds no logits, so losses come from the tap. `attach(trainer, ...)` gives an existing trainer this
mixin and `detach` takes it away again; `class MyTrainer(PreservingMixin, SFTTrainer)` does the same by hand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..core.errors import NeverSupported, NotYetSupported, WrongSetup
from ..core.held_out import Measure
from ..core.method import GradientMethod, Method, OutputMethod, WeightMethod, needs_retain
from ..core.session import Session
from ..core.types import Batch, TokenCounts
from ..retain.cached_reference import keep
from .one_pass import MicroBatch, OnePass
from .peft import tap_and_reference
from .pools import RetainData, retain_rows
from .progress import progress_bar
from .retain_data import to_sets
from .task_cache import Cache, forget_ends, keeper, tell_if_idle, write_at_ends


class PreservingMixin:
    """Runs a `Session` inside a Trainer. Put it before the trainer class: `class T(PreservingMixin, SFTTrainer)`.

    Args:
        methods: the methods to run; see `attach` for the rest. All other arguments go to the trainer.
    """

    holdfast: Session | None = None
    _counts: TokenCounts | None = None
    _one_pass: OnePass | None = None

    def __init__(
        self,
        *args: Any,
        methods: Sequence[Method] = (),
        retain: RetainData = (),
        reference: str | nn.Module | None = None,
        measures: Mapping[str, Measure] | None = None,
        share_prefix: bool = True,
        one_pass: bool = True,
        cache: Cache = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.holdfast = _session(self, methods, retain, reference, measures, share_prefix, cache)
        self._one_pass = OnePass(self, self.holdfast, one_pass)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Count the step's tokens before its first forward, as the trainer does for its own loss."""
        batches, items = super().get_batch_samples(*args, **kwargs)  # type: ignore[misc]
        if self.holdfast is not None and self.holdfast.has(OutputMethod):
            self._counts = self.holdfast.count(batches)
            if self._one_pass is not None:
                self._one_pass.read(batches, items)
        return batches, items

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Add the output methods' losses to the trainer's own, in training only."""
        session, batch = self.holdfast, dict(inputs)  # the trainer may take labels out of its own copy
        acting = session is not None and session.has(OutputMethod) and model.training and torch.is_grad_enabled()
        if session is None or not acting:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[misc]
        session.begin()  # here, where all processes pass: each may compute its micro-batch in another way
        micro = MicroBatch(batch, self._counts, num_items_in_batch, _host_factor(self, num_items_in_batch))
        one_pass = None if return_outputs else self._one_pass  # who asks for outputs wants logits in them
        try:
            with nullcontext() if one_pass is None else one_pass.over(micro):
                result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[misc]
            added = session.loss(batch, self._counts, host_factor=micro.host_factor, taken=micro.taken)
        except BaseException:
            session.abandon()
            raise
        if return_outputs:
            return result[0] + added, result[1]
        return result + added

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """After the last backward of an optimizer step, before clipping: penalties, then transforms."""
        loss: Tensor = super().training_step(*args, **kwargs)  # type: ignore[misc]
        trainer = cast(Any, self)
        if self.holdfast is not None and trainer.accelerator.sync_gradients:
            self.holdfast.watch(trainer.optimizer)  # it does not exist before the training loop begins
            scaler = trainer.accelerator.scaler
            self.holdfast.gradients_ready(scaler.get_scale() if scaler is not None and scaler.is_enabled() else 1.0)
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Send every quantity through the trainer's own log, under `holdfast/`."""
        if self.holdfast is not None and not any(key.startswith("eval_") for key in logs):
            logs.update(self.holdfast.pop_metrics())
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # before the host's own files: trainer_state.json, which it writes last, then marks a complete checkpoint
        trainer = cast(Any, self)
        if self.holdfast is not None and self.holdfast.methods:
            folder = f"checkpoint-{trainer.state.global_step}"
            self.holdfast.save(Path(trainer._get_output_dir(trial=trial)) / folder)
        super()._save_checkpoint(model, trial)  # type: ignore[misc]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
        if self.holdfast is not None and self.holdfast.methods:
            self.holdfast.load(resume_from_checkpoint)


def _preserving(trainer_class: Any) -> Any:
    return type(f"Preserving{trainer_class.__name__}", (PreservingMixin, trainer_class), {"_given_by_attach": True})


def attach(
    trainer: Any,
    methods: Sequence[Method],
    *,
    retain: RetainData = (),
    reference: str | nn.Module | None = None,
    measures: Mapping[str, Measure] | None = None,
    share_prefix: bool = True,
    one_pass: bool = True,
    cache: Cache = False,
) -> Session:
    """Give a trainer methods that protect its model; call it before `trainer.train()`.

    Args:
        trainer: a transformers `Trainer`, a TRL `SFTTrainer` or `DPOTrainer`, or a subclass.
        methods: run in this order; penalties act before transforms whatever the order.
        retain: what must not be forgotten: rows in any TRL format, ready batches of tensors, a pool or the folder of
            one; several sets of them by name where a method tells them apart. Self-replay that is given nothing samples
            a pool from the base.
        reference: `base`, `start`, a folder, or a model; None: the base, if it can be told (see
            `integrations.peft.choose_reference`).
        measures: of drift, by name, for budgets that are on one of them: functions of the model (docs/budget.md).
        share_prefix: whether frozen lower layers run once for student and base, where that is proved to be exact
            (docs/reference.md); `trainer.holdfast.explain()` says whether they do.
        one_pass: whether the trainer's token loss and a method's divergence are computed in one pass over the head,
            where that changes nothing else (docs/one-step.md); `explain()` says whether they are.
        cache: whether what the base says of the task's sequences is kept on disk, so that from the second epoch on it
            need not run: true, a folder, or {folder: ..., dtype: float32 or float16} (docs/cache.md). Default: it runs.

    Returns:
        The session, also at `trainer.holdfast`.

    Raises:
        WrongSetup, NeverSupported, NotYetSupported: where a method would silently do the wrong thing here.
    """
    if isinstance(trainer, PreservingMixin):
        raise WrongSetup(
            "This trainer has a session already: holdfast.detach(trainer) first, or list all methods once."
        )
    session = _session(trainer, methods, retain, reference, measures, share_prefix, cache)
    trainer.holdfast = session
    trainer._one_pass = OnePass(trainer, session, one_pass)
    trainer.__class__ = _preserving(type(trainer))
    return session


def detach(trainer: Any) -> None:
    """Undo `attach`: the trainer is of its own class again and no hook is left on the model."""
    if not getattr(trainer, "_given_by_attach", False):
        raise WrongSetup("holdfast.detach: this trainer was not given its session by holdfast.attach.")
    if trainer.holdfast is not None:
        trainer.holdfast.close()
        forget_ends(trainer)
    del trainer.holdfast, trainer._one_pass
    trainer.__class__ = type(trainer).__bases__[1]


def _session(
    trainer: Any,
    methods: Sequence[Method],
    retain: RetainData,
    reference: str | nn.Module | None,
    measures: Mapping[str, Measure] | None,
    share_prefix: bool,
    cache: Cache,
) -> Session:
    active = [method for method in methods if method.strength]
    _refuse_unsound_hosts(trainer, active)
    tap, chosen = tap_and_reference(trainer.model, methods, reference)
    options: dict[str, Any] = {"max_length": getattr(trainer.args, "max_length", None)}
    seed, shown = trainer.args.seed, trainer.is_world_process_zero() and not trainer.args.disable_tqdm
    sets: dict[str, list[Batch]] = {}
    if any(map(needs_retain, methods)):
        tokenizer = trainer.processing_class
        rows = retain_rows(methods, retain, tokenizer, trainer.model, chosen, seed=seed, shown=shown, **options)
        sets = to_sets(rows, tokenizer, device=trainer.args.device, **options)
    session = Session(
        trainer.model, methods, reference=chosen, retain=sets, tap=tap, seed=seed, keep=keep,
        progress=progress_bar(shown), measures=measures, share_prefix=share_prefix,
        keep_task=keeper(cache, trainer.processing_class),
    )  # fmt: skip
    tell_if_idle(cache, session)
    write_at_ends(trainer, session)
    return session


def _refuse_unsound_hosts(trainer: Any, methods: Sequence[Method]) -> None:
    """Raise where the host would make a method silently wrong."""
    on_gradients = [m.name for m in methods if isinstance(m, GradientMethod | WeightMethod)]
    on_outputs = [m.name for m in methods if isinstance(m, OutputMethod)]
    if not methods:
        return
    if trainer.is_deepspeed_enabled and on_gradients:
        raise NeverSupported(
            f"{', '.join(on_gradients)} under DeepSpeed: its backward also takes the optimizer step, so a change of "
            "gradients afterwards would silently do nothing. Use DDP."
        )
    if trainer.is_deepspeed_enabled:
        raise NotYetSupported(
            f"{', '.join(on_outputs)} under DeepSpeed is untested, and ZeRO-3 shards the head's weight that the loss "
            "reads. Use DDP."
        )
    if trainer.is_fsdp_enabled:
        version = getattr(getattr(trainer.accelerator.state, "fsdp_plugin", None), "fsdp_version", 1)
        if version == 1:
            raise NeverSupported(
                f"{', '.join(on_outputs + on_gradients)} under FSDP1: it flattens parameters, so names are lost and "
                "adapters stay on in the reference pass. Use DDP."
            )
        raise NotYetSupported(
            f"{', '.join(on_outputs + on_gradients)} under FSDP2 inside a Trainer is untested (accelerate needs a GPU "
            "for it). Use DDP; or, for gradient methods, fully_shard in a loop of your own with holdfast.preserve."
        )
    if trainer.args.n_gpu > 1:
        raise NeverSupported(
            "nn.DataParallel runs replicas that the tap cannot read. Launch one process per GPU (DDP)."
        )
    parallel = getattr(trainer.accelerator, "parallelism_config", None)
    if any((getattr(parallel, f"{kind}_size", 1) or 1) > 1 for kind in ("tp", "cp", "sp")):
        raise NotYetSupported("Tensor, context and sequence parallelism split what the methods read. Use DDP.")


def _host_factor(trainer: Any, num_items_in_batch: Any) -> float:
    """Return what undoes the host: DDP averages gradients, and some losses are divided by accumulation steps."""
    scaled = trainer.loss_is_scaled_for_ga
    if scaled is None:
        scaled = (trainer.model_accepts_loss_kwargs and num_items_in_batch is not None) or (
            trainer.compute_loss_func is not None
        )
    accumulation = 1 if scaled else trainer.current_gradient_accumulation_steps
    return float(trainer.accelerator.num_processes * accumulation)
