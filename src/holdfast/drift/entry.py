"""One line of the ledger: the scores of one arm at one setting and seed, checked before it is written.

A number that was recorded wrongly cannot be found later, so an entry is refused when it is made, with all its faults at
once, and a line of another schema is refused when it is read. Standard library only.

Read next: `holdfast.drift.ledger`, the file that holds these lines.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from typing import Literal, NamedTuple, TypeAlias

from holdfast.drift.environment import environment
from holdfast.drift.score import LedgerError, Score, is_real

__all__ = ["JSON", "SCHEMA", "Entry", "LedgerError", "RunKey", "Score"]

JSON: TypeAlias = "Mapping[str, JSON] | Sequence[JSON] | str | int | float | bool | None"
SCHEMA = 2
"""2 added what a score was measured with and who answered; lines of schema 1 are read as they are."""
POSTHOC = ("scale", "checkpoint", "repair")
"""Settings that cost no training (an adapter's scale, an early checkpoint, a repair): entries that differ only in these
share one training run."""


class RunKey(NamedTuple):
    """What identifies a result apart from its split: used to ask what is already there.

    >>> RunKey.of("demo", "plain LoRA", {"scale": 1.0, "learning_rate": 1e-3}, seed=0).settings
    '{"learning_rate": 0.001, "scale": 1.0}'
    """

    experiment: str
    arm: str
    settings: str
    seed: int

    @classmethod
    def of(cls, experiment: str, arm: str, settings: Mapping[str, JSON], seed: int) -> RunKey:
        """The key of these settings; the order in which they are written does not matter."""
        return cls(experiment, arm, json.dumps(settings, sort_keys=True), seed)


@dataclass(frozen=True)
class Entry:
    """One line of the ledger: the scores of one arm, at one setting and seed, on one split.

    Args:
        experiment: which question this belongs to; a ledger may hold several.
        arm: what is being compared: a method or combination of methods; `"base"` is the model before tuning.
        settings: what was set by hand. `scale`, if there, is the post-hoc scale of the adapter (absent: 1).
        seed: of the training run.
        split: `"validation"` (to choose on) or `"test"` (to report).
        scores: by name; see `holdfast.analysis.scores` for the known ones.
        cost: by name, for example `train_seconds`; the training cost is repeated by every entry of a run.
        status: a failed run is recorded too, with its `error`; only its scores may be NaN or infinite.
        error: what went wrong.
        run: the training run; entries for other splits and scales share it. Derived from the rest if empty.
        time: ISO 8601, with time zone; now if empty.
        environment: versions and machine, without names of hosts or people.
        models: what answered: names and digests of the base and of what tuning made.
        command: how to measure it again.
        not_measured: by probe, why it was left out.

    Raises:
        LedgerError: lists everything that is wrong.

    >>> entry = Entry("demo", "plain LoRA", {"learning_rate": 1e-3}, 0, "test", {"skills": Score(0.8)})
    >>> Entry.from_json(entry.to_json()) == entry
    True
    """

    experiment: str
    arm: str
    settings: Mapping[str, JSON]
    seed: int
    split: str
    scores: Mapping[str, Score]
    cost: Mapping[str, float] = field(default_factory=dict)
    status: Literal["done", "failed"] = "done"
    error: str | None = None
    run: str = ""
    time: str = ""
    environment: Mapping[str, JSON] = field(default_factory=environment)
    models: Mapping[str, JSON] = field(default_factory=dict)
    command: str = ""
    not_measured: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        faults = list(self._faults())
        if faults:
            raise LedgerError(f"this entry of arm {self.arm!r} cannot be recorded:", faults)
        for name in (
            "settings",
            "environment",
            "models",
            "not_measured",
        ):  # a copy that the caller cannot change, in JSON's own types
            object.__setattr__(self, name, json.loads(json.dumps(getattr(self, name))))
        object.__setattr__(self, "scores", dict(self.scores))
        object.__setattr__(self, "cost", {name: float(cost) for name, cost in self.cost.items()})
        if not self.time:
            object.__setattr__(self, "time", datetime.now(UTC).isoformat(timespec="seconds"))
        if not self.run:
            trained = {name: value for name, value in self.settings.items() if name not in POSTHOC}
            of = repr(RunKey.of(self.experiment, self.arm, trained, self.seed))
            of += json.dumps(self.models, sort_keys=True) if self.models else ""  # other weights are another run
            digest = hashlib.sha256(of.encode())
            object.__setattr__(self, "run", digest.hexdigest()[:12])

    def _faults(self) -> Iterator[str]:
        for name in ("experiment", "arm", "split"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name).strip():
                yield f"{name} must be a name, got {getattr(self, name)!r}"
        for name in ("run", "time", "command"):
            if not isinstance(getattr(self, name), str):
                yield f"{name} must be a string, got {getattr(self, name)!r}"
        if isinstance(self.time, str) and self.time:
            try:
                datetime.fromisoformat(self.time)
            except ValueError:
                yield f"time must be ISO 8601, got {self.time!r}"
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            yield f"seed must be a whole number, got {self.seed!r}"
        for name in ("settings", "environment", "scores", "cost", "models", "not_measured"):
            if not isinstance(getattr(self, name), Mapping):
                yield f"{name} must be a mapping, got {getattr(self, name)!r:.60}"
        for name in ("settings", "environment", "models", "not_measured"):
            yield from _json_faults(getattr(self, name), name)
        for cost, value in self.cost.items():
            if not is_real(value) or not math.isfinite(value) or value < 0:
                yield f"cost {cost!r} must be a number of at least 0, got {value!r}"
        yield from self._status_faults()

    def _status_faults(self) -> Iterator[str]:
        if self.status not in ("done", "failed"):
            yield f"status must be 'done' or 'failed', got {self.status!r}"
        if self.status == "failed" and not self.error:
            yield "a failed entry needs an error that says what happened"
        if self.status == "done" and self.error:
            yield f"a done entry has no error, got {self.error!r}"
        if self.status == "done" and not self.scores:
            yield "a done entry needs at least one score"
        scores: Mapping[str, object] = self.scores
        for name, score in scores.items():
            if not isinstance(score, Score):
                yield f"score {name!r} must be a Score, got {score!r}"
            elif self.status == "done":
                yield from (
                    f"score {name!r}: {fault} (a run that diverged is status='failed')" for fault in score.faults()
                )

    @property
    def key(self) -> RunKey:
        """What identifies this result apart from its split."""
        return RunKey.of(self.experiment, self.arm, self.settings, self.seed)

    def to_json(self) -> str:
        """The entry as one line of JSON, without the line end; NaN and infinity become strings."""
        record: dict[str, object] = {"schema": SCHEMA} | {part.name: getattr(self, part.name) for part in fields(self)}
        record["scores"] = {name: score.to_record() for name, score in self.scores.items()}
        return json.dumps(record, allow_nan=False, ensure_ascii=False)

    @classmethod
    def from_json(cls, line: str) -> Entry:
        """Read one line; refuse what this version does not understand."""
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise LedgerError(f"not JSON ({error}): {line[:60]!r}") from None
        schema = record.pop("schema", None) if isinstance(record, dict) else None
        if not isinstance(schema, int):
            raise LedgerError(f"not an entry of a ledger (no 'schema'): {line[:60]!r}")
        if schema not in (1, SCHEMA):
            raise LedgerError(
                f"written with ledger schema {schema}; this holdfast reads schemas 1 and {SCHEMA}: update holdfast"
            )
        names = {part.name for part in fields(cls)}
        record = ({"models": {}, "command": "", "not_measured": {}} if schema == 1 else {}) | record
        faults = [f"unknown field {name!r}" for name in sorted(record.keys() - names)]
        faults += [f"missing field {name!r}" for name in sorted(names - record.keys())]
        if faults:
            raise LedgerError(f"the fields of this entry are not those of schema {schema}:", faults)
        try:
            record["scores"] = {name: Score.from_record(score) for name, score in record["scores"].items()}
        except (TypeError, ValueError, AttributeError) as error:
            raise LedgerError(f"a score of this entry cannot be read: {error}") from None
        return cls(**record)


def _json_faults(value: object, where: str) -> Iterator[str]:
    if isinstance(value, Mapping):
        yield from (
            f"{where} has the key {name!r}, which is not a string" for name in value if not isinstance(name, str)
        )
        for name, part in value.items():
            yield from _json_faults(part, f"{where}[{name!r}]")
    elif isinstance(value, list | tuple):
        for place, part in enumerate(value):
            yield from _json_faults(part, f"{where}[{place}]")
    elif isinstance(value, float) and not math.isfinite(value):
        yield f"{where} is {value}, which JSON cannot hold"
    elif not (value is None or isinstance(value, str | int | float)):
        yield f"{where} is a {type(value).__name__}, which JSON cannot hold: {value!r:.60}"
