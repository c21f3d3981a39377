"""Runs probes on every side, and picks up where a killed run was stopped.

What is finished is written at once, a file for each probe and side, and used again only while all that could change it
is the same: the items and settings of the probe, the weights of base and side, the versions. Read next: `probe`.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from holdfast.drift.entry import JSON
from holdfast.drift.environment import decisive
from holdfast.drift.models import Models
from holdfast.drift.probe import BASE, Answer, Found, Probe, ProbeError, digest_of
from holdfast.drift.score import Score

__all__ = ["Findings", "Progress", "measure"]


class Progress(Protocol):
    """Told what is going on; a progress bar, or nothing."""

    def start(self, probe: str, side: str, size: int) -> None:
        """A probe begins on one side, with so many items."""

    def tick(self, items: int) -> None:
        """So many items of it are finished."""


class Silent:
    """No progress bar."""

    def start(self, probe: str, side: str, size: int) -> None:
        """Say nothing."""

    def tick(self, items: int) -> None:
        """Say nothing."""


@dataclass(frozen=True)
class Findings:
    """What all probes found on one side."""

    scores: Mapping[str, Score]
    answers: tuple[Answer, ...]


def measure(
    models: Models,
    probes: Sequence[Probe],
    *,
    sides: Sequence[str] = (),
    folder: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Findings]:
    """Run every probe on every side.

    Args:
        models: what is asked.
        probes: with different names, and different names of scores.
        sides: which; all of them if empty.
        folder: where finished parts are kept; None: nowhere.
        progress: told what is going on.

    Raises:
        ProbeError: if two probes share a name or a score, or a probe did not give the same scores and items for every
            side.
    """
    if twice := [name for name, count in Counter(probe.name for probe in probes).items() if count > 1]:
        raise ProbeError("Probes of one run need different names:", [f"{name} is there twice" for name in twice])
    shown, found = progress or Silent(), dict[str, list[Found]]()
    for side in sides or tuple(models.sides):
        for probe in probes:
            shown.start(probe.name, side, probe.size)
            found.setdefault(side, []).append(_part(models, probe, side, folder, shown))
    whole = {side: _joined(parts) for side, parts in found.items()}
    if faults := list(_unpaired(whole)):
        raise ProbeError("The sides were not measured alike:", faults)
    return whole


def _part(models: Models, probe: Probe, side: str, folder: Path | None, progress: Progress) -> Found:
    """One probe on one side, from its file if that is there."""
    if folder is None:
        return probe.measure(models, side, progress.tick)
    path = folder / f"{probe.name}-{side}-{_key(models, probe, side)}.json"
    if path.is_file():
        try:
            found = Found.from_record(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError, KeyError) as error:
            raise ProbeError(f"{path} was damaged since it was written ({error}). Delete it and start again.") from None
        progress.tick(probe.size)
        return found
    found = probe.measure(models, side, progress.tick)
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".unfinished-{os.getpid()}")
    unfinished.write_text(json.dumps(found.to_record(), ensure_ascii=False), encoding="utf-8")
    unfinished.replace(path)
    return found


def _key(models: Models, probe: Probe, side: str) -> str:
    what: dict[str, JSON] = {"probe": probe.identity, "base": models.digest(BASE), "side": models.digest(side)}
    return digest_of({**what, "versions": decisive(), "device": str(models.device)})


def _joined(parts: Sequence[Found]) -> Findings:
    names = Counter(name for part in parts for name in part.scores)
    if twice := [f"{name} is given by {count} probes" for name, count in names.items() if count > 1]:
        raise ProbeError("Probes of one run need different scores:", twice)
    scores = {name: score for part in parts for name, score in part.scores.items()}
    return Findings(scores, tuple(answer for part in parts for answer in part.answers))


def _unpaired(whole: Mapping[str, Findings]) -> Iterator[str]:
    """What was measured on one side in another way than on the first, or not at all."""
    (first, base), *rest = whole.items()
    for side, findings in rest:
        for name in base.scores.keys() ^ findings.scores.keys():
            yield f"{name}: only one of {first} and {side} has it"
        for name in base.scores.keys() & findings.scores.keys():
            one, other = base.scores[name], findings.scores[name]
            if (one.n, one.categories) != (other.n, other.categories):
                yield f"{name}: {first} has {one.n} items and {side} {other.n}, or other categories"
