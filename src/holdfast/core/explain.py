"""Prints what a session will do, in order, with parameter counts and the memory of each state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from .method import GradientMethod, Method, OutputMethod, WeightMethod
from .selection import low_rank_updates, trainable
from .types import NamedTensors

if TYPE_CHECKING:
    from .session import Session


def _size(tensors: NamedTensors) -> str:
    return _bytes(sum(t.numel() * t.element_size() for t in tensors.values()))


def _bytes(number: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.2f} GiB"


def explain(session: Session) -> str:
    """Return the numbered order of events of a run."""
    params = trainable(session.model)
    updates = low_rank_updates(session.model, params)
    count = sum(p.numel() for p in params.values())
    states = session._states or [{} for _ in session.methods]
    lines = [f"{count:,} trainable parameters in {len(params)} tensors; {len(updates)} low-rank updates."]
    events = ["forward: the host runs the student"]
    outputs, weights, gradients = (
        [(i, m) for i, m in enumerate(session.methods) if isinstance(m, kind) and m.strength]
        for kind in (OutputMethod, WeightMethod, GradientMethod)
    )
    streams = {m.on for _, m in outputs if isinstance(m, OutputMethod)}
    if session.reference is not None and streams:
        held = session.reference.state()
        memory = f" ({_size(held)} held)" if held else " (no memory held)"
        prefix = session.tap.prefix if session.tap is not None else None
        shared = f"; {prefix.describe()}" if prefix is not None else ""
        sampled = f" {session.sampling.describe()}" if session.sampling is not None else ""
        base = f"no gradient: {session.reference.description}{memory}{shared}"
        if "task" in streams:
            events.append(f"reference forward{sampled}, {base}")
            if session.kept is not None:
                events.append(session.kept.describe())
        if session.stream is not None:
            events.append(f"retain stream: {session.stream.describe()}; the student runs on them, with gradients")
            events.append(f"{session.stream.of_base()}; {base}")

    def acting(place: str, group: Sequence[tuple[int, Method]]) -> list[str]:
        described = []
        for i, m in group:
            count = sum(p.numel() for p in session._params[i].values())
            expected = f", state about {_bytes(m.state_bytes(count))}" if m.state_bytes(count) else ""
            state = f", state {_size(states[i])}" if states[i] else expected
            every = f", refreshed every {m.refresh_every} steps" if isinstance(m.refresh_every, int) else ""
            described.append(f"{place}: {m.describe()}{every}{state}")
        return described

    on_update = [(i, m) for i, m in gradients if isinstance(m, GradientMethod) and m.apply_to == "update"]
    events += acting("loss", outputs)
    events += ["backward (these repeat for every micro-batch)", "gradients ready: accumulated, averaged"]
    events += acting("penalty gradient added", weights)
    events += acting("gradients transformed", [(i, m) for i, m in gradients if (i, m) not in on_update])
    events += ["clip, by the host", "optimizer step"]
    events += acting("update corrected", on_update)
    events += session.budgets.describe()
    if on_update and any(p.dtype in (torch.bfloat16, torch.float16) for p in params.values()):
        lines.append("Parameters are in 16 bits: rounding puts more back than a correction takes out; see `leakage`.")
    lines += [f"{n}. {event}" for n, event in enumerate(events, 1)]
    lines += session.notes
    if off := [m.name for m in session.methods if not m.strength]:
        lines.append(f"Off (strength 0): {', '.join(off)}.")
    return "\n".join(lines)
