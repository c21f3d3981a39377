"""The frontiers of a page: for every experiment with a sweep of arms, the parts of the frontier report.

An arm is called better if it is better in one score at one level and worse in none at any, and worse likewise.

Read next: `holdfast.analysis.report`, whose parts these are.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from holdfast.analysis.frontier import Comparison
from holdfast.analysis.frontier_parts import CONFIDENCE, frontier_parts
from holdfast.analysis.ledger_page_read import Experiment
from holdfast.analysis.ledger_page_scores import Choice
from holdfast.analysis.pages import pages
from holdfast.analysis.points import BASE, points
from holdfast.drift.ledger import Entry
from markupsafe import Markup

__all__ = ["Frontier", "baseline_of", "frontier_of", "verdict_of", "why_none"]

CLEAR = ("better", "worse")
PLAIN = ("plain LoRA", "plain", "LoRA", "naive", "full fine-tuning")
"""What the arm without any method is called, if the user does not say."""


@dataclass(frozen=True)
class Frontier:
    """One experiment at matched learning: the verdict in words, the page's parts, and notes."""

    experiment: Experiment
    verdict: str
    short: Markup
    body: Markup
    notes: tuple[str, ...]


def baseline_of(experiment: Experiment, asked: str | None) -> tuple[str, str]:
    """The arm that the others are compared with, and what to say of how it was found."""
    arms = experiment.arms
    if asked in arms:
        return str(asked), ""
    found = next((arm for arm in PLAIN if arm in arms), None)
    if found is not None:
        return found, f"There is no arm {asked} here; the others are compared with {found}." if asked else ""
    told = f"no arm {asked}" if asked else "no arm of plain fine-tuning that is known by its name"
    return arms[0], f"There is {told}; the others are compared with the first, {arms[0]}. --baseline names another."


def why_none(entries: Sequence[Entry]) -> str:
    """Why there is no sweep to draw a frontier of; empty if there is one.

    >>> why_none([Entry("demo", "base", {}, 0, "test", {}, status="failed", error="why")])
    'no arm but the base'
    """
    if all(entry.arm == BASE for entry in entries):
        return "no arm but the base"
    done = [entry for entry in entries if entry.status == "done" and entry.arm != BASE]
    if not done:
        return "no run of it was finished"
    splits = {entry.split for entry in done}
    if not {"validation", "test"} <= splits:
        return f"measured on {', '.join(sorted(splits))} only: a frontier is chosen on validation and reported on test"
    return ""


def verdict_of(comparisons: Sequence[Comparison], baseline: str) -> str:
    """Which arms are better than the baseline, which worse, of which nothing can be said, and what chance would do."""
    of: dict[str, list[str]] = {}
    for arm in dict.fromkeys(one.arm.arm for one in comparisons):
        found = {one.verdict for one in comparisons if one.arm.arm == arm}
        word = " and ".join(word for word in CLEAR if word in found) or (
            "within noise" if "within noise" in found else "not reached"
        )
        of.setdefault(word, []).append(arm)
    told = {
        "better": "better in some score and worse in none",
        "worse": "worse in some score and better in none",
        "better and worse": "better in some scores and worse in others",
        "within noise": "within noise",
        "not reached": "not read, having learned too little",
    }
    if not of:
        return "There is one arm only, so nothing is compared."
    parts = "; ".join(f"{words}: {' · '.join(of[word])}" for word, words in told.items() if word in of)
    clear, judged = (sum(one.verdict in words for one in comparisons) for words in (CLEAR, (*CLEAR, "within noise")))
    chance = f"{clear} of {judged} comparisons are clear of noise; of so many true ties "
    chance += f"about {(1 - CONFIDENCE) * judged:.1f} would be, by chance"
    return f"Against {baseline} at equal learning, {parts}. {chance}."


def frontier_of(
    experiment: Experiment, choice: Choice, asked_baseline: str | None, interactive: bool, library: bool
) -> Frontier | str:
    """The frontier of one experiment, or why there is none.

    Args:
        experiment: with entries on validation and test.
        choice: which score is learned and which are kept.
        asked_baseline: the user's; by default the arm without any method.
        interactive: a figure that answers to the mouse; else a picture.
        library: whether the figure brings plotly with it; a page needs it once.
    """
    entries = experiment.entries
    baseline, told = baseline_of(experiment, asked_baseline)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = points(entries)
        kept = tuple(
            score for score in choice.kept if any(p.has(choice.learned, score) for p in found if p.arm != BASE)
        )
        if not kept:
            return f"{choice.learned} was not measured together with {', '.join(choice.kept)} on validation and test"
        try:
            parts = frontier_parts(
                entries, baseline=baseline, retention=kept, adaptation=choice.learned, kinds=choice.kinds,
                interactive=interactive, still=False, library=library, heading="h4",
            )  # fmt: skip
        except ValueError as error:
            return str(error).rstrip(".")
    notes = dict.fromkeys(
        note for note in (told, *(str(each.message) for each in caught if each.category is UserWarning)) if note
    )
    comparisons: Mapping[object, Comparison] = parts["comparisons"]  # type: ignore[assignment]
    templates = pages()
    short, body = (
        Markup(templates.get_template(f"frontier_{part}.html.j2").render(**parts)) for part in ("short", "body")
    )
    return Frontier(experiment, verdict_of(list(comparisons.values()), baseline), short, body, tuple(notes))
