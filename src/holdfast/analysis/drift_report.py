"""The drift report: one page that says what tuning changed beyond noise, and lets both sides be read side by side.

The verdict comes first, in words; then every score with its interval, categories, answers that changed, what was not
measured, and how to measure it all again. The page loads nothing, runs nothing, and shows what models wrote as text.

Read next: `holdfast.analysis.drift_words`, the verdicts; `holdfast.analysis.drift_rows`, the numbers; docs/gate.md, how
sure they are.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from holdfast.analysis.drift_answers import GROUPS, Changed, changed
from holdfast.analysis.drift_axis import WIDTH, axis_of
from holdfast.analysis.drift_rows import LEVEL, Kinds, Part, Row, parts_of, rows_of, with_budgets
from holdfast.analysis.drift_text import cut, leaves, short
from holdfast.analysis.drift_units import ORDER, Unit
from holdfast.analysis.drift_words import Headline, gate_headline, headline
from holdfast.analysis.gate import Judgement
from holdfast.analysis.pages import pages, write_whole
from holdfast.analysis.paired import LEAST, reduction
from holdfast.drift.entry import Entry
from holdfast.drift.probe import BASE, Answer, ProbeError

MOST = 8
"""Answers shown of each group."""


@dataclass(frozen=True)
class Arm:
    """All that the page shows of one tuned model."""

    name: str
    entry: Entry
    rows: Mapping[str, Row]
    apart: Mapping[str, str]
    gate: Headline | None
    verdict: Headline
    categories: Mapping[str, tuple[Mapping[str, Part], Mapping[str, int]]]
    avoided: Sequence[tuple[Row, Row, str]]
    changed: Changed | None

    @property
    def groups(self) -> list[tuple[Unit, dict[str, Row]]]:
        """The rows by unit, the well-known units first."""
        units = sorted({row.unit for row in self.rows.values()}, key=lambda unit: unit.heading)
        units.sort(key=lambda unit: ORDER.index(unit) if unit in ORDER else len(ORDER))
        return [(unit, {name: row for name, row in self.rows.items() if row.unit == unit}) for unit in units]


def write_drift_report(
    path: str | Path,
    base: Entry,
    tuned: Sequence[Entry],
    *,
    answers: Mapping[str, Sequence[Answer]] | None = None,
    judgement: Judgement | None = None,
    reduction_against: str | None = None,
    title: str = "",
    notes: Mapping[str, str] | None = None,
    kinds: Kinds | None = None,
) -> Path:
    """Write the page.

    Args:
        path: of the page; folders are made.
        base: what was measured before tuning.
        tuned: after it, one entry for each arm, on the same items.
        answers: by arm, the base's under `"base"`.
        judgement: of a gate, shown at the arm whose scores it judged.
        reduction_against: the arm whose drift the others are to avoid, usually plain LoRA.
        title: of the page.
        notes: by score or probe, what a reader must know.
        kinds: how to read scores that `holdfast.analysis.scores` does not know.

    Raises:
        ProbeError: names everything that does not fit together.

    >>> import tempfile
    >>> from holdfast.drift.score import Score
    >>> before, after = (Entry("d", arm, {}, 0, "test", {"refusal": Score(rate, n=50)})
    ...                  for arm, rate in (("base", 1.0), ("LoRA", 0.5)))
    >>> page = write_drift_report(Path(tempfile.mkdtemp()) / "drift.html", before, [after]).read_text(encoding="utf-8")
    >>> "−50.0 points" in page
    True
    """
    written = dict(answers or {})
    faults = list(_faults(base, tuned, written, reduction_against))
    judged = next((entry for entry in tuned if judgement and _is_of(judgement, base, entry)), None)
    if judgement and judged is None:
        faults.append("the judgement is of other scores than those of base and any arm here: judge these entries")
    if faults:
        raise ProbeError("This drift report cannot be written:", faults)
    plain = next((entry for entry in tuned if entry.arm == reduction_against), None)
    arms = [_arm(base, entry, judgement if entry is judged else None, plain, written, kinds) for entry in tuned]
    units = dict.fromkeys(row.unit for arm in arms for row in arm.rows.values())
    entries = (base, *tuned)
    templates = pages()
    templates.filters |= {"cut": cut, "short": short}
    page = templates.get_template("drift.html.j2").render(
        title=title or f"Drift of {', '.join(entry.arm for entry in tuned)} from the base",
        base=base,
        arms=arms,
        axes={unit: axis_of(row for arm in arms for row in arm.rows.values() if row.unit == unit) for unit in units},
        axis_of=axis_of,
        width=WIDTH,
        entries=entries,
        leaves=leaves,
        known_base=set(leaves(base.models)),
        other_base=[entry.arm for entry in tuned if _other_base(base, entry)],
        days=sorted({entry.time[:10] for entry in entries}),
        judgement=judgement,
        plain=reduction_against,
        instruments=_instruments(entries),
        second=any(row.second for arm in arms for row in arm.rows.values()),
        any_answers=any(arm.changed for arm in arms),
        safety_judged=any(name.partition(".")[0] == "harmful" for entry in entries for name in entry.scores),
        not_measured={name: why for entry in entries for name, why in entry.not_measured.items()},
        notes=dict(notes or {}),
        commands=list(dict.fromkeys(entry.command for entry in entries if entry.command)),
        environments=list({str(entry.environment): entry.environment for entry in entries}.values()),
        least=LEAST,
        most=MOST,
        level=LEVEL,
        explained=GROUPS,
    )
    return write_whole(path, page)


def _faults(
    base: Entry, tuned: Sequence[Entry], answers: Mapping[str, Sequence[Answer]], against: str | None
) -> Iterator[str]:
    arms = [entry.arm for entry in tuned]
    if not tuned:
        yield "there is no tuned entry to compare with the base"
    for arm, count in Counter(arms).items():
        if count > 1:
            yield f"arm {arm!r} is there {count} times: give one entry for each arm"
        if arm == BASE:
            yield f"a tuned entry is called {BASE!r}: give it the name of what was tuned"
    for entry in (base, *tuned):
        if entry.status == "failed":
            yield f"the entry of {entry.arm!r} is of a failed run ({entry.error}): there is nothing to report"
        if entry.split != base.split:
            yield f"{entry.arm!r} was measured on split {entry.split!r}, the base on {base.split!r}: other items"
    for arm in answers:
        if arm not in (BASE, *arms):
            yield f"there are answers of {arm!r}, which is no arm here ({', '.join((BASE, *arms))})"
    if against is not None and (against not in arms or len(arms) < 2):
        there = ", ".join(arms) or "no arm"
        yield f"drift reduction against {against!r} needs that arm and another one, and there is: {there}"


def _is_of(judgement: Judgement, base: Entry, tuned: Entry) -> bool:
    """Whether the judgement's values are those of these entries, as far as it judged whole scores."""
    whole = [verdict for verdict in judgement.verdicts if verdict.budget.category is None]
    return all(
        one.budget.score in entry.scores and entry.scores[one.budget.score].value == value
        for one in whole
        for entry, value in ((base, one.base), (tuned, one.tuned))
    )


def _other_base(base: Entry, tuned: Entry) -> bool:
    """Whether both say what the base was, and do not say the same."""
    recorded = base.models.get(BASE), tuned.models.get(BASE)
    return None not in recorded and recorded[0] != recorded[1]


def _instruments(entries: Sequence[Entry]) -> dict[str, list[str]]:
    """What measured every score: more than one where entries differ."""
    scores = [(name, score.instrument or "not recorded") for entry in entries for name, score in entry.scores.items()]
    return {name: list(dict.fromkeys(how for other, how in scores if other == name)) for name, _ in scores}


def _arm(
    base: Entry, entry: Entry, judgement: Judgement | None, plain: Entry | None,
    answers: Mapping[str, Sequence[Answer]], kinds: Kinds | None,
) -> Arm:  # fmt: skip
    rows, apart = rows_of(base.scores, entry.scores, kinds)
    rows = with_budgets(rows, judgement) if judgement else rows
    categories = {}
    for name, row in rows.items():
        if len(set(base.scores[name].categories or ())) > 1:  # of one category the chart has said all
            try:
                categories[name] = parts_of(row, base.scores[name], entry.scores[name])
            except ValueError as error:
                apart[f"{name} by category"] = str(error)
    avoided = []
    if plain is not None and plain is not entry:
        theirs = rows_of(base.scores, plain.scores, kinds).rows
        both = [name for name in rows if name in theirs]
        avoided = [(rows[name], theirs[name], _share(base, entry, plain, name)) for name in both]
    return Arm(
        name=entry.arm,
        entry=entry,
        rows=rows,
        apart=apart,
        gate=gate_headline(judgement, rows) if judgement else None,
        verdict=headline(rows),
        categories=categories,
        avoided=avoided,
        changed=changed(answers[BASE], answers[entry.arm]) if {BASE, entry.arm} <= answers.keys() else None,
    )


def _share(base: Entry, ours: Entry, plain: Entry, name: str) -> str:
    """The share of the plain arm's drift that ours avoids, with Fieller's interval, or why there is none."""
    try:
        value, (low, high) = reduction(base.scores[name], ours.scores[name], plain.scores[name])
    except ValueError:
        return "not known: it needs the items of all three"
    if not all(map(math.isfinite, (value, low, high))):
        return f"not known: the drift of {plain.arm} may be 0"
    return f"{100 * value:.0f} % [{100 * low:.0f} %, {100 * high:.0f} %]".replace("-", "−")
