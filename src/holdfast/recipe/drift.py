"""What tuning broke: measures a base and what was made of it, into a ledger, a page, and a gate's verdict.

    output/
      ledger.jsonl      the scores of every side, item by item
      report.html       one page for people; drift.md, the table for a model card
      answers.jsonl     every answer with its verdicts
      gate.json gate.xml gate.md      where a gate was given
      parts/            what is finished, for a run that is started again

Read next: `drift_probes`, what is measured; `sides`, how models are loaded; docs/drift.md.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.errors import WrongSetup
from ..drift.ledger import JSON, Entry, Ledger, Score
from ..drift.measuring import Findings, Progress, measure
from ..drift.probe import BASE, Answer
from .drift_probes import Wanted, probes, resolved
from .model import ModelSpec
from .sides import Loaded, load

if TYPE_CHECKING:
    from ..analysis.budgets import Gate
    from ..analysis.gate import Judgement

GENERIC = ("adapter", "model", "result", "final")


@dataclass(frozen=True)
class Question:
    """What `holdfast drift` is asked.

    Attributes:
        base: the model before tuning.
        tuned: by name, folders of adapters or models; the first is judged, a second is what it is compared with.
        wanted: what is measured.
        output: the folder of results.
        ledger: the ledger; that of the output folder if None.
        gate: a file of budgets.
        seed: of the training run, for the record: nothing is drawn here.
        batch_size: answers written at a time, by the model's size if None; scores do not depend on it.
        device: where models run.
        any_base: take adapters that name another base.
        command: how this was asked.
    """

    base: ModelSpec
    tuned: Mapping[str, str]
    wanted: Wanted
    output: Path
    ledger: Path | None = None
    gate: Path | None = None
    seed: int = 0
    batch_size: int | None = None
    device: str | None = None
    any_base: bool = False
    command: str = ""


@dataclass(frozen=True)
class Answered:
    """What came out: an entry for each side, the base first, the gate's verdict, the page, and what to doubt."""

    entries: Mapping[str, Entry]
    judgement: Judgement | None
    report: Path
    not_measured: Mapping[str, str] = field(default_factory=dict)
    doubts: tuple[str, ...] = ()


def run(asked: Question, say: Callable[[str], None] = print, progress: Progress | None = None) -> Answered:
    """Measure, record, judge, and write the page.

    Raises:
        WrongSetup, ProbeError, SuiteError, JudgeError, GateError: for whatever cannot be used; before anything is
            measured, where that can be known.
    """
    from ..analysis.gate_file import read_gate

    if not asked.tuned:
        raise WrongSetup("There is nothing to compare with the base. Give --adapter DIR, or --tuned DIR.")
    if asked.gate is not None:  # a fault is told now, not after an hour
        _refuse_unknown(asked.gate, read_gate(asked.gate))
    asked = replace(asked, wanted=resolved(asked.wanted, asked.base.name))
    chosen, left_out = probes(asked.wanted, asked.base.name)
    parts = asked.output / "parts"
    loaded = load(
        asked.base, asked.tuned, device=asked.device, batch_size=asked.batch_size, cache=parts,
        any_base=asked.any_base, say=say,
    )  # fmt: skip
    left_out |= {probe.name: why for probe in chosen if (why := probe.unfit(loaded.models))}
    chosen = [probe for probe in chosen if probe.name not in left_out]
    found = measure(loaded.models, chosen, folder=parts, progress=progress)
    entries = {side: _entry(asked, loaded, side, findings, left_out) for side, findings in found.items()}
    first = next(iter(asked.tuned))
    gate = read_gate(asked.gate, scores=sorted(entries[BASE].scores)) if asked.gate else None
    judgement = _judge(gate, entries, first)
    _record(Ledger(asked.ledger or asked.output / "ledger.jsonl"), entries.values())
    answers = {side: findings.answers for side, findings in found.items()}
    notes = {probe.name: probe.note for probe in chosen if probe.note}
    doubts = tuple(disagreements(entries[BASE].scores, entries[first].scores))
    notes |= {"refusal": " ".join((*doubts, notes["refusal"]))} if doubts else {}
    report = _write(asked, entries, answers, judgement, notes)
    return Answered(entries, judgement, report, left_out, doubts)


def name_of(folder: str) -> str:
    """What a tuned model is called: its folder, or the one above where that says nothing.

    >>> name_of("runs/tmkl/adapter"), name_of("runs/tmkl/checkpoint-200"), name_of("my-adapter")
    ('tmkl', 'tmkl-checkpoint-200', 'my-adapter')
    """
    path = Path(folder)
    above = path.absolute().parent.name
    if path.name in GENERIC and above:
        return above
    return f"{above}-{path.name}" if path.name.startswith("checkpoint-") and above else path.absolute().name


def _entry(asked: Question, loaded: Loaded, side: str, findings: Findings, left_out: Mapping[str, str]) -> Entry:
    from ..analysis.paired import interval_of
    from ..analysis.scores import find

    shares = {name for name in findings.scores if (known := find(name)) and known.share}
    scores = {n: replace(s, interval=interval_of(s, share=n in shares)) for n, s in findings.scores.items()}
    models: dict[str, JSON] = {BASE: dict(loaded.described[BASE])}
    if side != BASE:
        models["tuned"] = dict(loaded.described[side])
    return Entry(
        experiment=f"drift of {Path(asked.base.name).name}",
        arm=side,
        settings={"model": asked.base.name, **asked.wanted.settings()},
        seed=asked.seed,
        split=asked.wanted.split,
        scores=scores,
        models=models,
        command=asked.command,
        not_measured=dict(left_out),
    )


def disagreements(base: Mapping[str, Score], tuned: Mapping[str, Score]) -> Iterator[str]:
    """Where two instruments read the same answers and their drifts do not even overlap: read the answers yourself."""
    from ..analysis.changes import change

    for name in ("refusal", "over_refusal"):
        for other in (one for one in base if one.startswith(f"{name}.")):
            first, second = (change(base[one], tuned[one]) for one in (name, other))
            (low, high), (lowest, highest) = first.interval(), second.interval()
            if high < lowest or highest < low:
                yield (
                    f"Instruments disagree: {name} drifted by {first.value:+.2f}, {other} by {second.value:+.2f}. "
                    "Read the answers that changed before you believe either."
                )


def _refuse_unknown(path: Path, gate: Gate) -> None:
    """Raise for budgets of scores that no probe could give."""
    from ..analysis.budgets import GateError, guess
    from ..analysis.scores import KNOWN, find

    names = dict.fromkeys(budget.score for budget in gate.budgets)
    if faults := [f"no score is called {name!r}.{guess(name, KNOWN)}" for name in names if find(name) is None]:
        raise GateError(str(path), faults)


def _judge(gate: Gate | None, entries: Mapping[str, Entry], tuned: str) -> Judgement | None:
    from ..analysis.gate import judge

    return None if gate is None else judge(gate, entries[BASE].scores, entries[tuned].scores)


def _record(ledger: Ledger, entries: Iterable[Entry]) -> None:
    """Append what the ledger does not hold yet: asking again adds nothing."""
    known = [(e.key, e.split, e.models, e.scores) for e in ledger.entries(status=None)]
    for entry in entries:
        if (entry.key, entry.split, entry.models, entry.scores) not in known:
            ledger.append(entry)


def _write(
    asked: Question,
    entries: Mapping[str, Entry],
    answers: Mapping[str, tuple[Answer, ...]],
    judgement: Judgement | None,
    notes: Mapping[str, str],
) -> Path:
    from ..analysis.drift_report import write_drift_report
    from ..analysis.gate_reports import as_json, as_junit, as_markdown
    from ..analysis.model_card import drift_table

    first, *others = asked.tuned
    files = {"drift.md": drift_table(entries[BASE], entries[first], judgement)}
    lines = ({"side": side, **asdict(answer)} for side, found in answers.items() for answer in found)
    files["answers.jsonl"] = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    if judgement is not None:
        files |= {"gate.json": as_json(judgement), "gate.xml": as_junit(judgement), "gate.md": as_markdown(judgement)}
    for name, text in files.items():
        unfinished = asked.output / f".{name}.unfinished"
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(asked.output / name)
    return write_drift_report(
        asked.output / "report.html", entries[BASE], [entries[name] for name in asked.tuned], answers=answers,
        judgement=judgement, reduction_against=others[0] if others else None, notes=notes,
    )  # fmt: skip
