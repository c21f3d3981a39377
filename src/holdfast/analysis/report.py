"""The report: one page that says what was kept at equal learning, what is within noise, and how that was found out.

It is a single file that loads nothing from anywhere: figure, tables, costs, versions, and every run behind them. All of
it is computed from ledger entries; the template only sets it. Read next: docs/frontier.md.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
from holdfast.analysis.figure import frontier_figure, frontier_html_div
from holdfast.analysis.frontier import (
    BASE,
    Comparison,
    arms,
    at_matched_learning,
    compare,
    matched_levels,
    settings_tried,
)  # fmt: skip
from holdfast.analysis.panels import COLOURS
from holdfast.analysis.scores import KNOWN, ScoreKind, kind
from holdfast.drift.ledger import Entry
from markupsafe import Markup

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Cost:
    """What the runs of one arm took: seconds of training per run, and how that compares with the baseline."""

    arm: str
    runs: int
    failed: int
    seconds: tuple[float, float, float] | None
    """Mean, least and most."""
    ratio: float | None


def costs(entries: Sequence[Entry], baseline: str, of: str = "train_seconds") -> list[Cost]:
    """Training cost of every arm; a run counts once, however many splits and scales it was evaluated on.

    >>> from holdfast.drift.ledger import Score
    >>> entries = [Entry("demo", arm, {}, 0, "test", {"skills": Score(0.8)}, cost={"train_seconds": seconds})
    ...            for arm, seconds in (("plain LoRA", 10.0), ("TMKL", 14.0))]
    >>> [cost.ratio for cost in costs(entries, "plain LoRA")]
    [1.0, 1.4]
    """
    found: dict[str, dict[str, float]] = {arm: {} for arm in arms(entries)}
    failed: dict[str, set[str]] = {arm: set() for arm in found}
    for entry in entries:
        if entry.arm != BASE and entry.status == "failed":
            failed[entry.arm].add(entry.run)
        elif entry.arm != BASE and of in entry.cost:
            found[entry.arm][entry.run] = entry.cost[of]
    mean = {arm: sum(runs.values()) / len(runs) for arm, runs in found.items() if runs}
    plain = mean.get(baseline)
    return [
        Cost(
            arm=arm,
            runs=len({entry.run for entry in entries if entry.arm == arm}),
            failed=len(failed[arm]),
            seconds=(mean[arm], min(runs.values()), max(runs.values())) if runs else None,
            ratio=mean[arm] / plain if runs and plain else None,
        )
        for arm, runs in found.items()
    ]


@dataclass(frozen=True)
class Summary:
    """One arm in one sentence, at the head of the page."""

    arm: str
    sentence: str


PHRASES = {
    "better": "is better on ",
    "worse": "is worse on ",
    "mixed": "is better at some levels and worse at others on ",
    "within noise": "is within noise on ",
    "not reached": "did not learn enough to be read on ",
}


def summaries(comparisons: Sequence[Comparison]) -> list[Summary]:
    """On what every arm is better than the baseline, on what worse, and what is within noise, in plain words.

    A score counts as better if it is better at one level at least and worse at none; the sentence says at how many,
    and gives the numbers of the highest such level.
    """
    found = []
    for arm in dict.fromkeys(one.arm.arm for one in comparisons):
        own = [one for one in comparisons if one.arm.arm == arm]
        told: dict[str, list[str]] = {phrase: [] for phrase in PHRASES}
        for score in dict.fromkeys(one.arm.retention for one in own):
            outcome, words = _outcome([one for one in own if one.arm.retention == score])
            told[outcome].append(words)
        sentence = "; ".join(PHRASES[outcome] + ", ".join(words) for outcome, words in told.items() if words)
        found.append(Summary(arm, f"{sentence}."))
    return found


def _outcome(own: Sequence[Comparison]) -> tuple[str, str]:
    """One arm and score over all levels: the outcome, and the score's title with the numbers behind it."""
    verdicts, title = [one.verdict for one in own], own[0].kind.title
    if "better" in verdicts and "worse" in verdicts:
        return "mixed", title
    for outcome in ("better", "worse"):
        if outcome in verdicts:
            clear = max((one for one in own if one.verdict == outcome), key=lambda one: one.arm.level)
            mine, theirs = (clear.kind.show(mean) for mean in clear.means)
            levels = "all" if (n := verdicts.count(outcome)) == len(own) else f"{n} of"
            at = f"{mine} against {theirs} at adaptation {clear.arm.level:.2f}, {levels} {len(own)} levels"
            return outcome, f"{title} ({at})"
    return ("not reached" if set(verdicts) == {"not reached"} else "within noise"), title


def write_report(
    entries: Sequence[Entry],
    path: str | Path,
    *,
    baseline: str = "plain LoRA",
    title: str = "What was kept at equal learning",
    retention: Sequence[str] = ("skills", "refusal", "story_perplexity"),
    adaptation: str = "adaptation",
    levels: Sequence[float] | None = None,
    note: str = "",
    kinds: Mapping[str, ScoreKind] | None = None,
    scaled: bool = True,
    along: str | None = None,
    interactive: bool = True,
) -> Path:
    """Write the page.

    Args:
        entries: of one experiment, failed ones included (`Ledger.entries(experiment, status=None)`).
        path: of the page.
        baseline: the arm that the others are compared with.
        title: of the page.
        retention: the scores that are compared.
        adaptation: the score at which they are matched.
        levels: of adaptation; `matched_levels` of the baseline if None.
        note: a paragraph under the title, for what the reader must know about this experiment.
        kinds: directions and titles of scores that are not in `holdfast.analysis.scores`.
        scaled: whether post-hoc scaled points count as part of an arm's own sweep.
        along: the score whose front decides the settings for all; by default each score has its own.
        interactive: a figure that answers to the mouse, 5 MB; else a picture.
    """
    levels = matched_levels(entries, baseline, adaptation, kinds=kinds) if levels is None else tuple(levels)
    readings = at_matched_learning(entries, adaptation, retention, levels, kinds=kinds, scaled=scaled, along=along)
    comparisons = compare(readings, baseline, kinds=kinds, confidence=CONFIDENCE)
    still, live = io.BytesIO(), None
    frontier_figure(entries, retention, adaptation, levels=levels, kinds=kinds, scaled=scaled).savefig(still)
    if interactive:
        live = Markup(frontier_html_div(entries, retention, adaptation, levels=levels, kinds=kinds, scaled=scaled))
    learned = [one.scores[adaptation].value for one in entries if adaptation in one.scores and one.status == "done"]
    pages = jinja2.Environment(
        loader=jinja2.PackageLoader("holdfast.analysis"), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    page = pages.get_template("report.html.j2").render(
        title=title,
        note=note,
        baseline=baseline,
        adaptation=kind(adaptation, kinds),
        others=[arm for arm in arms(entries) if arm != baseline],
        levels=levels,
        retention=[(score, kind(score, kinds)) for score in retention],
        readings={(one.arm, one.retention, one.level): one for one in readings},
        comparisons={(one.arm.arm, one.arm.retention, one.arm.level): one for one in comparisons},
        summaries=summaries(comparisons),
        colours={arm: COLOURS[number % len(COLOURS)] for number, arm in enumerate(arms(entries))},
        clear=sum(one.verdict in ("better", "worse") for one in comparisons),
        judged=sum(one.verdict != "not reached" for one in comparisons),
        chance=1 - CONFIDENCE,
        wide=(max(learned) - min(learned)) / 3,
        figure=live,
        picture=base64.b64encode(still.getvalue()).decode(),
        costs=costs(entries, baseline),
        tried=settings_tried(entries),
        scaled=scaled,
        along=kind(along, kinds) if along else None,
        entries=entries,
        scores=list(dict.fromkeys(score for entry in entries for score in entry.scores)),
        known={**KNOWN, **(kinds or {})},
        environments=list({str(entry.environment): entry.environment for entry in entries}.values()),
    )
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(page, encoding="utf-8")
    return Path(path)
