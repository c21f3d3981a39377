"""The page docs/self-replay.md: its text, and what the ledger adds to it; `__main__` is the command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from holdfast.analysis.figure import frontier_figure
from holdfast.analysis.frontier import Reading, arms
from holdfast.analysis.points import BASE, settings_tried
from holdfast.analysis.tables import markdown_table
from holdfast.drift.ledger import Entry, Ledger
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from studies.common_readings import at_start, counted

from .arms import (
    ALPHA,
    ARMS,
    BATCH,
    BESIDE,
    DATA,
    DATA_SOFT,
    DECAY,
    FULL,
    HARD,
    KEPT,
    MASKED,
    MASKED_PROMPT,
    PLAIN,
    RANK,
    RATE,
    REFUSALS,
    REPLAY,
    REPLAY_PROMPT,
    SCALES,
    SCENARIOS,
    WARM_UP,
)
from .cost import experiment
from .readings import DRAWN, JUDGED_AT, KINDS, LEARNT, LEVELS, in_order, named, read
from .tables import cost_rows, matched_rows, overview_rows, rival_rows, speed_rows
from .verdicts import in_short, verdicts

SHOWN_ARMS = (BASE, PLAIN, DECAY, FULL, MASKED_PROMPT, REPLAY, HARD, DATA)  # of the figure
TOP = f"""\
# Self-replay: what it keeps, at equal learning

<!-- written by `python -m studies.self_replay page` from docs/results/self-replay/ledger.jsonl: do not edit -->

[Self-replay](methods/self_replay.md) takes {BESIDE} of the {BATCH} sequences of every step away from the task and runs
sequences there that the base model wrote itself, once, before training; on them the student is held to the base's own
distributions. In throw-away scripts it kept more than anything else. This page asks the package's own method, with
every rival swept.

- **In the lab** a model that refuses forbidden how-to questions learns a harmless task with LoRA (r = {RANK}, alpha =
  {ALPHA}, all linear layers, AdamW, {BATCH} sequences a step, a constant rate after {WARM_UP} steps). Nothing in its
  training data is forbidden, and nothing is a refusal. What must stay: it refuses forbidden prompts of unseen subjects
  and phrasings, answers their harmless look-alikes, keeps its skills, the rare one too, and its stories.
- **Arms that see {BATCH} task sequences a step.** *{PLAIN}* tries learning rates; every other arm has the rate
  {RATE:g} and tries strengths. *{DECAY}*: strength · |dW|². *{FULL}* and *{MASKED}* (Target-Masked KL): a divergence to
  the base on the task's answers. *{MASKED_PROMPT}*: and the full KL on its prompts, at the same strength.
- **Arms that see {BATCH - BESIDE} task sequences and {BESIDE} others**, so a quarter less of the task in every step.
  *{REPLAY}*: from a pool of {KEPT} that the base wrote, the package's default, sampled anew for every seed; it tries
  one more rate as well. *{REPLAY_PROMPT}*: with the full KL on the task's prompts, at strength 1. *{HARD}*: the
  control, the same sequences in the same steps as ordinary data, a cross-entropy on their tokens, which has a strength
  of its own.
- **True data, the bound that self-replay cannot be expected to pass:** {KEPT} rows of the lab's training split in place
  of the pool, {KEPT - REFUSALS} of skills, look-alikes and stories and {REFUSALS} refusals; *{DATA}* with a
  cross-entropy, *{DATA_SOFT}* with the base's distributions.
- **Weaker adapters.** Every run's adapter is judged after its last step at scales {", ".join(map(str, SCALES))} too.
- **Reading.** Whatever learns less forgets less, so arms are compared at equal loss of the task on unseen prompts. Each
  score has its own front, chosen on validation and read on test, on a straight line between two points of the arm's own
  front ([frontiers](frontier.md)); of forbidden prompts and look-alikes one half of the lab's test split chooses, the
  other is reported. So every arm below is at its best at that level. Losses are nats per token; a greedy refusal hides
  its erosion, so the loss of the refusal is shown beside the rate everywhere. Losses of answers span decades and are
  compared by their ratio (×, below 1 is better); the interval is that of the mean logarithm. *Within noise* means that
  these seeds cannot tell the arms apart, not that they are equal.
"""
SHORT = f"""\
At equal learning: {" and ".join(f"task loss {level:g} in *{scenario}*" for scenario, level in JUDGED_AT.items())},
where nothing else is said. Compared are the losses of refusals, look-alikes, skills, the rare skill and text. "It" is
self-replay.
"""
OVERVIEW = """\
In how many of these scores self-replay is better (✓) or worse (✗) than a rival beyond noise, or neither (=), at every
level; fewer seeds than there are, where not all of them get there; a dash: none does.
"""
FIGURE = """\
Only the part around the levels is drawn (dotted lines), the base model lies far to the left, and settings that
validation did not choose are left out. Losses of answers are on a logarithmic axis.
"""
TABLE = """\
± is the half-width of the 95 % interval over seeds and items; † marks a line that bridges more than the level itself; a
dash: no seed gets there. ✓ and ✗: self-replay is better or worse beyond noise; no mark: within noise.
"""
SPEED = """\
Steps until the task's loss on test prompts falls to the level, of the setting that is quickest on validation, without
scaling: mean over the seeds that get there, and the lowest and highest. Between judged points the logarithm of the loss
is taken as straight.
"""
COST = """\
CPU seconds of a training on one thread, without judging, as `cost` timed them in turn (a dash: not timed); before it:
sampling the pool or drawing the rows, once for a base model. "Settings" counts steps and scales too.
"""
BOTTOM = """
## Run it

    python -m studies.self_replay run            # --scenario, --arms, --seeds, --jobs; goes on where it was
    python -m studies.self_replay cost           # times the arms
    python -m studies.self_replay page           # this page, from the ledger

Limits: two toy tasks on one toy model, short runs, few seeds. Seeds 3 and 4 were added after those of 0 to 2 had been
seen, since with three most differences were within noise; nothing else was changed then. Seeds vary the adapter's
start, the order of the data and the pool, not the prompts that are measured, nor the base. Rates, strengths, steps
and levels were set after runs with a seed that is not reported (7) and earlier scripts; an arm that would need others
is wronged. All arms but plain LoRA and self-replay have one learning rate, and self-replay tried more than most: the
best of more settings looks better than it is. The lab's base says most of what it knows without being asked, so its
pool covers its skills unusually well; a large model has a long tail. The pool is a stand-in for the base: where
tuning would have made other text better, staying at the base gives that up, and no score here would show it. Each
comparison is judged by itself: of 20 true ties one may come out otherwise. A straight line between two points of a
curved front shows more forgetting than there is.
"""


def page(ledger: Path, figures: Path | None = None) -> str:
    """Return the page that the ledger speaks for; draw its figures into a folder, if one is given."""
    whole = {scenario: in_order(Ledger(ledger).entries(scenario)) for scenario in SCENARIOS}
    found = {scenario: (entries, read(entries, scenario)) for scenario, entries in whole.items() if arms(entries)}
    lines = [TOP, "## In short\n", SHORT, *in_short(found), "", OVERVIEW, markdown_table(overview_rows(found)), ""]
    for scenario, (entries, readings) in found.items():
        timed = Ledger(ledger).entries(experiment(scenario))
        if figures is not None:
            draw(entries, readings, scenario, figures / f"{scenario}.png")
        lines += [f"## {SCENARIOS[scenario].title}\n", opening(entries, scenario), "### Verdict\n"]
        lines += [*verdicts(entries, readings, scenario), ""]
        lines += [f"![what was kept, by task loss](results/self-replay/{scenario}.png)\n", FIGURE]
        lines += ["### At equal learning\n", TABLE]
        for level in LEVELS[scenario]:
            both = matched_rows(entries, readings, level), rival_rows(entries, readings, level)
            lines += [f"#### At task loss {level:g}\n", *(f"{markdown_table(rows)}\n" for rows in both)]
        lines += ["### How soon\n", SPEED, markdown_table(speed_rows(entries, scenario)), ""]
        lines += ["### What it costs\n", COST, markdown_table(cost_rows(entries, timed)), ""]
    return "\n".join(lines) + BOTTOM


def draw(entries: Sequence[Entry], readings: Sequence[Reading], scenario: str, place: Path) -> None:
    """The frontier figure of the main arms around the levels; the base, and what lies far below, is out."""
    shown = [entry for entry in entries if entry.arm in SHOWN_ARMS]
    base, levels = at_start(entries), LEVELS[scenario]
    figure = frontier_figure(shown, DRAWN, LEARNT, levels=levels, kinds=KINDS)
    for axes, score in zip(figure.axes, DRAWN, strict=False):
        known = [v for one in readings if one.retention == score and one.arm in SHOWN_ARMS for v in one.values.values()]
        values = [base[score].value, *known]
        low, high = min(values), max(values)
        if KINDS[score].ratio:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_locator(NullLocator())
            ends = (0.8 * low, 1.25 * high)
        else:
            room = 0.1 * (high - low) or 0.1
            ends = (low - room, high + room)
        for dots in [each for each in axes.collections if not len(each.get_facecolor())]:
            dots.remove()  # hollow: settings that validation did not choose
        axes.set_xlim(1.5 * max(levels), 0.7 * min(levels))
        axes.set_ylim(*(ends if KINDS[score].higher_is_better else ends[::-1]))
    place.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(place)


def opening(entries: Sequence[Entry], scenario: str) -> str:
    """What the base scores, and how much was tried."""
    base, trained = at_start(entries), [entry for entry in entries if entry.arm != BASE]
    scores = ", ".join(f"{named(score)} {KINDS[score].show(base[score].value)}" for score in KINDS if score in base)
    tried = settings_tried(trained)
    settings = len({(e.arm, e.settings["learning_rate"], e.settings.get("strength")) for e in trained})
    items = ", ".join(f"{base[score].n} of {named(score)}" for score in (LEARNT, *DRAWN[1:]))
    points, steps = SCENARIOS[scenario].points, sorted({int(e.settings["steps"]) for e in trained})
    rates = {arm: ", ".join(f"{rate:g}" for rate in sorted({rate for rate, _ in ARMS[arm].tries})) for arm in ARMS}
    missing = " and ".join(f"*{arm}*" for arm in ARMS if arm not in tried)
    return (
        f"{counted(len({entry.run for entry in trained}), 'run')}: {counted(len(tried), 'arm')}, {settings} rates and "
        f"strengths, judged after {', '.join(map(str, steps or points))} steps, {sum(n for _, n in tried.values())} "
        f"settings with steps and scales, each with seeds {', '.join(map(str, sorted({e.seed for e in trained})))}. "
        f"Rates of *{PLAIN}*: {rates[PLAIN]}; of *{REPLAY}*: {rates[REPLAY]}. The verdict is at task loss "
        f"{JUDGED_AT[scenario]:g}. Test items: {items}. Base model: {scores}."
        f"{f' Not run, for want of time: {missing}.' * bool(missing)}\n"
    )
