"""The page docs/results/default.md: does `recommended()` stand, on tasks not used to find it? Read `sheet` first."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from studies.common_readings import counted

from .columns import Column, column
from .comparisons import DECAY, FULL, MASKED, PLAIN, REPLAY, STUDIES, commands
from .sheet import Sheet, draw
from .tables import KEY, best_table, kept_table, opening, question_table
from .words import by_chance, clear, first_look, tally, verdict

NAMES = ("default_word_problems", "default_plays", "default_safety", "combinations_second")
RIVALS = (PLAIN, DECAY, "L2-SP", FULL, MASKED, "TMKL, prompts too", "fisher", "projection")
TRUE_DATA = "replay of true data"
MORE = ("self-replay + prompt KL", "self-replay + update decay", "self-replay + projection")
CLAIM = """\
`recommended()` is self-replay: a quarter of every step's sequences are the base's own, and on them the model is held
to what the base says. Our own studies found it on *shift* and *second* of the lab and on WikiSQL and GSM8K of
stories260K. Is it best on other tasks too, and is something beside it better?"""
SETUP = """\
- *stories260K, MAWPS*: a question in words to its equation; *stories260K, Shakespeare*: the start of a scene to how
  it goes on. Kept: stories sampled afresh from the base, Oz, WikiText. 80 steps of 8 sequences (6 and 2), rate 0.003.
- *lab, learning to refuse*: the pretrained model learns refusals, from refusals alone. Kept: answers to harmless
  look-alikes, skills, a rare skill, stories. 40 steps of 16 (12 and 4), rate 0.004.
- *lab, new knowledge*: the aligned model learns *second*; a rare skill, which the base's own pool hardly ever shows,
  is among what is kept. This task was used to find the default; the rare skill's row is what is asked here.

*plain LoRA* tries three rates; it and every other arm is read with its adapter scales and an early checkpoint.
*replay of true data* mixes real rows of what must stay into the batch, at two rates: the bound that a method without
data cannot be expected to pass. It is not among the rivals. Recipes: `recipes/results/default_*.yaml`,
`combinations_second.yaml`.
"""
LIMITS = """\
Small models, short runs, LoRA of one rank, one learning rate for every arm but plain LoRA and replay. The best rival
is named on validation rows for each score and level by itself: it may be another method in each, which no single run
is, and so the bar is higher than any one method. The pool and the stories that are measured are samples of one base:
of all that could be kept, the easiest; Oz, WikiText, and in the lab the rare skill are the harder test. *self-replay
+ projection* reads rows of true data beside its pool, so it has more to go by. MAWPS asks many questions in one form
with other numbers, in training and in test. Each comparison is judged by itself. That scores which plain LoRA
improves are told apart was decided after the runs were seen; the first line has them all.
"""


def sheet(results: Path, figures: bool = True) -> Sheet | None:
    """The page, from the ledgers below docs/results/; None where nothing was run."""
    columns = {name: each for name in NAMES if (each := column(results, name))}
    if not columns:
        return None
    if figures:
        for name, each in columns.items():
            scores = list(dict.fromkeys(one.retention for one in each.readings))
            draw(each, [PLAIN, DECAY, MASKED, REPLAY, MORE[0], TRUE_DATA], scores, results / "default" / f"{name}.png")
    whole = [*columns.values()]
    return Sheet(
        "The default: does self-replay stand on tasks not used to find it?", "default",
        "docs/results/default/ledger.jsonl and docs/results/combinations/ledger.jsonl", CLAIM,
        said(columns), SETUP + "\n" + "\n".join(f"- *{each.title}.* {opening(each)}" for each in whole),
        result(columns), controls(whole), LIMITS,
        commands(*NAMES),
    )  # fmt: skip


def said(columns: dict[str, Column]) -> str:
    """What came out, and whether the default stands."""
    fresh = [each for name, each in columns.items() if name != "combinations_second"]
    lines, own = [], [one for each in fresh for one in each.against_best(REPLAY, RIVALS)]
    for each in columns.values():
        found = each.against_best(REPLAY, RIVALS)
        lines.append(f"- *{each.title}*: **{verdict(found)}** ({tally(found)}). {clear(('', one) for one in found)}.")
    better = [name for name in MORE if any(verdict(each.pairs(name, REPLAY)) == "better" for each in fresh)]
    stands = {
        "better": "It stands.",
        "mixed": "It stands where it is better and not where it is worse; see where.",
        "worse": "It does not stand.",
    }.get(verdict(own), "Nothing here speaks against it, and nothing for it.")
    more = [f"{name.removeprefix('self-replay + ')} {verdict_of(fresh, name)}" for name in MORE if any_of(fresh, name)]
    names = ", ".join(better)
    added = f"Better in a task or more: {names}." if better else "None is better in any one task."
    added += "".join(
        f" *{name}*: {clear((e.title, one) for e in fresh for one in e.pairs(name, REPLAY))}." for name in better
    )
    look = first_look(fresh)
    stands = "Whether it stands cannot be said yet." if look else stands
    bound = [one for each in fresh for one in each.pairs(REPLAY, TRUE_DATA)]
    gains = [one for each in fresh for one in each.against_best(REPLAY, RIVALS) if each.gained(one)]
    lost = [one for each in fresh for one in each.against_best(REPLAY, RIVALS) if not each.gained(one)]
    absent = [STUDIES[name].title for name in NAMES if name not in columns]
    missing = f" Not run yet: {', '.join(absent)}." if absent else ""
    return "\n".join(
        [
            f"{look}**Self-replay against the best of every other method, on tasks not used to find it: "
            f"{verdict(own)}** ({tally(own)}). **{stands}**{missing}\n",
            *lines,
            f"- **What may be lost, and what is gained.** Where plain LoRA does not end better than the base: "
            f"**{verdict(lost)}** ({tally(lost)}). Where it does, beyond noise, nothing is forgotten, and what is held "
            f"to the base gains less: **{verdict(gains)}** ({tally(gains)}).",
            f"- **Is something beside it better?** Against self-replay alone: {'; '.join(more) or 'not run'}. {added}",
            f"- **Against replay of true data**, the bound: **{verdict(bound)}** ({tally(bound)}).",
            f"\n{counted(len(own), 'comparison')} in the first line; {by_chance(len(own))}.",
        ]
    )


def any_of(columns: Sequence[Column], name: str) -> bool:
    """Whether an arm was run anywhere."""
    return any(name in each.arms for each in columns)


def verdict_of(columns: Sequence[Column], name: str) -> str:
    """An arm against self-replay alone, in all experiments."""
    found = [one for each in columns for one in each.pairs(name, REPLAY)]
    return f"**{verdict(found)}** ({tally(found)})"


def result(columns: dict[str, Column]) -> str:
    """Every arm at the second level, and self-replay against the best rival, in numbers."""
    parts = []
    for name, each in columns.items():
        what = each.kinds[each.learnt].title.lower()
        parts += [f"### {each.title}, at {what} {each.levels[1]:g}\n"]
        parts += [f"![what was kept, by {what}](default/{name}.png)\n", KEY.format(theirs=REPLAY)]
        parts += [kept_table(each, REPLAY), "\nSelf-replay against the best of every other method:\n"]
        parts += [best_table(each, [REPLAY], RIVALS), ""]
    return "\n".join(parts)


def controls(columns: Sequence[Column]) -> str:
    """Self-replay against each other arm, and the arms beside it."""
    questions = [(REPLAY, REPLAY, name) for name in (*RIVALS, TRUE_DATA)]
    questions += [(name, name, REPLAY) for name in MORE] + [(TRUE_DATA, TRUE_DATA, PLAIN)]
    return "\n".join(
        ["Against each rival by itself, and with something beside it against self-replay alone:\n",
         question_table(questions, columns)]
    )  # fmt: skip
