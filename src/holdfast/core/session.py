"""Binds methods to a model and runs the order of events of a step: the story of the whole package.

    loss(batch)        every micro-batch, after the host's forward: the sum of the output methods' losses
    gradients_ready()  once per optimizer step, before the host clips: penalties are added, then gradients transformed
    watch(optimizer)   once: methods with apply_to="update" then correct what each of its steps moved

Hosts call these and nothing else; state goes to and from checkpoints by `save` and `load`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

import torch
from torch import Tensor, nn

from . import checkpoint
from .budget import Budgets
from .distributed import all_reduce_sum, is_sharded, local, reduce_over_shards, world_size
from .errors import WrongSetup
from .fisher import Fishers, Progress, unseen
from .gradients import Gradients
from .held_out import HeldOut, Measure, hold_out
from .kept_task import KeepTask, KeptTask
from .method import GradientMethod, Method, OutputMethod, Stream, WeightMethod, needs_reference, needs_retain
from .penalties import Penalties
from .prefix import SharedPrefix
from .reference import Keep, Reference, probe_batch
from .retain import Retain
from .sampling import Sampling
from .selection import layer_updates, trainable, unwrap
from .stream import RetainStream
from .tap import Call, Tap
from .transforms import Transforms, finite, full_precision, refuse_shards, rescale
from .types import Batch, NamedTensors, Outputs, Setup, State, Supervision, TokenCounts

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
        self._taken: tuple[Call, Outputs] | None = None
        self.notes: list[str] = []
        self._metrics: dict[str, tuple[Tensor, set[int]]] = {}
        names = [method.name for method in self.methods]
        twins = [names[:i].count(name) + 1 for i, name in enumerate(names)]
        self._labels = [name if twin == 1 else f"{name}.{twin}" for name, twin in zip(names, twins, strict=True)]
        self._params = [trainable(self.model, m.select) if m.strength else {} for m in self.methods]
        for method in self.methods:
            if needs_retain(method) and not self.retain:
                raise WrongSetup(
                    f"{method.name} needs retain data: pass retain=... (batches, or rows in a TRL format)."
                )
            if needs_reference(method) and reference is None:
                raise WrongSetup(f"{method.name} needs a reference, and the session has none.")
        self.budgets = Budgets(self.methods, self._log, self.model, measures or {})
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
        self.stream: RetainStream | None = None
        if reading := [m for _, m in self._active(OutputMethod) if m.on == "retain"]:
            assert self.tap is not None and reference is not None  # noqa: PT018  # both were made or asked for above
            self.stream = RetainStream(reading, self.tap, reference, self.retain, seed, keep)
        on_task = [m for _, m in self._active(OutputMethod) if m.on == "task"]
        self.sampling = Sampling.of(on_task, seed)
        self.kept: KeptTask | None = None
        if keep_task is not None and on_task:
            assert self.tap is not None and reference is not None  # noqa: PT018
            self.kept = keep_task(self.tap, reference, on_task)
        self._fishers = Fishers(self.model, self.tap, self.retain, self.generator.initial_seed(), progress)
        refuse_shards(self.model, self.methods)
        self._penalties = Penalties(self.model, self._active(WeightMethod), self._params, self._log)
        self._transforms = Transforms(self._active(GradientMethod), self._params, self._log)

    def _active(self, kind: type[_Kind]) -> list[tuple[int, _Kind]]:
        """Return the methods of a kind that have strength, as they act, with their places in the list."""
        pairs = zip(self.methods, self.budgets.acting, strict=True)
        return [(i, m) for i, (asked, m) in enumerate(pairs) if isinstance(m, kind) and asked.strength]

    def has(self, kind: type[Method]) -> bool:
        """Return whether a method of this kind will act."""
        return bool(self._active(kind))

    # --- the two entry points -------------------------------------------------------------------------------------

    def count(self, batches: Iterable[Batch]) -> TokenCounts:
        """Count the tokens of one optimizer step over its micro-batches and all processes."""
        return TokenCounts.of(batches)

    def take(self, batch: Batch, counts: TokenCounts | None = None, *, host_factor: float = 1.0) -> Outputs:
        """Take the student's forward of a micro-batch, and return what output methods on the task see of it.

        `loss` does this itself; a host that computes a method's divergence in a pass of its own takes first, and hands
        the sum to `loss` (see `integrations.one_pass`). Arguments and errors as there.
        """
        if counts is None and (self._losses_this_step or world_size() > 1):
            raise WrongSetup(
                "The step has several micro-batches or processes, and session.loss() does not know their tokens, so "
                "its mean would depend on how the step is split. Call counts = session.count(micro_batches) first "
                "and pass session.loss(batch, counts) (with DDP also host_factor=world_size). If the step is one "
                "batch: session.gradients_ready() was not called after the last one."
            )
        tap, reference = self.tap, self.reference
        assert tap is not None  # both were checked in __init__
        assert reference is not None
        self._begin()
        call = tap.take()
        task = Outputs(
            hidden=call.hidden,
            head=tap.head(),
            supervision=Supervision.of(batch),
            counts=counts if counts is not None else TokenCounts.of([batch]),
            host_factor=host_factor,
            run_reference=cache(lambda: (reference.hidden(tap, call), reference.head(tap))),
        )
        if self.sampling is not None:
            task = self.sampling.of_task(task, call, batch, self.step, tap, reference)
        if self.kept is not None:
            task = self.kept.of_task(task, call if self.sampling is None else self.sampling.part(call))
        self._taken = call, task
        return task

    def loss(
        self,
        batch: Batch,
        counts: TokenCounts | None = None,
        *,
        host_factor: float = 1.0,
        sums: Mapping[int, Tensor] = MappingProxyType({}),
    ) -> Tensor:
        """Return what the output methods add to the loss of the micro-batch whose forward has just run.

        Args:
            batch: what the model was called with, with `labels` or `completion_mask`.
            counts: `session.count(micro_batches)` of the whole optimizer step. Without it the batch is taken to be
                the whole step.
            host_factor: undoes what the host does to a loss later (averages over devices, divides by accumulation
                steps), so that every token has weight 1 / number of tokens in the step.
            sums: divergences that the host has computed already (see `take`), summed over this micro-batch's rows, by
                the method's place in the list.

        Raises:
            WrongSetup: if batches accumulate, or several processes run, without `counts`: the result would depend
                on how the step was split.
        """
        active = self._active(OutputMethod)
        if self.tap is None or not active:
            return torch.zeros((), device=next(self.model.parameters()).device)
        task = self.take(batch, counts, host_factor=host_factor) if self._taken is None else self._taken[1]
        assert self._taken is not None
        (call, _), self._taken = self._taken, None
        number, self._losses_this_step = self._losses_this_step, self._losses_this_step + 1
        total = call.hidden.new_zeros((), dtype=torch.float32)
        states, streams = self._begin(), dict[Stream, Outputs](task=task)
        if self.stream is not None:
            step = self.step
            streams["retain"] = self.stream.outputs(call, task.counts, number, step=step, host_factor=host_factor)
        with torch.autocast(call.hidden.device.type, enabled=False):
            for i, method in active:
                log = partial(self._log, i, scale=world_size() / host_factor)
                seen = replace(streams[method.on], log=log)
                if i in sums:
                    seen = replace(seen, kept_sum=partial(_known, sums[i]))
                loss = method.loss(states[i], seen)
                log("loss", loss)
                total = total + loss
        if self.kept is not None:
            self._add("cache/base_ran_for_tokens", self.kept.ran_for())
        return total

    def gradients_ready(self, grad_scale: float = 1.0) -> None:
        """Add the penalties' gradients and transform the sum; call it before clipping, once per optimizer step.

        Args:
            grad_scale: what a gradient scaler has multiplied gradients by; methods see unscaled gradients.
        """
        states, self._taken = self._begin(), None
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

    # --- the order of events --------------------------------------------------------------------------------------

    def _begin(self) -> list[State]:
        """Return the states; make them on the first step, and anew where a method's `refresh_every` says so."""
        if self._states is None:
            self._states = [self._init(i) if m.strength else {} for i, m in enumerate(self.methods)]
        elif self.step != self._refreshed:
            self._refreshed = self.step
            for i, method in enumerate(self.methods):
                if method.strength and method.due(self._states[i], self.step):
                    self._states[i] = self._init(i, self._states[i])
        self.budgets.begin(self.step)
        return self._states

    def _init(self, i: int, previous: State | None = None) -> State:
        with full_precision(self._params[i]):
            return self.budgets.acting[i].init(self._setup(i, previous))

    # --- what `init` may use --------------------------------------------------------------------------------------

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

    def _log(self, i: int, name: str, value: Tensor | float, *, scale: float = 1.0) -> None:
        """Add to a quantity of this step; micro-batches add up, and nothing waits for the device."""
        self._add(f"{self._labels[i]}/{name}", value, scale)

    def _add(self, name: str, value: Tensor | float, scale: float = 1.0) -> None:
        key, device = f"holdfast/{name}", next(self.model.parameters()).device
        total = torch.as_tensor(value, dtype=torch.float32, device=device).detach() * scale
        before, steps = self._metrics.get(key, (torch.zeros_like(total), set()))
        self._metrics[key] = (before + total, steps | {self.step})

    def pop_metrics(self) -> dict[str, float]:
        """Return every quantity's mean per optimizer step since the last call, averaged over processes."""
        metrics, self._metrics = self._metrics, {}
        return {
            key: (all_reduce_sum(total) / world_size()).item() / max(len(steps), 1)
            for key, (total, steps) in metrics.items()
        }

    def save(self, folder: str | Path) -> None:
        """Write states, reference, step and random-number state into `folder`; every process must call it.

        A replica's state is written by the main process, whole or not at all; under FSDP2 every process writes its
        parts, and the record that makes them a checkpoint comes last.
        """
        if self.kept is not None:
            self.kept.write()
        tensors = {f"{i}/{key}": t for i, state in enumerate(self._begin()) for key, t in state.items()}
        moves = next(self.model.parameters()).device.type != "cpu"
        on_host = [key for key, tensor in tensors.items() if moves and tensor.device.type == "cpu"]
        if self.reference is not None:
            tensors |= {f"reference/{key}": t for key, t in self.reference.state().items()}
        tensors["generator"] = self.generator.get_state()
        record = {
            "step": self.step,
            "refreshed": self._refreshed,
            "retain": self.retain.positions,
            "pool": self.stream.digest if self.stream is not None else None,
            "on_host": on_host,
            "budgets": self.budgets.state(),
            "methods": [m.describe() for m in self.methods],
        }
        checkpoint.write(Path(folder), tensors, record, sharded=self._sharded)

    def load(self, folder: str | Path) -> None:
        """Restore what `save` wrote.

        Raises:
            WrongSetup: if the folder has no state of holdfast's, that of other methods, or another sharding.
        """
        device = next(self.model.parameters()).device
        methods = [m.describe() for m in self.methods]
        tensors, record = checkpoint.read(Path(folder), methods, sharded=self._sharded)
        self.generator.set_state(tensors.pop("generator"))
        self._states, kept = checkpoint.parted(tensors, len(methods), device, record["on_host"])
        if self.reference is not None:
            self.reference.load(kept)
        if self.stream is not None:
            self.stream.resume(record.get("pool"))
        if self.kept is not None:
            self.kept.forget()
        if self.tap is not None:
            self._gradients.forget()
        self.budgets.load(record.get("budgets", self.budgets.state()))
        self.step, self._refreshed = record["step"], record["refreshed"]
        self.retain.positions.update(record["retain"])

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
