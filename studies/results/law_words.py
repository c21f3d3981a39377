"""The verdicts on the law of forgetting, as the fits and the comparison at equal learning give them; read `law_page`.

flatter: less forgotten at equal data, and at equal learning too;      only slower: at equal data alone
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence

from holdfast.analysis.extrapolation import LAST_SEEN
from holdfast.analysis.fit_limits import BEYOND, misfit
from holdfast.analysis.fit_pairs import Difference

from studies.common_readings import counted, within

from .columns import Column
from .comparisons import KINDS, PLAIN
from .law_fits import Laws, measured, nearest, seen
from .law_tables import middle_of, shown
from .words import gathered, tally, verdict

HEADS = {
    "better": "flatter: less forgotten at equal data, and at equal learning too",
    "worse": "only slower: less forgotten at equal data, more at equal learning",
    "mixed": "less forgotten at equal data, mixed at equal learning",
    "within noise": "only slower, as far as these runs tell: less forgotten at equal data, not beyond noise at equal "
    "learning",
    "not reached": "less forgotten at equal data, but it never learns as much",
}


def verdicts(each: Column, found: Sequence[Laws]) -> str:
    """In a paragraph whether methods flatten the law and whether it holds at all; then a line for each, and more."""
    if not any(PLAIN in one.fits for one in found):
        return f"- The law of *{PLAIN}* cannot be fitted, so nothing is compared with it.\n{refusals(found)}"
    told = [method(each, found, arm) for arm in each.arms if arm != PLAIN]
    short = "; ".join(one.split("**")[1].rstrip(".:") for one in told)
    lines = [f"- {one}" for one in [*told, foretelling(found), ranks(found)]]
    return "\n".join([f"**{short}.** {described(found)}\n", *lines])


def method(each: Column, found: Sequence[Laws], arm: str) -> str:
    """Whether a method flattens the law."""
    data = nearest(each, middle_of(found)[0])
    pairs = {within(KINDS[one.score].title): seen(each, arm, one.score, data) for one in found}
    pairs = {title: one for title, one in pairs.items() if one is not None}
    if not pairs:
        return f"**{arm}:** not told: too few seeds have its runs and those of *{PLAIN}*."
    pair = gathered([each], arm, PLAIN)
    learned = [measured(each.entries, name, each.learnt, data) for name in (arm, PLAIN)]
    numbers = ", ".join(f"{title} {shown(one)}" for title, one in pairs.items())
    return (
        f"**{arm}: {head([*pairs.values()], verdict(pair))}.** At D = {data:g}, measured, against *{PLAIN}*: {numbers}"
        f"; task loss there {learned[0]:.3f} against {learned[1]:.3f}. At equal learning: {tally(pair)}."
    )


def head(differences: Sequence[Difference], learned: str) -> str:
    """The verdict in a few words.

    Args:
        differences: of forgetting at equal data, one for each score.
        learned: the verdict at equal learning.

    >>> head([Difference(-0.2, -0.3, -0.1)], "better")
    'flatter: less forgotten at equal data, and at equal learning too'
    >>> head([Difference(0.0, -0.1, 0.1)], "better")
    'not flatter at equal data (no difference beyond noise), but better at equal learning'
    """
    words = {one.verdict for one in differences}
    if "less" in words and "more" not in words:
        return HEADS.get(learned, f"less forgotten at equal data; at equal learning {learned}")
    how = "more forgotten" if words == {"more"} or words == {"more", "within noise"} else "less of one, more of another"
    how = "no difference beyond noise" if words == {"within noise"} else how
    joined = "but" if learned == "better" else "and"
    return f"not flatter at equal data ({how}), {joined} {learned} at equal learning"


def claimed(each: Column, found: Sequence[Laws]) -> str:
    """For each arm whether A and E are lower than those of plain LoRA."""
    lines = []
    for arm in each.arms:
        told = []
        for name in ("A", "E"):
            known = {one.score: one.parameter(arm, name) for one in found}
            parts = [
                f"{within(KINDS[score].title)} {ratio(one) if name == 'A' else shown(one)}"
                for score, one in known.items()
                if one is not None
            ]
            less = sum(one is not None and one.verdict == "less" for one in known.values())
            told.append(
                f"{name} lower beyond noise in {less} of {counted(len(parts), 'law')} ({', '.join(parts)})"
                if parts
                else f"{name} is not told"
            )
        if arm != PLAIN:
            lines.append(f"- *{arm}* against *{PLAIN}*: {'; '.join(told)}.")
    note = "Of A the ratio is shown. A lower A with a higher β is no flatter law: both come from the same points.\n"
    return "\n".join([note, *lines])


def ratio(one: Difference) -> str:
    """A difference of logarithms as a factor."""
    low, value, high = (math.exp(min(end, 99.0)) for end in (one.low, one.value, one.high))
    return f"{'✓ ' if one.verdict == 'less' else ''}×{value:.2g} [×{low:.2g}, ×{high:.2g}]"


def described(found: Sequence[Laws]) -> str:
    """Whether the law goes through the runs that it was fitted to."""
    every = [misfit(fitted.points, fitted.residuals) for one in found for fitted in one.fits.values()]
    off = sum(miss > BEYOND * noise and miss > 1e-3 for miss, noise in every)
    misses, noises = ([100 * each for each in side] for side in zip(*every, strict=True))
    told = " What such a law says of A and E is no measurement." if off > len(every) / 2 else ""
    return (
        f"**Does the law describe the runs?** Not in {off} of {counted(len(every), 'law')}: it misses the mean loss of "
        f"a place by {min(misses):.0f} to {max(misses):.0f} %, where runs differ by {min(noises):.0f} to "
        f"{max(noises):.0f} %.{told}"
    )


def foretelling(found: Sequence[Laws]) -> str:
    """Which form foretells best how often, and whether any is of use."""
    best, useful, total = Counter[str](), Counter[str](), 0
    for one in found:
        for forms in one.forms.values():
            if not isinstance(forms, str):
                total += 1
                mark = next(form.error for form in forms if form.law == LAST_SEEN)
                known = [form for form in forms if form.law != LAST_SEEN and not form.why]
                useful.update(form.law for form in known if form.error < mark)
                best[min(forms, key=lambda form: (math.isnan(form.error), form.error)).law] += 1
    if not total:
        return "**Is it this law?** Forms were not compared."
    firsts = ", ".join(f"*{name}* in {count}" for name, count in best.most_common())
    return (
        f"**Is it this law?** Of {counted(total, 'set')} of runs the largest amounts of data are foretold best by "
        f"{firsts}; the form with E is better than repeating the last loss seen in {useful['drift']}."
    )


def ranks(found: Sequence[Laws]) -> str:
    """What the laws say of the adapter's rank."""
    ends = [fitted.intervals["α"] for one in found for fitted in one.fits.values() if "α" in fitted.intervals]
    fewer, more = sum(low > 0 for low, _ in ends), sum(high < 0 for _, high in ends)
    return (
        f"**Does rank matter?** Of {counted(len(ends), 'law')}, forgetting falls with rank beyond noise in {fewer} and "
        f"rises in {more}; in {len(ends) - fewer - more} α is not told from 0."
    )


def drawn_by_runs(each: Column, by_seeds: Sequence[Laws], by_runs: Sequence[Laws]) -> str:
    """Whether the verdicts at equal data would be others if runs, not seeds, were drawn."""
    same, other = 0, []
    for one, two in zip(by_seeds, by_runs, strict=True):
        for arm in each.arms:
            mine, theirs = one.against(arm), two.against(arm)
            if arm == PLAIN or mine is None or theirs is None:
                continue
            same += mine.verdict == theirs.verdict
            if mine.verdict != theirs.verdict:
                other.append(f"{within(KINDS[one.score].title)} of *{arm}* ({theirs.verdict}: {shown(theirs)})")
    sizes = {len(fitted.groups) for one in by_runs for fitted in one.fits.values()}
    runs = " or ".join(map(str, sorted(sizes)))
    told = f"Of the others: {', '.join(other)}." if other else ""
    return (
        f"**Runs instead of seeds.** Drawing whole runs ({runs} of each arm) supposes that runs of one seed at "
        f"different ranks are independent, and gives narrower intervals: {same} of {same + len(other)} differences at "
        f"equal data have the same verdict. {told}\n\n**What the arms have in common.** Every arm has the same rows in "
        "the same order at equal seeds, the same rate, and the same amounts of data; only the method differs."
    )


def refusals(found: Sequence[Laws]) -> str:
    """What the fits refuse or doubt, each sentence once, with the laws that it is about."""
    about: dict[str, list[str]] = defaultdict(list)
    for one in found:
        title = within(KINDS[one.score].title)
        for arm, why in one.refused.items():
            about[f"Not fitted: {why}"].append(f"{title} of *{arm}*")
        for arm, fitted in one.fits.items():
            for sentence in fitted.said:
                about[sentence].append(f"{title} of *{arm}*")
    total = sum(len(one.fits) + len(one.refused) for one in found)
    lines = [
        f"- {sentence} ({'all laws' if len(where) == total else ', '.join(where)})" for sentence, where in about.items()
    ]
    return "\n".join(lines) or "Nothing."
