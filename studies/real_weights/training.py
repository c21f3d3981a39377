"""The training of one job: TRL's SFTTrainer with the arm's methods attached, which pauses to be judged.

Read next: `judging`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from .arms import ALPHA, ARMS, RANK, WARM_UP, Job
from .rows import LONGEST, load, pool_of, read

if TYPE_CHECKING:
    from torch import nn

Pause = Callable[[int, "nn.Module", float], None]


def train(job: Job, pause: Pause) -> None:
    """Train; after each of the job's points `pause` is given the steps, the model and the CPU seconds of training.

    The rate is constant after the warm-up, so that a prefix of a run is a shorter run.
    """
    import holdfast
    from datasets import Dataset

    _, tokenizer = load(job.work)
    methods = ARMS[job.arm].methods(job.setting.strength or 0.0)
    pool = pool_of(job.work, job.seed) if any(method.uses_retain for method in methods) else None
    with TemporaryDirectory() as folder:
        trainer = sft(job, tokenizer, Dataset.from_list(read(job.work, f"{job.task}-train")), Path(folder))
        if methods:
            retain = pool.batches(tokenizer.pad_token_id) if pool is not None else ()
            holdfast.attach(trainer, methods, retain=retain)
        trainer.add_callback(pauses(job.points, pause))
        trainer.train()


def sft(job: Job, tokenizer: Any, rows: Any, folder: Path) -> Any:
    """TRL's trainer with a new adapter, as anybody would make it."""
    import torch
    from peft import LoraConfig
    from transformers import set_seed
    from trl import SFTConfig, SFTTrainer

    set_seed(job.seed)  # the adapter's start
    model, _ = load(job.work)
    args = SFTConfig(
        output_dir=str(folder), max_steps=job.setting.steps, per_device_train_batch_size=ARMS[job.arm].batch,
        learning_rate=job.setting.learning_rate, lr_scheduler_type="constant_with_warmup", warmup_steps=WARM_UP,
        max_length=LONGEST, seed=job.seed, bf16=False, activation_checkpointing=False, dataloader_pin_memory=False,
        use_cpu=not torch.cuda.is_available(), save_strategy="no", report_to="none", disable_tqdm=True,
        logging_strategy="no",
    )  # fmt: skip
    adapter = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    return SFTTrainer(model, args=args, train_dataset=rows, processing_class=tokenizer, peft_config=adapter)


def pauses(points: tuple[int, ...], pause: Pause) -> Any:
    """A callback that stops the clock after each of these steps."""
    from transformers import TrainerCallback

    class Pauses(TrainerCallback):
        """Tells what is trained so far; the seconds leave out what the telling takes."""

        seconds, started = 0.0, 0.0

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.started = time.process_time()

        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if state.global_step in points:
                self.seconds += time.process_time() - self.started
                pause(state.global_step, model, self.seconds)
                self.started = time.process_time()

    return Pauses()
