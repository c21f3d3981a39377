"""The page docs/results/alignguard.md: which terms of AlignGuard-LoRA keep more at equal learning? See `sheet`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from holdfast.analysis.frontier import at_matched_learning
from holdfast.drift.ledger import Ledger

from studies.alignguard import readings as study
from studies.alignguard.arms import DECAY, FULL, PAPER, PLAIN, PROJECTED, TERMS
from studies.alignguard.verdicts import shares

from .columns import Column
from .sheet import Sheet
from .tables import numbers_table, question_table
from .words import by_chance, clear, gathered, headline, seeds_told, told

TITLES = {"shift": "lab, new behaviour", "second": "lab, new knowledge", "stories": "stories260K, WikiSQL"}
MAIN = (
    ("**paper form**", PAPER, PLAIN),
    ("paper form", PAPER, DECAY),
    ("**full form**", FULL, PLAIN),
    ("full form", FULL, DECAY),
    ("full form", FULL, PAPER),
    ("full form", FULL, "EWC"),
    ("update decay", DECAY, PLAIN),
    ("L2-SP", "L2-SP", DECAY),
    ("EWC", "EWC", DECAY),
    ("O-LoRA", "O-LoRA", DECAY),
    ("SafeLoRA", PROJECTED, PLAIN),
)
CONTROLS = (
    ("full form or its spectrum turned at random?", FULL, f"{FULL}, rotated"),
    ("paper form or its spectrum turned at random?", PAPER, f"{PAPER}, rotated"),
    ("paper form: Fisher of refusals or of text?", PAPER, f"{PAPER}, text Fisher"),
    ("full form: do skills and text belong into it?", FULL, f"{FULL}, alignment only"),
)
ABLATION = tuple(
    row
    for term in TERMS
    for row in (
        (f"without {term}", f"without {term}", PAPER),
        (f"{term} alone", f"{term} alone", PLAIN),
        (f"{term} alone", f"{term} alone", DECAY),
    )
)
CLAIM = """\
AlignGuard-LoRA (arXiv 2508.02079) adds four penalties to LoRA fine-tuning and reports up to 50 % less alignment drift
than plain fine-tuning, at no loss on the task; each of its terms is said to contribute."""
SETUP = """\
From the ledger of [the ablation](../alignguard.md): the lab's aligned model learns a harmless task (*shift* or
*second*), stories260K learns WikiSQL; kept: refusals of unseen forbidden prompts, harmless look-alikes, skills, text,
and of stories260K its stories. The paper's full text and code could not be had: the *paper form* follows secondary
sources ([what is followed](../papers.md)). The *full form* is ours: one penalty, the whole Kronecker quadratic of the
Fisher over refusals, skills and text. *update decay* is a penalty on the size of the weight update that knows nothing
of alignment.
"""
LIMITS = """\
Two toy tasks on one toy model, one task on one small real model, short runs; nothing reproduces the paper's numbers.
All arms but *plain LoRA* have one learning rate and try two or three strengths; an arm that would need another rate
is wronged. Three things of that study were changed after seeing seeds 0 to 2, which its page names. Each comparison
is judged by itself. Whether the *full form* beats update decay depends on what its Fisher was shown: it protects
that.
"""


def sheet(results: Path, figures: bool = True) -> Sheet | None:
    """The page, from the ledger of the ablation; its figures are that page's."""
    columns = columns_of(results)
    if not columns:
        return None
    return Sheet(
        "AlignGuard-LoRA: which terms earn their place, at equal learning", "alignguard",
        "docs/results/alignguard/ledger.jsonl", CLAIM, verdict(columns),
        f"{SETUP}\nSeeds. {'; '.join(f'{each.title}: {seeds_told(each)[:-1]}' for each in columns)}.",
        result(columns), controls(columns), LIMITS,
        "    make alignguard",
    )  # fmt: skip


def columns_of(results: Path) -> list[Column]:
    """The scenarios, each at the level that its study judges at."""
    found = []
    for scenario, title in TITLES.items():
        entries = study.in_order(Ledger(results / "alignguard" / "ledger.jsonl").entries(scenario))
        if entries:
            level = [study.JUDGED_AT[scenario]]
            learnt = study.LEARNT[scenario]
            readings = at_matched_learning(entries, learnt, study.JUDGED[scenario], level, kinds=study.KINDS)
            found.append(Column(title, learnt, entries, readings, kinds=study.KINDS))
    return found


def verdict(columns: Sequence[Column]) -> str:
    """What came out, in a few lines."""
    lines = (
        ("The paper's form against plain LoRA at its best", PAPER, PLAIN),
        ("The paper's form against update decay", PAPER, DECAY),
        ("The full form against plain LoRA", FULL, PLAIN),
        ("The full form against update decay", FULL, DECAY),
        ("The full form against its own spectrum turned at random", FULL, f"{FULL}, rotated"),
    )
    n = sum(len(gathered(columns, mine, theirs)) for _, mine, theirs in lines)
    terms = [f"{term} {told(columns, f'without {term}', PAPER)}" for term in TERMS]
    rows = [("The paper's form against plain LoRA", PAPER, PLAIN), ("against update decay", PAPER, DECAY)]
    rows += [("the full form, which is ours, against plain LoRA", FULL, PLAIN), ("against update decay", FULL, DECAY)]
    return "\n".join(
        [
            headline(rows, {"lab and real weights": columns}),
            *(f"- **{name}:** {told(columns, mine, theirs)}." for name, mine, theirs in lines),
            f"- **Half the drift?** {halved(columns)}",
            f"- **Does a term earn its place?** The paper's form without it, against with it: {'; '.join(terms)}. A "
            "term that earned its place would make that *worse*.",
            f"\nThe first lines rest on {n} comparisons; {by_chance(n)}.",
        ]
    )


def halved(columns: Sequence[Column]) -> str:
    """In how many scores the drift is half of that of plain LoRA or less."""
    told = []
    for mine in (PAPER, FULL):
        each = [
            share
            for scenario, title in TITLES.items()
            for column in columns
            if column.title == title and {mine, PLAIN} <= {*column.arms}
            for share in shares(column.entries, column.readings, mine, PLAIN, scenario).values()
        ]
        words = [share.verdict for share in each if share.share == share.share]
        told.append(
            f"the {mine} beyond noise in {words.count('yes')}, on average in {words.count('on average')} more, of "
            f"{len(words)} scores in which plain LoRA drifts beyond noise"
        )
    return f"{'; '.join(told)}."


def result(columns: Sequence[Column]) -> str:
    """Counts in all scenarios, and what is beyond noise."""
    parts = [
        "In how many scores the first arm is better ✓, worse ✗ or neither = , at the level that the ablation judges:\n",
        question_table(MAIN, columns),
    ]
    for mine, theirs in ((PAPER, PLAIN), (PAPER, DECAY), (FULL, PLAIN), (FULL, DECAY)):
        found = [(each.title, one) for each in columns for one in each.pairs(mine, theirs)]
        parts.append(f"\n*{mine}* against *{theirs}*, beyond noise: {clear(found)}.")
        for each in columns:
            if each.pairs(mine, theirs):
                parts += [f"\n{each.title}:\n", numbers_table(each, mine, theirs)]
    return "\n".join(parts)


def controls(columns: Sequence[Column]) -> str:
    """Another Fisher in its place; every term without and alone."""
    terms = "\nEvery term, left out of the paper's form and alone:\n"
    return "\n".join([question_table(CONTROLS, columns), terms, question_table(ABLATION, columns)])
