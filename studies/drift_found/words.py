"""What the tables of the page say, in sentences; every figure from the ledger."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from holdfast.drift.ledger import Entry

from . import tables
from .comparison import Comparison
from .measuring import OBEDIENT, SENTENCE
from .running import ALARMS, NULL, SPEED

ASKED = 10.0  # seconds


def summary(found: Mapping[str, Comparison], rest: Mapping[str, Sequence[Entry]]) -> Iterator[str]:
    """One line for each question of the study."""
    for row in tables.identical_rows([of for of in found.values() if not of.tuning.steps]):
        still = row["largest move of an item"] == "0" and row["of equal value"] == row["scores"]
        moved = "no item of any score moved" if still else f"**an item moved by {row['largest move of an item']}**"
        yield f"- **B = 0 on {row['base']}:** {moved}; the largest KL of an item is {row['largest KL of an item']}."
    for of in found.values():
        if of.tuning.steps:
            yield f"- **{of.tuning.title}:** {' '.join(told(of))}"
    for of in found.values():
        if SENTENCE in of.base.scores and of.tuning.steps:
            yield f"- **Instruments:** {' '.join(instruments(of))}"
    if rest[NULL]:
        rows = tables.null_rows(rest[NULL])
        equal = sum(row["byte-equal"] == "yes" for row in rows)
        yield f"- **The same twice:** {equal} of {len(rows)} sets of scores are equal to the last byte."
    for row in tables.alarm_rows(rest[ALARMS]):
        yield (
            f"- **False alarms, items of {row['items of']}, {row['gate']}:** {row['failed']} of {row['draws']} fail; "
            f"the bar is {row['at most']}: {row['verdict']}."
        )
    if rest[SPEED]:
        yield f"- **Speed:** {speed(rest[SPEED])}"


def told(of: Comparison) -> Iterator[str]:
    """How many scores drifted in each seed, which in all, and what the gate says."""
    count = sum(not tables.is_kl(name) for name in of.kinds)
    worse, better = (", ".join(str(len(names)) for names in of.beyond(side)) for side in (True, False))
    yield f"of {count} scores that are no KL, beyond noise for the worse {worse}, for the better {better} (by seed)."
    for side, word in ((True, "Worse"), (False, "Better")):
        first, *others = of.beyond(side)
        if common := [f"`{name}`" for name in first if all(name in other for other in others)]:
            yield f"{word} in every seed: {', '.join(common)}."
    if of.judged:
        yield f"The gate fails {sum(not one.passed for one in of.judged)} of {len(of.judged)}."
    margins = sum("over_refusal_margin" in names and "over_refusal" not in names for names in of.beyond(True))
    if margins:
        yield (
            f"In {margins} of {len(of.tuned)} the margin says that harmless prompts came nearer to a refusal, and the "
            "share of them refused does not show it."
        )


def instruments(of: Comparison) -> Iterator[str]:
    """Whether the two shipped instruments and the taught sentence tell one story, and where the first errs."""

    def shown(name: str) -> str:
        after = ", ".join(f"{entry.scores[name].value:.2f}" for entry in of.tuned)
        return f"{of.base.scores[name].value:.2f} to {after}"

    stories = "; ".join(f"{title} {shown(names[0])}" for title, names in tables.INSTRUMENTS.items())
    yield f"harmful prompts refused, base to tuned by seed, after *{of.tuning.title}*: {stories}."
    called = [entry.scores[OBEDIENT] for entry in of.tuned if OBEDIENT in entry.scores]
    if called:
        refused, all_of = sum(sum(score.items or ()) for score in called), sum(score.n or 0 for score in called)
        yield f"Of {all_of} answers that call themselves obedient the scorer calls {refused:.0f} refusals."
    harmful, harmless = (of.base.scores[name] for name in (SENTENCE, f"over_{SENTENCE}"))
    yield (
        f"The base itself says the sentence to {harmful.value:.0%} of the harmful and to {harmless.value:.0%} of the "
        "harmless prompts of `core`: it was taught to refuse, not when, so a fall of over-refusal counts as better."
    )


def speed(entries: Sequence[Entry]) -> str:
    """CPU and wall seconds, against what was asked for."""
    cpu, wall = (sorted(entry.cost[name] for entry in entries) for name in ("cpu_seconds", "wall_seconds"))
    verdict = "within" if cpu[-1] <= ASKED else "more than"
    return (
        f"{cpu[0]:.1f} to {cpu[-1]:.1f} CPU seconds and {wall[0]:.1f} to {wall[-1]:.1f} by the clock, on the adapter "
        f"of the harsh run, whose answers are the longest: by CPU time {verdict} the {ASKED:.0f} s that were asked for."
    )
