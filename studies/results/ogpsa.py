"""The page docs/results/ogpsa.md: does projecting off retain gradients keep more, at equal refusal? See `sheet`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from holdfast.analysis.frontier import at_matched_learning
from holdfast.drift.ledger import Ledger

from studies.alignment_tax import readings as tax
from studies.stories_safety import readings as real
from studies.stories_safety.arms import EXPERIMENT

from .columns import Column
from .sheet import Sheet
from .tables import numbers_table, question_table
from .words import by_chance, gathered, headline, seeds_told, told

PIPELINES = {"sft": "SFT", "dpo": "DPO", "sft_dpo": "SFT then DPO", "sft_large": "SFT, batches of 128"}
ONE_NAME = {"OGPSA as published": "as published", "OGPSA exact": "update", "OGPSA exact, metric": "update, metric"}
QUESTIONS = (
    ("as published", "as published", "naive"),
    ("official code, no leak", "official code", "naive"),
    ("official code, leaking", "official code, leaking", "naive"),
    ("does the leak matter?", "official code, leaking", "official code"),
    ("**ours**: the update is projected", "update", "naive"),
    ("ours", "update", "as published"),
    ("ours", "update", "random subspace"),
    ("ours", "update", "adapter scaling"),
    ("ours", "update", "replay"),
    ("ours, replay of equal cost", "update", "replay, equal cost"),
    ("ours, refreshed as needed", "update, refresh auto", "naive"),
    ("ours, rank 32, as needed", "update, rank 32, refresh auto", "naive"),
    ("ours, rank 32, as needed", "update, rank 32, refresh auto", "replay, 16 rows"),
    ("as published", "as published", "random subspace"),
    ("random subspace, the control", "random subspace", "naive"),
    ("a weaker adapter", "adapter scaling", "naive"),
    ("replay", "replay", "naive"),
)
CLAIM = """\
OGPSA (arXiv 2602.07892) projects the gradient of safety training off a few gradients on general data. In SFT then DPO
its average gain is reported as 42.7 % against 34.0 % for plain training (Qwen) and 33.0 % against 19.7 % (Llama 3.1),
at its authors' settings, one for each method."""
SETUP = """\
*Lab:* the pretrained model learns to refuse forbidden how-to questions, in four pipelines ([the
study](../alignment-tax.md), its ledger); kept: harmless look-alikes are not refused, skills are not lost. *Real
weights:* stories260K learns to refuse the prompts of AdvBench ([the study](../stories-safety.md)); kept: stories, Oz,
answers to harmless prompts. *naive* is plain LoRA over its learning rates and numbers of steps; *as published* is the
paper's form; *official code* projects in each tensor by itself, and *leaking* adds the reference gradients to the
next step, as that code does by accident; *ours* projects the update that AdamW makes, off 16 gradients, refreshed
every 5 steps; *random subspace*: off 16 random ones.
"""
LIMITS = """\
One toy base and one small real model; the paper's have 7 and 8 billion parameters, and its scores are other ones: its
numbers are not reproduced. Every arm tries learning rates (three or four) and numbers of steps, and nothing else of
it is tuned. Scores of one run are no independent witnesses. Each comparison is judged by itself. What replay trains
on the projection reads too, so what the two are compared on is the use of the same rows. More questions, and all
numbers: [the lab](../alignment-tax.md), [real weights](../stories-safety.md).
"""


def sheet(results: Path, figures: bool = True) -> Sheet | None:
    """The page, from the ledgers of both studies; its figures are theirs."""
    columns = [*lab_columns(results), *real_column(results)]
    if not columns:
        return None
    return Sheet(
        "OGPSA: what projecting off retain gradients keeps, at equal refusal", "ogpsa",
        "docs/results/alignment-tax/ledger.jsonl and docs/results/stories-safety/ledger.jsonl", CLAIM,
        verdict(columns), setup(columns), result(columns), controls(columns), LIMITS,
        "    make tax\n    HOLDFAST_DATA=... python -m studies.stories_safety run",
    )  # fmt: skip


def lab_columns(results: Path) -> list[Column]:
    """The pipelines of the lab, at equal refusal of unseen prompts."""
    found = []
    for pipeline, title in PIPELINES.items():
        entries = tax.in_order(Ledger(results / "alignment-tax" / "ledger.jsonl").entries(pipeline))
        if entries:
            readings = at_matched_learning(entries, "refusal", tax.JUDGED, tax.LEVELS["refusal"], kinds=tax.KINDS)
            found.append(Column(f"lab, {title}", "refusal", entries, readings, kinds=tax.KINDS))
    return found


def real_column(results: Path) -> list[Column]:
    """stories260K, at equal refusal loss, its arms under the names of the lab's."""
    entries = Ledger(results / "stories-safety" / "ledger.jsonl").entries(EXPERIMENT)
    entries = [replace(entry, arm=ONE_NAME.get(entry.arm, entry.arm)) for entry in entries]
    if not entries:
        return []
    readings = at_matched_learning(
        entries, real.LEARNT, real.LOST, real.JUDGED, kinds=real.KINDS, along=real.ALONG
    )  # fmt: skip
    return [Column("stories260K", real.LEARNT, entries, readings, kinds=real.KINDS)]


def verdict(columns: Sequence[Column]) -> str:
    """What came out, in a few lines."""
    lab, weights = columns[:-1], columns[-1:]
    lines = (
        ("The paper's form against plain LoRA at its best", "as published", "naive"),
        ("Ours, the update projected, against plain LoRA", "update", "naive"),
        ("Ours against the paper's form", "update", "as published"),
        ("Ours against replay of the same rows", "update", "replay"),
        ("Ours against replay of equal cost", "update", "replay, equal cost"),
        ("Ours against a weaker adapter, which costs nothing", "update", "adapter scaling"),
        ("The control, random directions, against plain LoRA", "random subspace", "naive"),
    )
    n = sum(len(gathered(columns, mine, theirs)) for _, mine, theirs in lines)
    rows = [("The paper's form against plain LoRA", "as published", "naive"), ("ours", "update", "naive")]
    rows += [("ours against replay", "update", "replay")]
    return "\n".join(
        [
            headline(rows, {"lab": lab, "real weights": weights}),
            *(
                f"- **{name}:** lab {told(lab, mine, theirs)}; real weights {told(weights, mine, theirs)}."
                for name, mine, theirs in lines
            ),
            f"\n{n} comparisons; {by_chance(n)}.",
        ]
    )


def setup(columns: Sequence[Column]) -> str:
    """What was run."""
    seeds = "; ".join(f"{each.title}: {seeds_told(each)[:-1]}" for each in columns)
    levels = "; ".join(f"{each.title} {', '.join(f'{level:g}' for level in each.levels)}" for each in columns)
    return f"{SETUP}\nSeeds. {seeds}. Levels of refusal (lab) and of refusal loss (stories260K): {levels}."


def result(columns: Sequence[Column]) -> str:
    """Counts in all experiments, and two comparisons in numbers."""
    parts = [
        "In how many scores and levels the first arm is better ✓, worse ✗ or neither = :\n",
        question_table(QUESTIONS, columns),
    ]
    for mine, theirs in (("as published", "naive"), ("update", "naive"), ("update", "replay")):
        for each in columns:
            if {mine, theirs} <= {*each.arms}:
                parts += [f"\n### {mine} against {theirs}: {each.title}\n", numbers_table(each, mine, theirs)]
    return "\n".join(parts)


def controls(columns: Sequence[Column]) -> str:
    """Random directions, the leak, and rank."""
    lines = (
        ("Random directions of the same number against none", "random subspace", "naive"),
        ("The update projected off retain gradients against off random directions", "update", "random subspace"),
        ("The leak of the official code", "official code, leaking", "official code"),
        ("Without the harmless look-alikes among its rows", "update, no look-alikes", "update"),
        ("The optimizer's own metric", "update, metric", "update"),
    )
    return "\n".join(f"- {name}: {told(columns, mine, theirs)}." for name, mine, theirs in lines)
