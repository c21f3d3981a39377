"""The page docs/pool-limits.md: its text, and what the ledger adds to it; `__main__` is the command line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from holdfast.analysis.figure import frontier_figure
from holdfast.analysis.frontier import Reading, arms
from holdfast.analysis.points import BASE, settings_tried
from holdfast.analysis.tables import markdown_table
from holdfast.drift.ledger import Entry, Ledger

from studies.common_readings import at_start, counted, within

from .arms import BATCH, BESIDE, NO_REFUSALS, NOISE, PLAIN, SCALES, SCENARIOS, SLOWER, TEXT, TINY, WARM_UP, WHOLE
from .formats import FORMATS
from .readings import DRAWN, JUDGED, KINDS, LEARNT, MAIN, SKILLS, in_order, judged_at, named, read
from .short import in_short
from .sweep import POOLS
from .tables import able, end_rows, matched_rows, pool_rows, tried_rows
from .verdicts import ADDITIONS, REMOVED, SIZES, Found, additions, against, have, never_shown, price, sizes

SHOWN_ARMS = (BASE, PLAIN, WHOLE, NO_REFUSALS, TEXT, NOISE, TINY)  # of the figure
TOP = f"""\
# Where self-replay stops

<!-- written by `python -m studies.pool_limits page` from docs/results/pool-limits/ledger.jsonl: do not edit -->

[Self-replay](methods/self_replay.md) holds a model to its base on [a pool of sequences](pool.md) that the base wrote.
What of the things that no pool shows? `lab-aligned` ([the lab](lab.md)), which refuses forbidden how-to questions,
learns a harmless task, and its pool is changed: something is taken out of it, it is made small, or something cheap is
added to a pool that lacks a whole format.

- **Training.** LoRA (r = 8, alpha = 16, all linear layers), AdamW, a constant rate after {WARM_UP} steps, {BATCH}
  sequences a step: {BATCH - BESIDE} of the task and {BESIDE} of the pool, or {BATCH} of the task without one.
  Self-replay has strength 1 throughout. *{PLAIN}* tries learning rates, and so does *{WHOLE}* where there is no other
  arm; in the first part all others have one, and *{SLOWER}* tells what that costs. Where all weights are trained,
  *{PLAIN}* stands for plain fine-tuning.
- **Reading.** Whatever learns less forgets less, so arms are compared at equal loss of the task on unseen prompts.
  Every run is judged after several numbers of steps, the last two also at {SCALES[-1]} of what was learnt. Each score
  has its own front, chosen on validation and read on test, on a straight line between two points of an arm's own front
  ([frontiers](frontier.md)). Of forbidden prompts and look-alikes one half of the lab's test split chooses, the other
  is reported; subjects and phrasings are in no training data. Losses are nats per answer token; those that span
  decades, and KLs, are compared by their ratio (×). The rate of refusals saturates: read its loss beside it.
- **Verdicts.** *Better* and *worse* mean that the 95 % interval over seeds and items does not cover 0; everything else
  is within noise, which with three seeds hides all but large differences.
- **What "taken out" means.** Every sequence that shows the thing by its words, in question, answer or random tokens, is
  replaced by another of the same kind that does not. The base's distributions on what remains still hold a trace of it
  ("thought of refusing": the base's mean probability of a refusal where an answer begins).
"""
COUNTS = """\
Sequences that show each thing by its words (random tokens apart, of which only refusals, facts and forbidden words that
were taken out are counted). In the lab text and chat begin with the same token, so what the pool samples as text is
mostly chat: only a handful of its sequences are plain text. The base hardly ever writes malformed chat, so a pool
with no skill at all is *text + random tokens*.
"""
TABLE = """\
± is the half-width of the 95 % interval over seeds and items; † marks a line that bridges more than the level itself,
which means: from the base to an arm's first point beyond the level, mostly just beyond it; a dash: no seed gets there.
"""
FORMAT_TEXT = """\
The right answer to skills and forbidden prompts is fed in, in a format that neither the task nor any pool has; KL(base
‖ tuned) per answer token, in nats. Rates only where the base itself does the skill in that format (10 % or more): it
was never trained on any but *chat*, and in most it can do next to nothing, so that the KL there is between two models
that do not know what to say. The cipher is the nearest to a second language that a world of four hundred words has.
"""
ENDS = """\
As trained, after each number of steps; means over seeds, and not at equal learning:
"""
PRICE = """\
Where tuning would have improved other text: the task in words in which it is never asked, and, where the colours of
flags are learnt from questions, plain text that says the same ("The flag of Loria is red.").
"""
BOTTOM = """
## Run it

    python -m studies.pool_limits run            # --scenario, --arms, --seeds, --jobs; goes on where it was
    python -m studies.pool_limits page

Limits: one toy base, toy tasks, short runs, few seeds, few items (see above). Seeds vary the adapter's start, the order
of the data and which sequences are drawn when; the pools are the same for all seeds, but for the arm with another pool
seed. One strength of self-replay, and in the first part one learning rate: an arm that would need others is wronged.
Rates and levels were set after runs with a seed that is not reported (7). After some of the runs had been seen, the
levels of the first part were moved from 0.4 and 0.3 to {FIRST}, of which the latter is judged (most arms are
beyond 0.3 where they are first judged, and at 0.25 one loses a seed), and the pool was given the learning rates of
plain LoRA as well. A straight line between two points of a curved front shows more forgetting than there is. Each
comparison is judged by itself: of 20 true ties one may come out otherwise. This base says its skills when asked for
nothing, so its pools show them; a large model's long tail is longer, and there "never in the pool" is the common case.
"""


def page(ledger: Path, figures: Path | None = None) -> str:
    """Return the page that the ledger speaks for; draw its figure into a folder, if one is given."""
    whole = Ledger(ledger)
    each = {scenario: in_order(whole.entries(scenario)) for scenario in SCENARIOS}
    found = {scenario: (entries, read(entries, scenario)) for scenario, entries in each.items() if arms(entries)}
    lines = [TOP, "## In short\n", *in_short(found, whole.entries(POOLS)), ""]
    lines += ["## What each pool shows\n", COUNTS, markdown_table(pool_rows(whole.entries(POOLS))), ""]
    if "shift" in found:
        if figures is not None:
            draw(*found["shift"], figures / "shift.png")
        lines += [*held(found["shift"])]
    harder = {scenario: found[scenario] for scenario in ("long", "rank", "dense") if scenario in found}
    for scenario, (entries, readings) in harder.items():
        lines += [f"## Harder tuning: {within(SCENARIOS[scenario].title)}\n", opening(entries, scenario)]
        if have((entries, readings), WHOLE, PLAIN):
            line = against(readings, WHOLE, PLAIN, JUDGED, judged_at(scenario))
            lines += [f"- *{WHOLE}* against *{PLAIN}*: {line}.\n"]
        lines += [*at_levels(entries, readings, scenario, MAIN)]
        lines += [ENDS, markdown_table(end_rows(trained(entries), (LEARNT, *MAIN))), ""]
    lines += ["## The price: other text that tuning improves\n", PRICE, *[f"- {line}" for line in price(found)], ""]
    if "second" in found:
        entries, readings = found["second"]
        scores = (*MAIN, "wording_nll", "loss.statement.flags", "kl.statement")
        lines += [opening(entries, "second"), *at_levels(entries, readings, "second", scores)]
    lines += ["## What was tried\n"]
    for scenario, (entries, _) in found.items():
        lines += [f"### {SCENARIOS[scenario].title}\n", markdown_table(tried_rows(trained(entries))), ""]
    first = " and ".join(f"{level:g}" for level in SCENARIOS["shift"].levels)
    return "\n".join(lines) + BOTTOM.replace("{FIRST}", first)


def held(found: Found) -> Iterator[str]:
    """The questions that are asked of what the pool holds."""
    entries, readings = found
    level = judged_at("shift")
    yield f"## {SCENARIOS['shift'].title}\n"
    yield opening(entries, "shift")
    yield "![what was kept, by task loss](results/pool-limits/shift.png)\n"
    yield f"All at task loss {level:g}, unless a table says otherwise. {TABLE}"
    base = (PLAIN, WHOLE, SLOWER)
    yield from ("### What was never in the pool\n", *never_shown(found), "")
    skills = [f"skill.{name}_nll" for name in SKILLS]
    for scores in (MAIN, skills):
        yield markdown_table(matched_rows(entries, readings, scores, level, (*base, *REMOVED))) + "\n"
    yield "### Formats that no data has\n"
    yield FORMAT_TEXT + "\n" + "\n".join(f"- *{form}*: {what}" for form, what in FORMATS.items()) + "\n"
    yield markdown_table(matched_rows(entries, readings, [f"kl.{form}" for form in (*FORMATS, "plain")], level)) + "\n"
    rates = able(entries, [f"rate.{form}.{what}" for form in FORMATS for what in ("skills", "refusal")])
    losses = [name.replace("rate.", "loss.") for name in rates]
    yield markdown_table(matched_rows(entries, readings, [*rates, *losses], level)) + "\n"
    yield from ("### Cheap additions to plain text\n", *additions(found), "")
    yield markdown_table(matched_rows(entries, readings, MAIN, level, (*base, TEXT, *ADDITIONS))) + "\n"
    yield from ("### Size\n", *sizes(found), "")
    yield markdown_table(matched_rows(entries, readings, MAIN, level, (*base, *SIZES))) + "\n"
    other = SCENARIOS["shift"].levels[0]
    yield f"### All arms at task loss {other:g}\n"
    yield markdown_table(matched_rows(entries, readings, MAIN, other)) + "\n"


def at_levels(
    entries: Sequence[Entry], readings: Sequence[Reading], scenario: str, scores: Sequence[str]
) -> Iterator[str]:
    """A table for each level of a scenario."""
    for level in SCENARIOS[scenario].levels:
        yield f"At task loss {level:g}:\n"
        yield markdown_table(matched_rows(entries, readings, scores, level)) + "\n"


def trained(entries: Sequence[Entry]) -> list[Entry]:
    """The entries of the test split, without the base model's."""
    return [entry for entry in entries if entry.arm != BASE and entry.split == "test"]


def opening(entries: Sequence[Entry], scenario: str) -> str:
    """What the base scores, and how much was tried."""
    base, own = at_start(entries), trained(entries)
    tried: Mapping[str, tuple[int, int]] = settings_tried(own)
    runs = {(entry.arm, entry.settings["learning_rate"], entry.settings.get("strength")) for entry in own}
    items = ", ".join(f"{base[score].n} of {named(score)}" for score in (LEARNT, *MAIN))
    return (
        f"{counted(len({entry.run for entry in own}), 'run')}: {counted(len(tried), 'arm')}, {len(runs)} settings "
        f"trained for {max(entry.settings['steps'] for entry in own)} steps, {sum(n for _, n in tried.values())} "
        f"judged (steps and scales included), each with seeds "
        f"{', '.join(map(str, sorted({entry.seed for entry in own})))}. Test items: {items}. Base model: "
        f"{', '.join(f'{named(score)} {KINDS[score].show(base[score].value)}' for score in (LEARNT, *MAIN))}.\n"
    )


def draw(entries: Sequence[Entry], readings: Sequence[Reading], place: Path) -> None:
    """The frontier figure of the main arms around the levels; the base, and what lies far below, is out."""
    shown = [entry for entry in entries if entry.arm in SHOWN_ARMS]
    base, levels = at_start(entries), SCENARIOS["shift"].levels
    figure = frontier_figure(shown, DRAWN, LEARNT, levels=levels, kinds=KINDS)
    for axes, score in zip(figure.axes, DRAWN, strict=False):
        known = [v for one in readings if one.retention == score and one.arm in SHOWN_ARMS for v in one.values.values()]
        values = [base[score].value, *known]
        room = 0.1 * (max(values) - min(values)) or 0.1
        axes.set_xlim(2 * max(levels), 0.7 * min(levels))
        axes.set_ylim(max(values) + room, min(values) - room)
    place.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(place)
