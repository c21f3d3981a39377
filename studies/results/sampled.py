"""The page docs/results/sampled.md: is a random quarter of the sequences enough for the base? Read `sheet` first."""

from __future__ import annotations

from pathlib import Path

from .columns import Column, column
from .comparisons import LAB, MASKED, PLAIN, commands
from .sheet import Sheet, draw
from .tables import KEY, kept_table, numbers_table, opening, question_table
from .words import by_chance, clear, gathered, headline, told

QUARTER = "TMKL, a quarter"
QUESTIONS = (("**a quarter**", QUARTER, MASKED), ("a quarter", QUARTER, PLAIN), ("all sequences", MASKED, PLAIN))
CLAIM = """\
Ours, no paper's: with `reference_share: 0.25` the base runs on a random quarter of a step's sequences, and their
divergence is weighed by four. That is the same divergence on average, with noise, at a quarter of the base's cost
([how](../reference.md#a-share-of-the-sequences)). If the noise costs nothing, the two keep equally much."""
SETUP = """\
The lab's aligned model learns *shift* (rotate letters; answer in a new format) with LoRA: r = 8, alpha = 16, all
linear layers, 60 steps of 16 sequences, so the base sees 4 of them; a constant rate after 5 steps. Kept, as losses in
nats per token: refusals of unseen forbidden prompts, answers to their harmless look-alikes, skills, a rare skill,
stories. *plain LoRA* tries learning rates; both others have the rate 0.004 and try the same four strengths. Recipe:
`recipes/results/sampled_reference.yaml`.
"""
LIMITS = """\
One small model of ours, one task, one share, 60 steps of 16. Noise is larger where a step has fewer sequences, and
averages out over more steps. *Within noise* says that three seeds see no difference, not that there is none: the
intervals show how large one could be. Levels are 75, 90 and 95 % of the way from the base to the best of *plain LoRA*.
Each comparison is judged by itself, and scores and levels of one experiment are no independent witnesses. What it
saves in time is on another page ([speed](../speed.md) has the base's whole cost).
"""


def sheet(results: Path, figures: bool = True) -> Sheet | None:
    """The page, from its ledger below docs/results/; None where nothing was run."""
    lab = column(results, "sampled_reference")
    if lab is None:
        return None
    if figures:
        draw(lab, [PLAIN, MASKED, QUARTER], [*LAB], results / "sampled" / "frontier.png")
    return Sheet(
        "The base on a quarter of the sequences: what is kept, at equal learning", "sampled",
        "docs/results/sampled/ledger.jsonl", CLAIM, verdict(lab), f"{SETUP}\n*Lab.* {opening(lab)}",
        result(lab), controls(lab), LIMITS, commands("sampled_reference"),
    )  # fmt: skip


def verdict(lab: Column) -> str:
    """What came out, in a few lines."""
    n = len(gathered([lab], QUARTER, MASKED))
    rows = [("A quarter against all sequences", QUARTER, MASKED), ("against the best plain LoRA", QUARTER, PLAIN)]
    return "\n".join(
        [
            headline(rows, {"lab": [lab]}),
            f"- **A quarter against all sequences:** {told([lab], QUARTER, MASKED)}.",
            f"- **A quarter against the best plain LoRA:** {told([lab], QUARTER, PLAIN)}.",
            f"- **All sequences against the best plain LoRA:** {told([lab], MASKED, PLAIN)}.",
            f"\nThe first line rests on {n} comparisons; {by_chance(n)}.",
        ]
    )


def result(lab: Column) -> str:
    """What each arm keeps, and the two forms against each other in numbers."""
    return "\n".join(
        [
            f"![what was kept, by task loss](sampled/frontier.png)\n\n### At task loss {lab.levels[1]:g}\n",
            KEY.format(theirs=MASKED),
            kept_table(lab, MASKED),
            f"\n### {QUARTER}, against {MASKED}, in numbers\n",
            numbers_table(lab, QUARTER, MASKED),
            "\n### On how many scores and levels: better ✓, worse ✗, within noise =\n",
            question_table(QUESTIONS, [lab]),
        ]
    )


def controls(lab: Column) -> str:
    """Both forms against the front that needs no base."""
    both = [f"*{name}*: {clear(('', one) for one in lab.pairs(name, PLAIN))}" for name in (MASKED, QUARTER)]
    return f"*{PLAIN}* needs no base at all. Against it, beyond noise: {'; '.join(both)}."
