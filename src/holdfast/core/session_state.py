"""What a checkpoint holds of a session, and how a session goes on from it.

States of methods, the reference's copy, the step, the random-number state and all that is drawn in order: a resumed run
equals an uninterrupted one bit for bit. Read next: `checkpoint`, which writes it whole or not at all.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from . import checkpoint

if TYPE_CHECKING:
    from .session import Session


def save(session: Session, folder: str | Path) -> None:
    """Write a session into a folder; see `Session.save`."""
    if session.kept is not None:
        session.kept.write()
    tensors = {f"{i}/{key}": t for i, state in enumerate(session.begin()) for key, t in state.items()}
    moves = next(session.model.parameters()).device.type != "cpu"
    on_host = [key for key, tensor in tensors.items() if moves and tensor.device.type == "cpu"]
    if session.reference is not None:
        tensors |= {f"reference/{key}": t for key, t in session.reference.state().items()}
    tensors["generator"] = session.generator.get_state()
    record = {
        "step": session.step,
        "refreshed": session._refreshed,
        "retain": session.retain.positions,
        "pool": session.stream.digest if session.stream is not None else None,
        "on_host": on_host,
        "budgets": session.budgets.state(),
        "methods": [m.describe() for m in session.methods],
    }
    checkpoint.write(Path(folder), tensors, record, sharded=session._sharded)


def load(session: Session, folder: str | Path) -> None:
    """Go on from what `save` wrote; see `Session.load`."""
    device = next(session.model.parameters()).device
    methods = [m.describe() for m in session.methods]
    tensors, record = checkpoint.read(Path(folder), methods, sharded=session._sharded)
    session.generator.set_state(tensors.pop("generator"))
    session._states, kept = checkpoint.parted(tensors, len(methods), device, record["on_host"])
    if session.reference is not None:
        session.reference.load(kept)
    if session.stream is not None:
        session.stream.resume(record.get("pool"))
    if session.kept is not None:
        session.kept.forget()
    if session.tap is not None:
        session._gradients.forget()
    session.budgets.load(record.get("budgets", session.budgets.state()))
    session.step, session._refreshed = record["step"], record["refreshed"]
    session.retain.positions.update(record["retain"])
