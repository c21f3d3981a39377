"""What is watched during training: the settings of `holdfast.watch` and of a recipe's `drift:`, checked all at once.

    drift: {suite: lab, every: 100, gate: gates/release.yaml, when_exceeded: stop}

It is always the validation split: what decides when a run stops, or which weights are kept, is not what is reported.
Read next: `watch`, which measures; docs/watch.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal, TypeVar, cast, get_args

from ..analysis.budgets import Gate, GateError
from ..analysis.gate_file import read_gate
from ..drift.entry import JSON
from ..drift.probe import Probe
from ..drift.suite import SuiteError, suite
from .drift_probes import CORE, LAB, NONE, Wanted, of_prompts, probes
from .lines import Faults, Node, Section, guess
from .model import LAB_MODELS

WhenExceeded = Literal["log", "stop", "keep_best"]
SPLIT: Literal["validation"] = "validation"
BOTH_PUT_BACK = "keep_best and load_best_model_at_end would both put weights back at the end: keep one of them"
T = TypeVar("T")


@dataclass(frozen=True)
class Watching:
    """What is measured, how often, and what happens when a budget is exceeded.

    Attributes:
        suite: as for `holdfast drift`: `lab`, `core`, or a file of prompts (empty: `lab` for the lab's models, else
            `core`); or probes.
        every: so many optimizer steps lie between two looks.
        gate: budgets, or their file.
        when_exceeded: `log` warns, `stop` ends the training, `keep_best` puts back the last weights within budget.
        batch_size: answers written at a time; scores do not depend on it.
        limit: so many pairs of the suite, or items of each of the lab's skills; None: all.
        max_new_tokens: where answers to prompts of a suite are cut off; the lab knows how long its own are.

    >>> [fault for _, fault in Watching(every=0, when_exceeded="stop").faults()]
    ['every must be a whole number >= 1, got 0', "when_exceeded: 'stop' needs a gate that says what is too much"]
    """

    suite: str | Path | tuple[Probe, ...] = ""
    every: int = 100
    gate: Gate | str | Path | None = None
    when_exceeded: WhenExceeded = "log"
    batch_size: int = 16
    limit: int | None = None
    max_new_tokens: int = 32

    def faults(self) -> Iterator[tuple[str, str]]:
        """What is wrong, each with the name of the setting; files are read."""
        for name in ("every", "batch_size", "limit", "max_new_tokens"):
            value = getattr(self, name)
            if (type(value) is not int or value < 1) and not (name == "limit" and value is None):
                yield name, f"{name} must be a whole number >= 1, got {value!r}"
        choices = get_args(WhenExceeded)
        if self.when_exceeded not in choices:
            said = f"when_exceeded must be one of {', '.join(choices)}, got {self.when_exceeded!r}"
            yield "when_exceeded", f"{said}.{guess(str(self.when_exceeded), choices)}"
        elif self.gate is None and self.when_exceeded != "log":
            yield "when_exceeded", f"when_exceeded: {self.when_exceeded!r} needs a gate that says what is too much"
        try:
            self.budgets()
        except GateError as error:
            yield from (("gate", f"{self.gate}: {fault}") for fault in error.faults)
        yield from (("suite", fault) for fault in self._suite_faults())

    def _suite_faults(self) -> Iterator[str]:
        if isinstance(self.suite, tuple):
            strangers = [type(one).__name__ for one in self.suite if not isinstance(one, Probe)]
            if not self.suite or strangers:
                yield f"suite must be a name, a file, or probes, got {', '.join(strangers) or 'an empty list'}"
            lost = [f.name for f in fields(self) if f.name in ("limit", "max_new_tokens") and not self._default(f.name)]
            yield from (f"{name} has no effect on probes that are made already: leave it out" for name in lost)
        elif str(self.suite) == LAB and not self._default("max_new_tokens"):
            yield "max_new_tokens has no effect on the lab, which knows how long its answers are: leave it out"
        elif str(self.suite) == NONE:
            yield "suite 'none' measures nothing: give lab, core, a file of prompts, or probes"
        elif str(self.suite) not in ("", LAB):
            try:
                suite(self.suite).select(split=SPLIT)
            except SuiteError as error:
                told = error.faults or (str(error),)
                yield from (f"{self.suite}: {fault}" for fault in told)

    def _default(self, name: str) -> bool:
        return bool(getattr(self, name) == getattr(Watching, name))

    def budgets(self) -> Gate | None:
        """The gate, read from its file if it is one.

        Raises:
            GateError: lists everything that is wrong with the file.
        """
        return self.gate if self.gate is None or isinstance(self.gate, Gate) else read_gate(self.gate)

    def probes(self, model: str, split: Literal["validation", "test"] = SPLIT) -> list[Probe]:
        """What measures, in training on the validation split.

        Args:
            model: its name, which says what an empty suite is.
            split: of the suite.
        """
        if isinstance(self.suite, tuple):
            return list(self.suite)
        name = str(self.suite) or (LAB if model in LAB_MODELS else CORE)
        wanted = Wanted(name, split, None if name == LAB else self.max_new_tokens)
        if self.limit is None:
            return probes(wanted, model)[0]
        if name == LAB:
            from ..lab import probes as lab

            return lab.probes(split, items=self.limit)
        few = suite(name).select(split=split)
        few = replace(few, pairs=_spread(few.pairs, self.limit), singles=_spread(few.singles, self.limit))
        return of_prompts(few, wanted, None, ())

    def described(self) -> dict[str, JSON]:
        """As a ledger records it."""
        what: JSON = [one.name for one in self.suite] if isinstance(self.suite, tuple) else Path(self.suite).name
        limit: dict[str, JSON] = {} if self.limit is None else {"limit": self.limit}
        own = isinstance(self.suite, tuple) or str(self.suite) == LAB  # which know how long their answers are
        length: dict[str, JSON] = {} if own else {"max_new_tokens": self.max_new_tokens}
        return {"suite": what or "default", **limit, **length}

    def __str__(self) -> str:
        """In a line, for a plan."""
        what = ", ".join(one.name for one in self.suite) if isinstance(self.suite, tuple) else str(self.suite)
        gate = f", gate {self.gate}; when exceeded: {self.when_exceeded}" if self.gate is not None else ""
        return f"{what or 'the default suite'}, every {self.every} steps{gate}"


def _spread(rows: tuple[T, ...], most: int) -> tuple[T, ...]:
    """At most so many, evenly from all of them: rows of one category often stand together.

    >>> _spread((1, 2, 3, 4, 5, 6), 3)
    (1, 3, 5)
    """
    return rows if len(rows) <= most else tuple(rows[place * len(rows) // most] for place in range(most))


def watching_of(node: Node, stages: Sequence[Mapping[str, object]], faults: Faults) -> Watching:
    """Read `drift:` of a recipe; what is wrong is noted on its line.

    Args:
        node: the mapping.
        stages: of each stage, the trainer's options.
        faults: where faults go.
    """
    section = Section(node, "drift", faults)
    asked = Watching(
        suite=section.text("suite"),
        every=section.whole("every", Watching.every, least=1) or Watching.every,
        gate=section.text("gate") or None,
        when_exceeded=cast(WhenExceeded, section.text("when_exceeded", "log")),
        batch_size=section.whole("batch_size", Watching.batch_size, least=1) or Watching.batch_size,
        limit=section.whole("limit", least=1),
        max_new_tokens=section.whole("max_new_tokens", Watching.max_new_tokens, least=1) or Watching.max_new_tokens,
    )
    section.close()
    given = node.value if isinstance(node.value, dict) else {}
    for key, fault in asked.faults():
        faults.add(given[key].line if key in given else node.line, fault)
    if asked.when_exceeded == "keep_best" and any(options.get("load_best_model_at_end") for options in stages):
        faults.add(node.line, BOTH_PUT_BACK)
    return asked
