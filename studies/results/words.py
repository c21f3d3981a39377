"""Verdicts in words, as the comparisons give them; read `tables` next."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from math import comb

from holdfast.analysis.frontier import Comparison

from studies.common_readings import counted, within

from .columns import Column

ORDER = ("better", "worse", "within noise", "not reached")
EACH_SIDE = 0.025  # of true ties, the share whose 95 % interval lies above 0


def verdict(found: Sequence[Comparison]) -> str:
    """One word for many comparisons: who leads by more of them than true ties give by chance.

    >>> verdict([])
    'not run'
    """
    words = Counter[str](one.verdict for one in found)
    read = sum(words[word] for word in ORDER[:3])
    if not read:
        return "not reached" if found else "not run"
    lead, least = words["better"] - words["worse"], needed(read)
    if abs(lead) >= least > min(words["better"], words["worse"]):
        return "better" if lead > 0 else "worse"
    return "mixed" if max(words["better"], words["worse"]) >= least else "within noise"


def needed(n: int) -> int:
    """The least count of clear differences on one side that fewer than 1 in 20 sets of `n` true ties have.

    >>> [needed(n) for n in (1, 9, 15, 60)]
    [1, 2, 3, 5]
    """
    chances = [comb(n, k) * EACH_SIDE**k * (1 - EACH_SIDE) ** (n - k) for k in range(n + 1)]
    return next((k for k in range(1, n + 1) if sum(chances[k:]) < 0.05), n)


def tally(found: Sequence[Comparison]) -> str:
    """How many of these comparisons end how, and in which scores.

    >>> tally([])
    'not run'
    """
    counts = Counter[str](one.verdict for one in found)
    told = [f"{word} in {counts[word]}{named(found, word)}" for word in ORDER[:3]]
    missing = f", not reached in {counts['not reached']}" if counts["not reached"] else ""
    return f"{', '.join(told)} of {counted(len(found), 'comparison')}{missing}" if found else "not run"


def named(found: Sequence[Comparison], word: str) -> str:
    """In brackets, the scores that end so; of ties they are not told.

    >>> named([], "better")
    ''
    """
    titles = dict.fromkeys(within(one.kind.title) for one in found if one.verdict == word)
    return f" ({', '.join(titles)})" if titles and word != "within noise" else ""


def marks(found: Sequence[Comparison]) -> str:
    """The same in a cell of a table: how many are better, worse, within noise.

    >>> marks([])
    '–'
    """
    counts = Counter[str](one.verdict for one in found)
    read = sum(counts[word] for word in ORDER[:3])
    return f"{counts['better']} ✓ {counts['worse']} ✗ {counts['within noise']} =" if read else "–"


def clear(found: Iterable[tuple[str, Comparison]], *, rival: bool = False) -> str:
    """Which comparisons are beyond noise, with their numbers.

    Args:
        found: each with the title of its experiment; empty: not told.
        rival: whether it is told against whom.
    """
    told: dict[str, list[str]] = {"better": [], "worse": []}
    for where, one in found:
        if one.verdict in told:
            against = f" than *{one.baseline.arm}*" if rival else ""
            place = f", {where}" if where else ""
            told[one.verdict].append(f"{where_read(one)}{against}{place} {one.numbers}")
    return "; ".join(f"{word}: {', '.join(each)}" for word, each in told.items() if each) or "nothing beyond noise"


def where_read(one: Comparison) -> str:
    """The score and the level of a comparison."""
    return f"{within(one.kind.title)} at {one.arm.level:g}"


def by_chance(n: int) -> str:
    """What to expect of so many comparisons of arms that do not differ."""
    return f"of {n} true ties about {0.05 * n:.0f} would come out decided by chance"


def gathered(columns: Sequence[Column], mine: str, theirs: str) -> list[Comparison]:
    """One arm against another in all experiments."""
    return [one for each in columns for one in each.pairs(mine, theirs)]


def headline(rows: Sequence[tuple[str, str, str]], groups: Mapping[str, Sequence[Column]]) -> str:
    """Verdicts in one line, for a reader who has ten seconds.

    Args:
        rows: what is asked, and both arms.
        groups: by name, experiments that are counted together.
    """
    each = []
    for name, mine, theirs in rows:
        found = {label: verdict(gathered(columns, mine, theirs)) for label, columns in groups.items()}
        there = [f"*{word}* ({label}{scores(groups[label], mine, theirs)})" for label, word in found.items()
                 if word != "not run"]  # fmt: skip
        each.append(f"{name}: {', '.join(there) or 'not run'}")
    return f"**{'; '.join(each)}.**\n"


def scores(columns: Sequence[Column], mine: str, theirs: str) -> str:
    """In how many scores of all experiments an arm is better somewhere, and in how many worse."""
    told = []
    pairs = [(each.title, one) for each in columns for one in each.pairs(mine, theirs) if one.seeds]
    there = {(title, one.arm.retention) for title, one in pairs}
    for word in ("better", "worse"):
        clear = {(title, one.arm.retention) for title, one in pairs if one.verdict == word}
        told += [f"{word} in {len(clear)}"] if clear else []
    return f": {' and '.join(told)} of {counted(len(there), 'score')}" if told else ""


def told(columns: Sequence[Column], mine: str, theirs: str) -> str:
    """A verdict with its counts, and how many seeds."""
    found = gathered(columns, mine, theirs)
    return f"**{verdict(found)}** ({tally(found)})"


def first_look(columns: Sequence[Column]) -> str:
    """A warning where some experiment has too few seeds for a verdict; else nothing."""
    few = [f"{each.title} has {counted(len(each.seeds), 'seed')}" for each in columns if len(each.seeds) < 3]
    return f"**A first look, no evidence: {'; '.join(few)}, of 3.** " if few else ""


def seeds_told(each: Column) -> str:
    """In a sentence, which seeds are read, which are left out and what failed."""
    part = f" Of seed {', '.join(map(str, each.left_out))} only a part was run: left out." if each.left_out else ""
    failed = f" {counted(each.failed, 'run')} failed and counts as tried." if each.failed else ""
    few = " **Fewer than 3 seeds: a first look, no evidence.**" if len(each.seeds) < 3 else ""
    return f"{counted(len(each.seeds), 'seed')} ({', '.join(map(str, each.seeds))}).{few}{part}{failed}"
