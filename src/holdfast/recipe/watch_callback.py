"""The callback of `holdfast.watch`: looks at the model in training, and leaves everything as it was.

    step 0: base                             adapters off, or a frozen copy
    step n: tuned,  drift = tuned - base     into the trainer's log and the ledger, and before the gate

A watched run gives bit for bit the weights and the logs of one that is not: nothing is drawn, nothing is left switched.
Read next: `watch_sides`, who answers; `watch_kept`, which weights are put back.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from ..analysis.budgets import Gate
from ..analysis.gate import judge
from ..analysis.gate_file import read_gate
from ..analysis.paired import interval_of
from ..analysis.scores import find
from ..core.distributed import rank, world_size
from ..core.errors import HoldfastError, WrongSetup
from ..core.selection import trainable, unwrap
from ..drift.ledger import JSON, Entry, Ledger
from ..drift.measuring import measure
from ..drift.models import Models
from ..drift.probe import BASE
from ..drift.score import Score
from ..integrations.peft import is_peft
from .watch_kept import Kept
from .watch_settings import SPLIT, Watching
from .watch_sides import (
    always,
    base_side,
    frozen_copy,
    logits,
    name_of,
    refuse_lost_base,
    tokenizer_of,
    tuned_digest,
    untouched,
)

TUNED = "tuned"
EXPERIMENT = "drift while training"
T = TypeVar("T")


class DriftExceeded(UserWarning):
    """A budget of the gate is exceeded, and the training goes on."""


@dataclass(frozen=True)
class Look:
    """One measurement of the model in training.

    Attributes:
        step: optimizer steps so far.
        metrics: what was logged.
        exceeded: of each budget that is exceeded, in one sentence why.
    """

    step: int
    metrics: Mapping[str, float]
    exceeded: tuple[str, ...]


class DriftCallback(TrainerCallback):
    """What `watch` gives a trainer.

    Attributes:
        looks: what was found in this training, in the order of steps; the same in every process.
        arm: what the ledger calls this run: the trainer's `run_name`, else its output folder.
        settings: what the ledger records with every look.
        say: where messages go, in the main process.
    """

    def __init__(self, trainer: Any, asked: Watching, ledger: Path, base: nn.Module | None) -> None:
        args = trainer.args
        self.trainer, self.asked, self.ledger = trainer, asked, Ledger(ledger)
        self.looks: list[Look] = []
        self.arm: str = args.run_name or Path(args.output_dir).absolute().name
        self.settings: dict[str, JSON] = asked.described()
        self.say: Callable[[str], None] = print
        self._name = name_of(unwrap(trainer.model))
        self._probes, self._gate = asked.probes(self._name), asked.budgets()
        self._given = base
        self._copy: tuple[nn.Module, nn.Module] | None = None  # a dense model, and how it was before training
        self._kept = Kept(Path(args.output_dir) / "within-budget.safetensors")

    @property
    def model(self) -> nn.Module:
        """The model in training, without wrappers."""
        return unwrap(self.trainer.model)

    # --- events of the trainer ---------------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure the base."""
        refuse_lost_base(self.model, self._given)
        dense = self._given is None and not is_peft(self.model)
        copied = self._copy is not None and self._copy[0] is self.model
        if dense and state.global_step and not copied:
            raise WrongSetup(
                f"All weights are trained and this run goes on from step {state.global_step}, so the base is gone: "
                "drift would be measured from a trained model. Pass the base: holdfast.watch(..., base=loaded model)."
            )
        self.looks = []
        self._on_main(lambda: self._begin(dense and not copied, state.global_step))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure if it is time, or if this was the last step."""
        if state.global_step % self.asked.every == 0 or control.should_training_stop:
            self._look(state.global_step, control)
            if self.looks[-1].exceeded:
                self._exceeded(self.looks[-1], control)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure what came out, if nobody has; put weights within budget back, if that was asked for."""
        step = state.global_step
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            step = state.best_global_step  # whose weights the trainer has just loaded
        if step not in {look.step for look in self.looks}:
            self._look(step, control)
            if self.looks[-1].exceeded:
                self._exceeded(self.looks[-1], control, ended=True)
        if self.asked.when_exceeded == "keep_best" and self.looks[-1].exceeded:
            self._put_back()

    # --- measuring ---------------------------------------------------------------------------------------------------

    def _begin(self, copy: bool, step: int) -> None:
        """In the main process: the sides, the base's scores, and whether the gate can judge them."""
        model, device = self.model, next(self.model.parameters()).device
        precision = self.trainer.accelerator.autocast
        if copy:
            self.say("holdfast.watch: all weights are trained, so a frozen copy of the model is kept as the base.")
            self._copy = model, frozen_copy(model, precision)
        other = self._given.to(device) if self._given is not None else self._copy and self._copy[1]
        with untouched(model):
            base, self._digest = base_side(model, other, precision)
            tokenizer, size = tokenizer_of(self.trainer), self.asked.batch_size
            self._models = Models({BASE: base, TUNED: always(model, precision)}, tokenizer, batch_size=size)
            self._base = measure(self._models, self._probes, sides=[BASE])[BASE].scores
        if self._gate is not None:
            if not isinstance(self.asked.gate, Gate):
                read_gate(self.asked.gate or "", scores=sorted(self._base))  # unknown scores are told with their lines
            judge(self._gate, self._base, self._base)
            self._kept.begin(step, {"base": self._digest, "gate": repr(self._gate)})
        self._record(BASE, {}, self._base, {BASE: {"name": self._name, "sha256": self._digest}})

    def _look(self, step: int, control: Any) -> None:
        look = self._on_main(lambda: self._measure(step))
        self.looks.append(look)
        # the class's own log, past overrides: TRL's would average and clear what the next row of its own is made of,
        # and holdfast.attach's would take the methods' figures
        due = control.should_log
        Trainer.log(self.trainer, dict(look.metrics))
        control.should_log = due  # which every log takes back

    def _measure(self, step: int) -> Look:
        """In the main process: one measurement, recorded and judged."""
        model = self.model
        self._models.forget(TUNED)
        with untouched(model):
            if bool(logits(model, self.trainer.accelerator.autocast).isfinite().all()):
                scores = measure(self._models, self._probes, sides=[TUNED])[TUNED].scores
            else:
                scores = {name: Score(math.nan, n=score.n) for name, score in self._base.items()}
            sha256 = tuned_digest(model, self._digest)
        models: dict[str, JSON] = {
            BASE: {"name": self._name, "sha256": self._digest},
            TUNED: {"name": f"{self.arm}, step {step}", "sha256": sha256},
        }
        self._record(self.arm, {"step": step}, scores, models)
        exceeded = () if self._gate is None else _exceeded(self._gate, self._base, scores)
        if self.asked.when_exceeded == "keep_best" and not exceeded:
            self._kept.keep(step, trainable(model))
        metrics = {f"drift/{name}": score.value for name, score in scores.items()}
        metrics |= {f"drift/{n}_change": s.value - self._base[n].value for n, s in scores.items() if n in self._base}
        return Look(step, metrics | ({} if self._gate is None else {"drift/exceeded": len(exceeded)}), exceeded)

    def _record(
        self, arm: str, settings: Mapping[str, JSON], scores: Mapping[str, Score], models: Mapping[str, JSON]
    ) -> None:
        """Append to the ledger what it does not hold yet: a resumed run measures its base again."""
        lost = [name for name, score in scores.items() if score.faults()]
        entry = Entry(
            EXPERIMENT, arm, {**self.settings, **settings}, self.trainer.args.seed, SPLIT,
            {name: score if lost else _with_interval(name, score) for name, score in scores.items()},
            status="failed" if lost else "done", error=f"{', '.join(lost)} not finite: diverged" if lost else None,
            models=models,
        )  # fmt: skip
        there = self.ledger.entries(EXPERIMENT, arm, SPLIT, status=None)
        if not any((e.key, e.models, e.scores) == (entry.key, entry.models, entry.scores) for e in there):
            self.ledger.append(entry)

    # --- what follows from it ----------------------------------------------------------------------------------------

    def _exceeded(self, look: Look, control: Any, ended: bool = False) -> None:
        count = f"{len(look.exceeded)} budget{'s are' if len(look.exceeded) > 1 else ' is'} exceeded"
        told = f"holdfast.watch: {count} at step {look.step}:" + "".join(f"\n  - {why}" for why in look.exceeded)
        if self.asked.when_exceeded == "stop" and not (ended or control.should_training_stop):
            self._tell(f"{told}\nThe training stops here; the weights as they are go into a checkpoint.")
            control.should_training_stop = control.should_save = True
        elif rank() == 0:
            warnings.warn(told, DriftExceeded, stacklevel=2)

    def _put_back(self) -> None:
        """Put the last weights within budget back, in every process."""
        step = self._on_main(lambda: self._kept.put_back(trainable(self.model)))
        if step is None:
            self._tell(
                f"holdfast.watch: NO look was within budget, so nothing can be put back. The weights are those of step "
                f"{self.looks[-1].step}, which EXCEED the gate. Train less, look more often, or protect the model with "
                "a method (holdfast methods)."
            )
            return
        if world_size() > 1:
            for weight in trainable(self.model).values():
                torch.distributed.broadcast(weight.data, src=0)
        self._tell(
            f"holdfast.watch: the last look, at step {self.looks[-1].step}, exceeds the gate. The trained weights of "
            f"step {step} are put back: the last that were within budget."
        )

    def _tell(self, text: str) -> None:
        if rank() == 0:
            self.say(text)

    def _on_main(self, work: Callable[[], T]) -> T:
        """Do it in the main process while the others wait; all get the result, or know that there is none."""
        if world_size() == 1:
            return work()
        outcome: list[Any] = [None, None]
        fault: Exception | None = None
        if rank() == 0:
            try:
                outcome[0] = work()
            except Exception as error:
                fault, outcome[1] = error, f"{type(error).__name__}: {error}"
        torch.distributed.broadcast_object_list(outcome, src=0)
        if fault is not None:
            raise fault
        if outcome[1] is not None:
            raise HoldfastError(f"Drift could not be measured in the main process: {outcome[1]}")
        result: T = outcome[0]
        return result


def _with_interval(name: str, score: Score) -> Score:
    kind = find(name)
    return replace(score, interval=interval_of(score, share=kind is not None and kind.share))


def _exceeded(gate: Gate, base: Mapping[str, Score], tuned: Mapping[str, Score]) -> tuple[str, ...]:
    """Of each budget that is exceeded, why; one whose score is not a number any more is."""
    lost = {name for name, score in tuned.items() if score.faults()}
    found = judge(replace(gate, budgets=tuple(b for b in gate.budgets if b.score not in lost)), base, tuned)
    diverged = [f"{b.name} is not finite any more: the run diverged" for b in gate.budgets if b.score in lost]
    return (*diverged, *(verdict.why for verdict in found.verdicts if verdict.outcome in found.failing))
