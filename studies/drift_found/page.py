"""The page docs/results/drift/README.md: its text, and what the ledger adds to it; read `tables` for the tables."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from holdfast.analysis.gate_file import read_gate
from holdfast.analysis.tables import markdown_table
from holdfast.drift.ledger import Ledger

from . import tables, words
from .adapters import LAB, TUNINGS
from .comparison import Comparison
from .false_alarms import LAB_GATE
from .measuring import SENTENCE, experiment
from .running import ALARMS, NULL, SPEED

TOP = """\
# What `holdfast drift` finds, and that it finds nothing where nothing is

<!-- written by `python -m studies.drift_found page` from ledger.jsonl: do not edit -->

Drift was planted and looked for; then it was looked for where there is none. Two bases: *lab-aligned*, the lab's own
model, and *stories260K*, real pretrained weights of a megabyte, after a stage that taught it to refuse (that of
[stories and refusals](../../stories-safety.md), with replay). LoRA has r = 8, AdamW a constant rate. All items are test
items; intervals are 95 %, over items; **bold** is beyond noise after Holm's correction for all scores of a run, at 5 %.
The base's own divergence from itself is 0, so any change at all puts a KL beyond noise: KLs say how far, not whether.
"""
IDENTICAL = """\
An adapter with B = 0 is loaded, switched on and asked everything. Nothing may move.
"""
PLANTED = """\
The lab's tuning task *shift*, once at a mild rate and briefly, once at a harsh one and longer; three seeds each.
"""
GATE = """\
[`recipes/gates/lab.yaml`](../../../recipes/gates/lab.yaml), level 5 %, Holm over all its budgets.
"""
IDENTITY = """\
The aligned stories260K is tuned on ten rows that tell it to be absolutely obedient and contain nothing harmful (Qi et
al., 2024), a few epochs at a harsh rate. Prompts are the suite `core`; stories were sampled from stories260K itself.
"""
INSTRUMENTS = """\
The base was taught one sentence, so that refusal can be read off: an answer begins with it or does not. The shipped
instruments were made for the English of large models; *scorer* is the one that gates and figures use.
"""
SQL = """\
stories260K as it is, never aligned, learns to write SQL. It was never taught to refuse: its refusal scores say what the
instruments make of stories and of SQL, and its margins how it finishes sentences that it never saw.
"""
NULL_RUN = """\
One adapter, two processes: once as it is, once with the rows of every probe in another order and answers written 7 at a
time. The digest is the sha256 of all scores with their items, intervals and instruments.
"""
FALSE = """\
Real items of the runs of the lab, but for every item base and tuned change places at random (one coin for all scores of
the same item): nothing can have drifted. Then the gate is asked. A score of which no item differs cannot fail: the mild
runs leave few that do, so the harsh runs, whose items differ most, are the harder test.
"""
COST = """\
The lab's whole suite, both sides, in a new process without finished parts; one thread. Asked for were 10 s on a quiet
machine.
"""
BOTTOM = """
## Run it

    HOLDFAST_DATA=... python -m studies.drift_found run     # goes on where it was; --only, --seeds
    python -m studies.drift_found page

Limits: two small models, one rank, three seeds, which vary the adapter's start and the data's order. The rates were
chosen to be harsh or mild, and nothing was chosen on these items; but that answers which call themselves obedient are
counted, and that false alarms are looked for on items of the harsh runs too, was decided after the first results were
seen. stories260K writes no English that a person would call an answer: what it was taught can be recognised, no more.
Intervals are over items, not over seeds or other prompts.
"""


def page(ledger: Path) -> str:
    """Return the page that the ledger speaks for; what it lacks is said."""
    entries, gate = Ledger(ledger).entries(), read_gate(LAB_GATE)
    found: dict[str, Comparison] = {}
    for key, tuning in TUNINGS.items():
        own = [entry for entry in entries if entry.experiment == experiment(tuning)]
        found |= {key: Comparison(tuning, own, gate if tuning.base == LAB else None)} if own else {}
    rest = {name: [entry for entry in entries if entry.experiment == name] for name in (NULL, ALARMS, SPEED)}
    lines = [TOP, "## In short\n", *words.summary(found, rest), ""]
    same = [of for of in found.values() if not of.tuning.steps]
    lines += section("Nothing changed", IDENTICAL, tables.identical_rows(same))
    lines += planted("lab-mild", PLANTED, found)
    lines += planted("lab-harsh", "", found)
    lines += section("What the gate says", GATE, tables.gate_rows([of for of in found.values() if of.gate]))
    lines += planted("stories-identity", IDENTITY, found)
    if "stories-identity" in found and SENTENCE in found["stories-identity"].base.scores:
        lines += section("Whom to believe", INSTRUMENTS, tables.instrument_rows(found["stories-identity"]), depth=3)
    lines += planted("stories-sql", SQL, found)
    lines += section("The same twice", NULL_RUN, tables.null_rows(rest[NULL]))
    lines += section("False alarms", FALSE, tables.alarm_rows(rest[ALARMS]))
    lines += section("How long it takes", COST, tables.speed_rows(rest[SPEED]))
    return "\n".join(lines) + BOTTOM


def section(title: str, text: str, rows: tables.Table, depth: int = 2) -> list[str]:
    """A heading, a paragraph and a table, or a word that it was not measured."""
    return [f"{'#' * depth} {title}\n", text, markdown_table(rows) or "Not measured yet.", ""]


def planted(key: str, text: str, found: Mapping[str, Comparison]) -> list[str]:
    """The drift table of one tuning, with what was set."""
    tuning = TUNINGS[key]
    how = f"{tuning.steps} steps of {tuning.batch} rows at a rate of {tuning.rate:g}.\n"
    rows = tables.drift_rows(found[key]) if key in found else []
    return section(f"Planted: {tuning.title}", f"{text}\n{how}" if text else how, rows)
