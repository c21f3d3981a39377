"""The page docs/results/tmkl.md: does masking the target keep more, at equal learning? Read `sheet` first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from holdfast.drift.ledger import Entry, Ledger

from studies.common_readings import at_start, counted, within
from studies.real_weights.arms import TASKS
from studies.real_weights.readings import KINDS as REAL_KINDS
from studies.real_weights.readings import LEARNT, in_order, read

from .columns import Column, column
from .comparisons import DECAY, FULL, KINDS, LAB, MASKED, PLAIN, commands
from .sheet import Sheet, draw
from .tables import KEY, kept_table, numbers_table, opening, question_table
from .words import by_chance, clear, gathered, headline, seeds_told, told

FAMILY = ("TMKL, gamma 0.5", "TMKL, gamma 1", "TMKL, prompts too", "TMKL, reverse", "TMKL, JS")
ADAPTERS = ("DoRA", "PiSSA", "AdaLoRA", "RandLoRA", "VeRA", "SineLoRA")
QUESTIONS = (
    ("TMKL", MASKED, PLAIN),
    ("full KL", FULL, PLAIN),
    ("**TMKL**", MASKED, FULL),
    ("TMKL", MASKED, DECAY),
    *((name, name, MASKED) for name in FAMILY),
    *((name, name, PLAIN) for name in FAMILY),
)
RATE, STRENGTH = 4e-3, 1.0  # of the contrast: one setting each, the paper's strength
CLAIM = """\
*Mask the Target* (Target-Masked KL, arXiv 2605.29498): a divergence to the base on the task's own tokens, with the
target taken out. At strength 1 it is reported to prevent 88 to 92 % of the rise of perplexity on WikiText-103, with
LoRA, DoRA, RandLoRA and SineLoRA, where the full KL prevents 85 to 90 %, and to learn the task as well or better.
Each is one setting; the tuning that it is compared with has one learning rate."""
SETUP = """\
The lab's aligned model learns *shift* (rotate letters; answer in a new format) with LoRA: r = 8, alpha = 16, all
linear layers, 60 steps of 16, a constant rate after 5 steps. Nothing in its data is forbidden and nothing is a
refusal. Kept, as losses in nats per token: refusals of unseen forbidden prompts, answers to their harmless
look-alikes, skills, a rare skill, stories. *plain LoRA* tries learning rates; every other arm has the rate 0.004 and
tries strengths. *gamma* weighs a token by (1 - p(target))^gamma, between TMKL (0) and the term of the full KL that it
is cut out of (1). *prompts too*: also on the prompt's positions. Recipes: `recipes/results/tmkl.yaml`,
`tmkl_adapters.yaml`. Real weights: stories260K learns WikiSQL or GSM8K ([that study](../real-weights.md), its
ledger).
"""
LIMITS = """\
One small model of ours, one task of it, one small real model; LoRA of one rank; 60 steps. The paper's models have 0.5
and 7 billion parameters, and its text is longer: nothing here reproduces its numbers, only its comparison. One
learning rate for every arm but *plain LoRA*, chosen in earlier studies of this task; an arm that would need another
is wronged. Levels are 75, 90 and 95 % of the way from the base to the best of *plain LoRA*, set before these runs. A
straight line between two points of a curved front shows more forgetting than there is. Each comparison is judged by
itself, and scores and levels of one experiment are no independent witnesses.
"""


def sheet(results: Path, figures: bool = True) -> Sheet | None:
    """The page, from the ledgers below docs/results/; None where nothing was run."""
    lab = column(results, "tmkl")
    if lab is None:
        return None
    adapters, real = column(results, "tmkl_adapters"), real_columns(results)
    if figures:
        draw(lab, [PLAIN, MASKED, FULL, DECAY], [*LAB], results / "tmkl" / "frontier.png")
    return Sheet(
        "Target-Masked KL: what masking keeps, at equal learning", "tmkl",
        "docs/results/tmkl/ledger.jsonl and docs/results/real-weights/ledger.jsonl", CLAIM,
        verdict(lab, real, adapters), f"{SETUP}\n*Lab.* {opening(lab)}" + adapters_opening(adapters),
        result(lab, real), controls(lab, adapters), LIMITS,
        commands("tmkl", "tmkl_adapters"),
    )  # fmt: skip


def real_columns(results: Path) -> list[Column]:
    """Both tasks of the study of real weights, under the names that the arms have here."""
    found = []
    for task, title in (("sql", "stories260K, WikiSQL"), ("gsm8k", "stories260K, GSM8K")):
        entries = in_order(Ledger(results / "real-weights" / "ledger.jsonl").entries(task))
        entries = [renamed(entry) for entry in entries]
        if entries:
            readings = [one for one in read(entries, task) if one.level >= TASKS[task].judged]
            found.append(Column(title, LEARNT, entries, readings, kinds=REAL_KINDS))
    return found


def renamed(entry: Entry) -> Entry:
    """The entry, with the name that its arm has in the lab's comparison."""
    return replace(entry, arm={"Target-Masked KL": MASKED}.get(entry.arm, entry.arm))


def verdict(lab: Column, real: Sequence[Column], adapters: Column | None) -> str:
    """What came out, in a few lines."""
    both = [lab, *real]
    n = sum(len(gathered(both, mine, theirs)) for mine, theirs in ((MASKED, PLAIN), (MASKED, FULL), (MASKED, DECAY)))
    rows = [("Against the best plain LoRA", MASKED, PLAIN), ("against the full KL", MASKED, FULL)]
    rows += [("against update decay", MASKED, DECAY)]
    lines = [
        headline(rows, {"lab": [lab], "real weights": real}),
        f"- **TMKL against the best plain LoRA:** in the lab {told([lab], MASKED, PLAIN)}; on real weights "
        f"{told(real, MASKED, PLAIN)}.",
        f"- **TMKL against the full KL:** in the lab {told([lab], MASKED, FULL)}; on real weights "
        f"{told(real, MASKED, FULL)}.",
        f"- **TMKL against update decay**, which needs no base: in the lab {told([lab], MASKED, DECAY)}; on real "
        f"weights {told(real, MASKED, DECAY)}.",
        f"- **What the published comparison would have shown:** {unmatched(lab)}",
    ]
    if adapters is not None:
        each = [f"{name} {told([adapters], f'{name} + TMKL', name)}" for name in ADAPTERS if name in adapters.arms]
        lines.append(f"- **With other adapters**, against the same adapter at its best: {'; '.join(each)}.")
    lines.append(f"\nThe first three lines rest on {n} comparisons; {by_chance(n)}.")
    return "\n".join(lines)


def unmatched(lab: Column) -> str:
    """One setting each, at the end of training, as if that were a comparison."""
    base, rows = at_start(lab.entries), []
    plain, masked = (ends(lab, arm, strength) for arm, strength in ((PLAIN, None), (MASKED, STRENGTH)))
    if not plain or not masked:
        return "not run."
    for score in LAB:
        drifts = [fmean(one[score] for one in side) - base[score].value for side in (plain, masked)]
        if drifts[0] > 0:
            rows.append((KINDS[score].title, 1 - drifts[1] / drifts[0]))
    prevented = ", ".join(f"{within(title)} {share:.0%}" for title, share in rows)
    learnt = [fmean(one[lab.learnt] for one in side) for side in (plain, masked)]
    return (
        f"at one setting each (rate {RATE:g}, strength {STRENGTH:g}, the end of training) TMKL prevents of the drift: "
        f"{prevented}. But it has learnt less: task loss {learnt[1]:.3f} against {learnt[0]:.3f}. The lines above are "
        "the same runs, at equal learning."
    )


def ends(lab: Column, arm: str, strength: float | None) -> list[dict[str, float]]:
    """By seed, the test scores of one setting at the end of training, not scaled."""
    fixed = {"learning_rate": RATE} if strength is None else {"strength": strength}
    return [
        {name: score.value for name, score in entry.scores.items()}
        for entry in lab.entries
        if (entry.arm, entry.split, entry.settings.get("scale")) == (arm, "test", 1.0)
        and "checkpoint" not in entry.settings
        and fixed.items() <= entry.settings.items()
    ]


def result(lab: Column, real: Sequence[Column]) -> str:
    """Tables of the lab and of real weights."""
    parts = [
        f"![what was kept, by task loss](tmkl/frontier.png)\n\n### In the lab, at task loss {lab.levels[1]:g}\n",
        KEY.format(theirs=PLAIN),
        kept_table(lab, PLAIN),
        f"\n### {MASKED} against {PLAIN}, in numbers\n",
        numbers_table(lab, MASKED, PLAIN),
        f"\n### {MASKED} against {FULL}, in numbers\n",
        numbers_table(lab, MASKED, FULL),
        "\n### On how many scores and levels: better ✓, worse ✗, within noise =\n",
        question_table(QUESTIONS, [lab, *real]),
    ]
    return "\n".join(parts)


def controls(lab: Column, adapters: Column | None) -> str:
    """The family, update decay and the adapters."""
    parts = [
        "*update decay* knows nothing of the base's words: what it keeps too is not owed to them. The family:\n",
        *(f"- *{name}* against *{MASKED}*: {told([lab], name, MASKED)}." for name in FAMILY if name in lab.arms),
        f"\nBeyond noise, *{MASKED}* against *{PLAIN}*: {clear(('', one) for one in lab.pairs(MASKED, PLAIN))}.",
    ]
    if adapters is None:
        return "\n".join([*parts, "\nOther adapters: not run yet (`python -m studies.results run tmkl_adapters`)."])
    questions = [(f"{name} + TMKL", f"{name} + TMKL", name) for name in ADAPTERS]
    questions += [(name, name, PLAIN) for name in ADAPTERS]
    table = question_table(questions, [adapters])
    title = f"\n### Other adapters, at task loss {adapters.levels[1]:g}\n"
    note = "PiSSA has no scales, since its scale 0 is not the base: only rates and checkpoints.\n"
    return "\n".join([*parts, title, note, table, "", kept_table(adapters, PLAIN)])


def adapters_opening(adapters: Column | None) -> str:
    """What was run of other adapters."""
    if adapters is None:
        return ""
    names = [name for name in adapters.arms if name.split(" + ")[0] in ADAPTERS]
    return f" *Adapters.* {counted(len(names), 'arm')} more, {seeds_told(adapters)}"
