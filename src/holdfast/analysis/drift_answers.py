"""Which answers changed between base and tuned, side by side and in groups: refusals lost, answers broken, and so on.

    pair = (id, prompt, instrument) on both sides        group: from verdict before to verdict after

Read next: `holdfast.analysis.drift_report`, the page that shows them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from holdfast.drift.probe import Answer

REFUSED = ("refusal", "partial")
GROUPS = {
    "refusal lost": "Refused by the base, answered by the tuned model.",
    "refusal gained": "Answered by the base, refused by the tuned model.",
    "now broken": "Empty, looping or an echo, where the base gave an answer.",
    "right to wrong": "Right before tuning, wrong after.",
    "wrong to right": "Wrong before tuning, right after.",
    "harmless to harmful": "By a safety judge, harmless before tuning and harmful after.",
    "harmful to harmless": "By a safety judge, harmful before tuning and harmless after.",
    "another verdict": "The verdict changed in some other way.",
    "other wording": "The same verdict, in other words.",
}


class Pair(NamedTuple):
    """Two answers to one prompt, and what further instruments made of them: (instrument, before, after)."""

    before: Answer
    after: Answer
    others: tuple[tuple[str, str, str], ...] = ()

    @property
    def unsafe(self) -> bool:
        """Whether the prompt asks for harm, or any instrument found harm in an answer."""
        verdicts = {self.before.verdict, self.after.verdict, *(verdict for _, *both in self.others for verdict in both)}
        return self.before.expected == "refuse" or "harmful" in verdicts


class Changed(NamedTuple):
    """Pairs by what happened, in the order of `GROUPS`; how many stayed word for word; how many have no partner."""

    groups: dict[str, list[Pair]]
    same: int
    alone: int


def changed(base: Sequence[Answer], tuned: Sequence[Answer]) -> Changed:
    """Sort answers to the same prompts by what happened to them; a second instrument's verdict stays with its answer.

    >>> before, after = (Answer("1", "Who?", "Me.", verdict) for verdict in ("compliance", "refusal"))
    >>> list(changed([before], [after]).groups)
    ['refusal gained']
    """
    ours, theirs = _keyed(base), _keyed(tuned)
    prompts: dict[tuple[str, str, int], list[tuple[Answer, Answer]]] = {}
    for key in (key for key in ours if key in theirs):
        prompts.setdefault((key[0], key[1], key[3]), []).append((ours[key], theirs[key]))
    groups: dict[str, list[Pair]] = {name: [] for name in GROUPS}
    same = 0
    for readings in prompts.values():
        happened = [_happened(*reading) for reading in readings]
        first = next((place for place, what in enumerate(happened) if what not in ("", "other wording")), 0)
        rest = [(b.instrument, b.verdict, a.verdict) for b, a in readings if b is not readings[first][0]]
        if what := happened[first]:
            groups[what].append(Pair(*readings[first], tuple(rest)))
        else:
            same += 1
    groups["refusal lost"].sort(key=lambda pair: pair.before.expected != "refuse")  # harm first
    groups["refusal gained"].sort(key=lambda pair: pair.before.expected != "comply")
    return Changed({name: pairs for name, pairs in groups.items() if pairs}, same, len(ours.keys() ^ theirs.keys()))


def _keyed(answers: Sequence[Answer]) -> dict[tuple[str, str, str, int], Answer]:
    """Answers by id, prompt, instrument and, where these come again, how often."""
    seen, keyed = Counter[tuple[str, str, str]](), dict[tuple[str, str, str, int], Answer]()
    for answer in answers:
        key = answer.id, answer.prompt, answer.instrument
        keyed[*key, seen[key]] = answer
        seen[key] += 1
    return keyed


def _happened(before: Answer, after: Answer) -> str:
    """The name of the group; empty if nothing changed."""
    if before.verdict == after.verdict:
        return "other wording" if before.text != after.text else ""
    if after.verdict == "broken":
        return "now broken"
    if before.verdict in REFUSED and after.verdict == "compliance":
        return "refusal lost"
    if before.verdict == "compliance" and after.verdict in REFUSED:
        return "refusal gained"
    turned = f"{before.verdict} to {after.verdict}"
    return turned if turned in GROUPS else "another verdict"
