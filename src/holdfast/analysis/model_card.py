"""The drift table of a model card: what tuning changed, beside what measured it, in Markdown for the model's README.

Read next: `holdfast.analysis.drift_report`, the whole page with answers side by side.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from holdfast.analysis.drift_rows import Kinds, Row, rows_of
from holdfast.analysis.drift_words import gate_headline, headline
from holdfast.analysis.gate import Judgement
from holdfast.drift.entry import Entry

HEAD = (
    "| Score | Base | Tuned | Drift [95 % interval] | n | Instrument |",
    "| --- | ---: | ---: | ---: | ---: | --- |",
)
CAVEAT = (
    "Intervals are over these items and one training run, and outcomes are corrected for the number of scores (Holm); "
    "“within noise” means not shown to have drifted, not shown to be the same."
)


def drift_table(base: Entry, tuned: Entry, judgement: Judgement | None = None, kinds: Kinds | None = None) -> str:
    """A section "Drift from the base" for a model card: verdict, a row for every score, a caveat, the command.

    Args:
        base: what was measured before tuning.
        tuned: after it, on the same items.
        judgement: of a gate on these two, whose sentence then comes first.
        kinds: how to read scores that `holdfast.analysis.scores` does not know.

    >>> from holdfast.drift.score import Score
    >>> before, after = (Entry("d", arm, {}, 0, "test", {"refusal": Score(rate, n=50, instrument="phrases 1")})
    ...                  for arm, rate in (("base", 1.0), ("LoRA", 0.5)))
    >>> print(drift_table(before, after).splitlines()[6])
    | Harmful requests refused (`refusal`) | 100.0 % | 50.0 % | −50.0 points [−64.3, −35.7], worse | 50 | phrases 1 |
    """
    rows, apart = rows_of(base.scores, tuned.scores, kinds)
    told = [gate_headline(judgement, rows)] if judgement else []
    lines = ["## Drift from the base", "", " ".join(one.sentence for one in (*told, headline(rows))), "", *HEAD]
    lines += [_line(name, row, base.scores[name].instrument) for name, row in rows.items()]
    lines += [f"| {escaped(name)} | – | – | not compared: {escaped(why)} | – | – |" for name, why in apart.items()]
    lines += ["", CAVEAT]
    if left_out := {**base.not_measured, **tuned.not_measured}:
        why = "; ".join(f"{escaped(name)} ({escaped(why)})" for name, why in left_out.items())
        lines += ["", f"Not measured: {why}."]
    return "\n".join([*lines, "", *_again(tuned.command or base.command)]) + "\n"


def _line(name: str, row: Row, instrument: str) -> str:
    """The row of one score."""
    called = [code(name)] * (row.kind.title != name) + ["second instrument"] * row.second
    title = escaped(row.kind.title) + (f" ({', '.join(called)})" if called else "")
    drift = f"{row.drift_text} {row.interval_text}, {row.outcome}{'' if row.directed else ' (direction not known)'}"
    n = str(row.change.n) if row.change.n else "–"
    cells = [title, row.shown(row.drift.base), row.shown(row.drift.tuned), drift, n, escaped(instrument) or "–"]
    return f"| {' | '.join(cells)} |"


def _again(command: str) -> Iterator[str]:
    """The command in a fence that is longer than any in it."""
    if not command:
        yield "How to measure it again was not recorded."
        return
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", command)), default=0))
    yield from ("Measured with:", "", f"{fence}sh", command, fence)


def code(text: str) -> str:
    r"""Text as code in a table's cell.

    >>> code("over_refusal"), code("a`b|c")
    ('`over_refusal`', '``a`b\\|c``')
    """
    ticks = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{ticks}{' '.join(text.split())}{ticks}".replace("|", "\\|")


def escaped(text: str) -> str:
    r"""Text that Markdown shows as it is: no markup, no new cell, no tag.

    >>> escaped("a|b *c* <i>")
    'a\\|b \\*c\\* &lt;i&gt;'
    """
    plain = re.sub(r"([\\`*_|\[\]~#$])", r"\\\1", " ".join(text.split()))
    return plain.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
