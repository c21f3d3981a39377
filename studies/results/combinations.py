"""The page docs/results/combinations.md: do two methods in different spaces keep more than one? Read `sheet` first."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from studies.common_readings import counted

from .columns import Column, column
from .comparisons import DECAY, LAB, MASKED, PLAIN, REPLAY, commands
from .sheet import Sheet, draw
from .tables import KEY, best_table, kept_table, opening, question_table
from .words import by_chance, clear, first_look, tally, verdict

PARTS = {
    "self-replay + update decay": (REPLAY, DECAY),
    "self-replay + fisher": (REPLAY, "fisher"),
    "self-replay + projection": (REPLAY, "projection"),
    "self-replay + prompt KL": (REPLAY,),
    "TMKL + update decay": (MASKED, DECAY),
    "TMKL + fisher": (MASKED, "fisher"),
    "TMKL + projection": (MASKED, "projection"),
}
SINGLE = (PLAIN, DECAY, MASKED, "fisher", "projection", REPLAY)
CLAIM = """\
Methods in different spaces (what the model says, how its weights move, which gradients pass) should add up: each
holds what the other lets go. No paper claims it for these pairs; holdfast lets them be combined, so it should know."""
SETUP = """\
The lab's aligned model learns *shift* (new behaviour) or *second* (new knowledge) with LoRA, 60 steps of 16 (with
*self-replay* 12 of the task and 4 of its pool), rate 0.004. *fisher*: the full form of the alignment penalty, its
Fisher over refusals, skills and text; *projection*: the update is projected off retain gradients of the same rows,
refreshed every 10 steps; *prompt KL*: the full KL on the prompt's positions at strength 1. In a pair the second
method has one strength (update decay and fisher 0.003), and the first tries two. The pairs with fisher and with
projection read rows of true data, self-replay alone does not. Recipes: `recipes/results/combinations_shift.yaml`,
`combinations_second.yaml`; of *shift*, plain LoRA, update decay and TMKL by themselves are those of `tmkl.yaml`.
"""
LIMITS = """\
Two tasks of one toy model, LoRA of one rank, short runs. A pair has two strengths to try, a single method two to
four: a pair that would need another balance is wronged. The better single method is named on validation rows for each
score and level by itself, so the rival of a pair may be one method in one score and the other in the next, which no
single run is: that favours the rivals. Each comparison is judged by itself; scores and levels of one task are no
independent witnesses.
"""


def sheet(results: Path, figures: bool = True) -> Sheet | None:
    """The page, from the ledgers below docs/results/; None where nothing was run."""
    columns = [each for name in ("shift", "second") if (each := column(results, f"combinations_{name}"))]
    if not columns:
        return None
    if figures:
        for each, name in zip(columns, ("shift", "second"), strict=False):
            shown = [PLAIN, MASKED, REPLAY, "self-replay + update decay", "TMKL + update decay"]
            draw(each, shown, [*LAB], results / "combinations" / f"{name}.png")
    return Sheet(
        "Combinations: do two methods keep more than the better of them?", "combinations",
        "docs/results/combinations/ledger.jsonl and docs/results/tmkl/ledger.jsonl", CLAIM, said(columns),
        f"{SETUP}\n" + "\n".join(f"- *{each.title}.* {opening(each)}" for each in columns), result(columns),
        controls(columns), LIMITS,
        commands("tmkl", "combinations_shift", "combinations_second"),
    )  # fmt: skip


def said(columns: Sequence[Column]) -> str:
    """What came out: each pair against the better of its parts, and against the best single method of all."""
    lines, found, winners = [], [], []
    for pair, parts in PARTS.items():
        own = [one for each in columns for one in each.against_best(pair, parts)]
        best = [one for each in columns for one in each.against_best(pair, SINGLE)]
        if own:
            found += [*own, *best]
            winners += [f"*{pair}*"] if verdict(best) == "better" else []
            lines.append(
                f"- **{pair}** against the better of its parts: **{verdict(own)}** ({tally(own)}); against the best "
                f"single method: **{verdict(best)}** ({tally(best)})."
            )
    best_of_all = ", ".join(winners) or "no pair"
    first = f"{first_look(columns)}**Leads the best single method beyond chance: {best_of_all}.**\n"
    missing = (
        "" if len(columns) > 1 else "\n*second* is not run yet: `python -m studies.results run combinations_second`."
    )
    tail = f"\n{counted(len(found), 'comparison')}; {by_chance(len(found))}.{missing}"
    return "\n".join([first, *lines, tail])


def result(columns: Sequence[Column]) -> str:
    """Every arm at the second level, and each pair against the better of its parts, in numbers."""
    parts = []
    for each, name in zip(columns, ("shift", "second"), strict=False):
        parts += [f"### {each.title}, at task loss {each.levels[1]:g}\n"]
        parts += [f"![what was kept, by task loss](combinations/{name}.png)\n", KEY.format(theirs=REPLAY)]
        parts += [kept_table(each, REPLAY), ""]
        for pair, names in PARTS.items():
            if table := best_table(each, [pair], names):
                parts += [f"#### {pair} against the better of its parts\n", table, ""]
    return "\n".join(parts)


def controls(columns: Sequence[Column]) -> str:
    """The parts by themselves, and what self-replay adds to them."""
    questions = [(part, part, PLAIN) for part in SINGLE if part != PLAIN]
    questions += [(pair, pair, part) for pair, parts in PARTS.items() for part in parts]
    best = [(each.title, one) for each in columns for pair in PARTS for one in each.against_best(pair, SINGLE)]
    return "\n".join(
        [
            "The parts against *plain LoRA*, and every pair against each of its parts:\n",
            question_table(questions, columns),
            f"\nBeyond noise, any pair against the best single method: {clear(best, rival=True)}.",
        ]
    )
