"""Binds methods to a model and runs the order of events of a step: the story of the whole package.

    loss(batch)        every micro-batch, after the host's forward: the sum of the output methods' losses
    gradients_ready()  once per optimizer step, before the host clips: penalties are added, then gradients transformed
    watch(optimizer)   once: methods with apply_to="update" then correct what each of its steps moved

Hosts call these and little else; state goes to and from checkpoints by `save` and `load`. Read next: `task_stream` and
`stream`, what output methods see; `penalties` and `transforms`, where the other two kinds act.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from . import session_state
from .budget import Budgets
from .distributed import is_sharded, local, reduce_over_shards, world_size
from .errors import WrongSetup
from .fisher import Fishers, Progress, unseen
from .gradients import Gradients
from .held_out import HeldOut, Measure, hold_out
from .kept_task import KeepTask
from .method import GradientMethod, Method, OutputMethod, Stream, WeightMethod, needs_reference, needs_retain
from .metrics import Metrics
from .penalties import Penalties
from .prefix import SharedPrefix
from .reference import Keep, Reference, probe_batch
from .retain import Retain
from .selection import layer_updates, trainable, unwrap
from .stream import RetainStream
from .tap import Tap
from .task_stream import Taken, TaskStream
from .transforms import Transforms, finite, full_precision, refuse_shards, rescale
from .types import Batch, NamedTensors, Outputs, Setup, State, TokenCounts

_Kind = TypeVar("_Kind", bound=Method)


def _known(total: Tensor, *_: object) -> Tensor:
    return total


class Session:
    """The methods of one run, their states, and the order in which they act.

    Args:
        model: the model being trained, as the host holds it.
        methods: any number; those of strength 0 are never called, for those of "auto" copies act (`budgets.acting`).
        reference: the frozen base; needed by output methods.
        retain: batches of what must not be forgotten (dicts of tensors with `input_ids` and `labels`), or several
            sets of them by name; the same on every process.
        tap: made from the model where it is needed and not given.
        seed: seeds the generator that methods draw from.
        keep: keeps what the reference says of the retain stream, so that it need not run; None: it runs.
        progress: wraps what takes long, (iterable, description) -> iterable: a bar, if the host shows any.
        measures: of drift, by name, for budgets that are on one of them.
        keep_task: keeps what the reference says of the task's sequences from one epoch to the next; None: nothing is.
        share_prefix: whether frozen lower layers run once for student and base, where that is proved to be exact.

    Attributes:
        notes: what the host has to say of itself in `explain()`.

    Raises:
        WrongSetup: if a method needs a reference, retain batches or a measure that are not there.
        NotYetSupported: if the model's logits are not head(hidden).
    """

    def __init__(
        self,
        model: nn.Module,
        methods: Sequence[Method],
        *,
        reference: Reference | None = None,
        retain: Mapping[str, Sequence[Batch]] | Sequence[Batch] = (),
        tap: Tap | None = None,
        seed: int = 0,
        keep: Keep | None = None,
        progress: Progress = unseen,
        measures: Mapping[str, Measure] | None = None,
        keep_task: KeepTask | None = None,
        share_prefix: bool = True,
    ) -> None:
        self.model = unwrap(model)
        self.methods = tuple(methods)
        self.retain = Retain(retain)
        self.reference = reference
        self.step = 0
        self._all = list(self.model.named_parameters())
        self._sharded = any(is_sharded(p) for _, p in self._all)
        self.generator = torch.Generator().manual_seed(seed)
        self._states: list[State] | None = None
        self._refreshed = 0
        self._losses_this_step = 0
        self.notes: list[str] = []
        self._metrics = Metrics(self.model, [method.name for method in self.methods], lambda: self.step)
        self._params = [trainable(self.model, m.select) if m.strength else {} for m in self.methods]
        _refuse_missing(self.methods, self.retain, reference)
        self.budgets = Budgets(self.methods, self._metrics.log, self.model, measures or {})
        self.tap: Tap | None = None
        if any(needs_reference(m) or needs_retain(m) for m in self.methods):
            self.tap = tap or Tap(self.model)
            if not self._sharded:  # FSDP2 gathers weights in the model's own forward only
                self.tap.check(probe_batch(self.model))
                if share_prefix and reference is not None and reference.is_of_student:
                    self.tap.prefix = SharedPrefix(self.tap, reference, probe_batch(self.model, padding=3))
            self._gradients = Gradients(self.model, self.tap, reference)
            if any(m.needs_held_out for m in self.methods) and reference is not None:
                rest, held = hold_out(self.retain.sets, self.budgets.sets)
                self.retain, self.budgets.held_out = Retain(rest), HeldOut(held, self.tap, reference)
        self.task: TaskStream | None = None
        self.stream: RetainStream | None = None
        if reading := [method for _, method in self._active(OutputMethod)]:
            assert self.tap is not None and reference is not None  # noqa: PT018  # both were made or asked for above
            on_task, on_retain = ([m for m in reading if m.on == stream] for stream in ("task", "retain"))
            if on_retain:
                self.stream = RetainStream(on_retain, self.tap, reference, self.retain, seed, keep)
            self.task = TaskStream(on_task, self.tap, reference, seed, keep_task)
        self.sampling, self.kept = (None, None) if self.task is None else (self.task.sampling, self.task.kept)
        self._fishers = Fishers(self.model, self.tap, self.retain, self.generator.initial_seed(), progress)
        refuse_shards(self.model, self.methods)
        self._penalties = Penalties(self.model, self._active(WeightMethod), self._params, self._metrics.log)
        self._transforms = Transforms(self._active(GradientMethod), self._params, self._metrics.log)

    def _active(self, kind: type[_Kind]) -> list[tuple[int, _Kind]]:
        """Return the methods of a kind that have strength, as they act, with their places in the list."""
        pairs = zip(self.methods, self.budgets.acting, strict=True)
        return [(i, m) for i, (asked, m) in enumerate(pairs) if isinstance(m, kind) and asked.strength]

    def has(self, kind: type[Method]) -> bool:
        """Return whether a method of this kind will act."""
        return bool(self._active(kind))

    # --- a step ---------------------------------------------------------------------------------------------------

    def begin(self) -> list[State]:
        """Return the states; make them on the first step, and anew where a method's `refresh_every` says so.

        The entry points do this themselves. It may run the model, and processes may wait for each other in it: a host
        whose processes may come to them by different ways calls it first, where all of them pass.
        """
        if self._states is None:
            self._states = [self._init(i) if m.strength else {} for i, m in enumerate(self.methods)]
        elif self.step != self._refreshed:
            self._refreshed = self.step
            for i, method in enumerate(self.methods):
                if method.strength and method.due(self._states[i], self.step):
                    self._states[i] = self._init(i, self._states[i])
        self.budgets.begin(self.step)
        return self._states

    def count(self, batches: Iterable[Batch]) -> TokenCounts:
        """Count the tokens of one optimizer step over its micro-batches and all processes."""
        return TokenCounts.of(batches)

    def take(self, batch: Batch, counts: TokenCounts | None = None, *, host_factor: float = 1.0) -> Taken:
        """Take the student's forward of a micro-batch, with what output methods on the task see of it.

        `loss` does this itself; a host that computes a method's divergence in a pass of its own takes first, and hands
        on what it took, with the sum, to `loss` (see `integrations.one_pass`). Arguments and errors as there.
        """
        if counts is None and (self._losses_this_step or world_size() > 1):
            raise WrongSetup(
                "The step has several micro-batches or processes, and session.loss() does not know their tokens, so "
                "its mean would depend on how the step is split. Call counts = session.count(micro_batches) first "
                "and pass session.loss(batch, counts) (with DDP also host_factor=world_size). If the step is one "
                "batch: session.gradients_ready() was not called after the last one."
            )
        assert self.task is not None  # there is an output method, or nobody would ask
        self.begin()
        return self.task.take(batch, counts or TokenCounts.of([batch]), self.step, host_factor)

    def loss(
        self,
        batch: Batch,
        counts: TokenCounts | None = None,
        *,
        host_factor: float = 1.0,
        taken: Taken | None = None,
    ) -> Tensor:
        """Return what the output methods add to the loss of the micro-batch whose forward has just run.

        Args:
            batch: what the model was called with, with `labels` or `completion_mask`.
            counts: `session.count(micro_batches)` of the whole optimizer step. Without it the batch is taken to be
                the whole step.
            host_factor: undoes what the host does to a loss later (averages over devices, divides by accumulation
                steps), so that every token has weight 1 / number of tokens in the step.
            taken: what the host took of this forward already (see `take`).

        Raises:
            WrongSetup: if batches accumulate, or several processes run, without `counts`: the result would depend
                on how the step was split.
        """
        active = self._active(OutputMethod)
        if not active:
            return torch.zeros((), device=next(self.model.parameters()).device)
        taken = self.take(batch, counts, host_factor=host_factor) if taken is None else taken
        number, self._losses_this_step = self._losses_this_step, self._losses_this_step + 1
        total = taken.call.hidden.new_zeros((), dtype=torch.float32)
        states, streams = self.begin(), dict[Stream, Outputs](task=taken.task)
        if self.stream is not None:
            streams["retain"] = self.stream.outputs(
                taken.call, taken.task.counts, number, step=self.step, host_factor=host_factor
            )
        with torch.autocast(taken.call.hidden.device.type, enabled=False):
            for i, method in active:
                log = partial(self._metrics.log, i, scale=world_size() / host_factor)
                seen = replace(streams[method.on], log=log)
                if i in taken.sums:
                    seen = replace(seen, kept_sum=partial(_known, taken.sums[i]))
                loss = method.loss(states[i], seen)
                log("loss", loss)
                total = total + loss
        if self.kept is not None:
            self._metrics.add("cache/base_ran_for_tokens", self.kept.ran_for())
        return total

    def abandon(self) -> None:
        """Forget what was noted of a step that an error broke off; a host calls it before it lets the error through."""
        if self.tap is not None:
            self.tap.forget()
        self._losses_this_step = 0

    def gradients_ready(self, grad_scale: float = 1.0) -> None:
        """Add the penalties' gradients and transform the sum; call it before clipping, once per optimizer step.

        Args:
            grad_scale: what a gradient scaler has multiplied gradients by; methods see unscaled gradients.
        """
        states = self.begin()
        if self.tap is not None:
            self.tap.forget()
        if self.stream is not None:
            self.stream.finish()
        if self._active(WeightMethod) or self._active(GradientMethod):
            params: NamedTensors = {name: p for name, p in self._all if p.requires_grad}
            rescale(params, 1 / grad_scale)
            overflow = not finite(params)  # then the scaler will skip this step, and so do we
            if not overflow:
                self._penalties.add(states, self.step)
            self._transforms.gradients_ready(states, self.step, overflow=overflow)
            rescale(params, grad_scale)
        self.budgets.log()
        self.step += 1
        self._losses_this_step = 0

    def watch(self, optimizer: object) -> None:
        """Watch the steps of the optimizer that trains the model; a second call with the same one does nothing."""
        self._transforms.watch(optimizer)

    # --- states of methods ----------------------------------------------------------------------------------------

    def _init(self, i: int, previous: State | None = None) -> State:
        with full_precision(self._params[i]):
            return self.budgets.acting[i].init(self._setup(i, previous))

    def _setup(self, i: int, previous: State | None = None) -> Setup:
        params = self._params[i]
        updates = layer_updates(self.model, params)
        return Setup(
            {name: local(p).detach() for name, p in params.items()},
            updates,
            self.retain.take,
            self.retain.draw,
            lambda groups, loss, beta: self._gradients(params, groups, loss, beta),
            lambda names, spec: self._fishers(updates, names, spec, self.step),
            self.generator,
            self.step,
            previous,
            reduce_over_shards(params.values()),
        )

    # --- what is seen and kept ------------------------------------------------------------------------------------

    def pop_metrics(self) -> dict[str, float]:
        """Return every quantity's mean per optimizer step since the last call, averaged over processes."""
        return self._metrics.pop()

    def save(self, folder: str | Path) -> None:
        """Write states, reference, step and random-number state into `folder`; every process must call it.

        A replica's state is written by the main process, whole or not at all; under FSDP2 every process writes its
        parts, and the record that makes them a checkpoint comes last.
        """
        session_state.save(self, folder)

    def load(self, folder: str | Path) -> None:
        """Restore what `save` wrote.

        Raises:
            WrongSetup: if the folder has no state of holdfast's, that of other methods, or another sharding.
        """
        session_state.load(self, folder)

    def explain(self) -> str:
        """Return the numbered order of events of this run, with parameter counts and the memory of each state."""
        from .explain import explain

        return explain(self)

    def close(self) -> None:
        """Take every hook off the model and the optimizer, and write down what is not written yet."""
        if self.kept is not None:
            self.kept.write()
        if self.tap is not None:
            self.tap.remove()
        self._transforms.close()


def _refuse_missing(methods: Sequence[Method], retain: Retain, reference: Reference | None) -> None:
    for method in methods:
        if needs_retain(method) and not retain:
            raise WrongSetup(f"{method.name} needs retain data: pass retain=... (batches, or rows in a TRL format).")
        if needs_reference(method) and reference is None:
            raise WrongSetup(f"{method.name} needs a reference, and the session has none.")
