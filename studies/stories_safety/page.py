"""The page docs/stories-safety.md: its text, and what the ledger adds to it; `__main__` is the command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from holdfast.analysis.figure import frontier_figure
from holdfast.analysis.frontier import Reading, arms, at_matched_learning
from holdfast.analysis.points import BASE
from holdfast.analysis.tables import markdown_table
from holdfast.drift.ledger import Entry, Ledger

from studies.common_readings import at_start, counted

from .arms import ALPHA, ARMS, BATCH, EXPERIMENT, LONGEST, POINTS, RANK, REFUSAL, REPLAYED, SCALED, SIZES
from .readings import ALONG, KINDS, LEARNT, LEVELS, LOST, SHOWN, WIDE, named
from .tables import compared_rows, cost_rows, matched_rows
from .verdicts import changed, verdicts

TOP = f"""\
# Stories and refusals: OGPSA on real weights

<!-- written by `python -m studies.stories_safety page` from docs/results/stories-safety/ledger.jsonl: do not edit -->

stories260K is a real pretrained model: 260 thousand parameters, trained on TinyStories (llama2.c, MIT). Here LoRA
(r = {RANK}, alpha = {ALPHA}, all linear layers, AdamW, batches of {BATCH}) teaches it to answer the prompts of AdvBench
with "{REFUSAL}" Nothing harmless is in the training data.

- **Adaptation:** the loss of that sentence after prompts of HarmBench, which was not trained on (every other one to
  choose settings by, the rest to report; those very like one of AdvBench are left out). *Refused* is the share of
  prompts after which the greedy answer is the whole sentence.
- **What must be kept:** the loss on stories sampled from the base; on the Wizard of Oz, text that no retain row is
  like; and on *benign answers*, the base's own continuations of benign prompts of Dolly. Over-refusal is the refusal
  after those same prompts: there a higher loss of the refusal is better.
- **Retain data:** {SIZES["stories"]} stories and {SIZES["benign"]} benign prompts with the base's own continuation,
  sampled afresh for each seed; none of them is measured. Prompts, stories and texts have at most {LONGEST} tokens.
- **Arms.** *naive*: nothing is protected. *adapter scaling*: its adapter after the last step, weakened. *replay*:
  {REPLAYED} retain rows more in each batch, whose tokens count as the task's do. *OGPSA as published*: the gradient is
  projected off one mean gradient of each retain set, refreshed every 10 steps. *OGPSA exact*: the update that AdamW
  makes is projected, off 16 reference gradients, refreshed every 5 steps; *metric*: in AdamW's own metric. *random
  subspace*: 16 random directions, the control.
- **Reading.** Whatever learns less forgets less, so arms are compared at equal refusal loss on unseen prompts. Each
  arm's front of (refusal loss, loss on stories) is chosen on validation rows and read on test rows, on a straight line
  between two points of the front ([frontiers](frontier.md)); the other scores are those of the same settings.
"""
FIGURE = """\
Refusal loss on a logarithmic axis, firmly learnt to the right; each panel has fronts of its own. Points far below all
that is read are cut off.
"""
TABLE = f"""\
± is the half-width of the 95 % interval over seeds and test rows; † marks a line that bridges more than {WIDE:g} times
the level; a dash: no seed gets there.
"""
AGAINST = """\
Paired by seed; below zero, an arm keeps more than *naive*.
"""
COST = f"""\
CPU seconds of training on one thread, judging excluded, over whole runs of {POINTS[-1]} steps.
"""
BOTTOM = f"""
## Run it

    HOLDFAST_DATA=... python -m studies.stories_safety run      # goes on where it was; --arms, --seeds
    python -m studies.stories_safety page

Limits: one small model, one sentence, one rank, {POINTS[-1]} steps at most, few test rows; seeds vary the adapter's
start, the order of the data and the retain rows, not the rows that are measured. Rates, step counts and levels were
set after single runs with seed 0; an arm that would need others is wronged. A straight line between points of a curved
front shows more forgetting than there is, the more so the further they lie apart: that is a disadvantage to *naive* and
to all arms that learn as fast, a smaller one to *adapter scaling* and *replay*, whose points lie closer. Replay was not
tried with as many rows as would make its step cost what a projected one costs. Each comparison is judged by itself. The
retain data are sampled from the base, as the stories that are measured are: of all that could be kept, that is the
easiest to protect, and Oz the harder test.
"""


def page(ledger: Path, figures: Path | None = None) -> str:
    """Return the page that the ledger speaks for; draw its figure into a folder, if one is given."""
    order = {name: place for place, name in enumerate(["naive", SCALED, *list(ARMS)[1:]])}
    entries = sorted(Ledger(ledger).entries(EXPERIMENT), key=lambda entry: order.get(entry.arm, -1))
    readings = at_matched_learning(entries, LEARNT, SHOWN, LEVELS, kinds=KINDS, along=ALONG)
    if figures is not None:
        draw(entries, readings, figures / "frontier.png")
    lines = [TOP, opening(entries), "## In words\n", *verdicts(entries, readings), changed(entries, readings)]
    lines += ["\n![what was kept, by refusal loss](results/stories-safety/frontier.png)\n", FIGURE]
    lines += ["## At equal refusal\n", TABLE]
    for level in LEVELS:
        lines += [f"### At refusal loss {level:g}\n", markdown_table(matched_rows(entries, readings, level)), ""]
    lines += ["## Against naive\n", AGAINST, markdown_table(compared_rows(readings)), ""]
    lines += ["## What it costs\n", COST, markdown_table(cost_rows(entries)), ""]
    return "\n".join(lines) + BOTTOM


def draw(entries: Sequence[Entry], readings: Sequence[Reading], place: Path) -> None:
    """The frontier figure, with the refusal loss as a logarithm and what lies far below all readings cut off."""
    figure = frontier_figure(entries, LOST, LEARNT, levels=LEVELS, kinds=KINDS)
    base = at_start(entries)
    for axes, score in zip(figure.axes, LOST, strict=True):
        read = [value for one in readings if one.retention == score for value in one.values.values()]
        best, worst = base[score].value, max([base[score].value + 0.1, *read])
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlabel("refusal loss on unseen harmful prompts")
        axes.set_xlim(1.5 * base[LEARNT].value, min(LEVELS) / 4)
        axes.set_ylim(worst + 0.1 * (worst - best), min([best, *read]) - 0.1 * (worst - best))
    figure.savefig(place)


def opening(entries: Sequence[Entry]) -> str:
    """What the base scores, and how much was tried."""
    base, trained = at_start(entries), [entry for entry in entries if entry.arm != BASE]
    scores = ", ".join(f"{named(score)} {KINDS[score].show(base[score].value)}" for score in KINDS)
    rates = sorted({entry.settings["learning_rate"] for entry in trained})
    steps = sorted({entry.settings["steps"] for entry in trained})
    return (
        f"{counted(len({e.run for e in trained}), 'run')}, {counted(len({e.seed for e in trained}), 'seed')}, "
        f"{len(arms(entries))} arms; learning rates {', '.join(f'{rate:g}' for rate in rates)}, judged after "
        f"{', '.join(map(str, steps))} steps. On test {base[LEARNT].n} harmful prompts, "
        f"{base['refused_loss'].n} benign ones, {base['story_loss'].n} stories, {base['oz_loss'].n} pieces of Oz. "
        f"Base: {scores}.\n"
    )
