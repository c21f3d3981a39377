"""What goes along with the training of a run that is compared: the count of its steps, and its early checkpoints.

An early checkpoint is the adapter (or model) as it is after so many steps of the last stage, in a folder of its own,
whole or not at all; TRL's checkpoints, from which a killed run goes on, are another matter. Read next: `compare_job`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from .processes import count
from .run import save
from .watch_sides import tokenizer_of


class Along(TrainerCallback):
    """Counts steps and saves early checkpoints.

    Args:
        trainer: whose training it is.
        share: how much of a run this stage is, for the count.
        early: by number of steps, the folder of a checkpoint.
    """

    def __init__(self, trainer: Any, share: float, early: Mapping[int, Path]) -> None:
        self.trainer, self.share, self.early = trainer, share, early

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count what was done before a kill."""
        count(self.share * state.global_step / max(state.max_steps, 1))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count a step; save what it made, if that was asked for."""
        count(self.share / max(state.max_steps, 1))
        if state.global_step in self.early:
            save(self.trainer, tokenizer_of(self.trainer), self.early[state.global_step])


def go_along(trainer: Any, share: float, early: Mapping[int, Path]) -> None:
    """Put it on a trainer, whose bar becomes lines of a log."""
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(PrinterCallback())
    trainer.add_callback(Along(trainer, share, early))
