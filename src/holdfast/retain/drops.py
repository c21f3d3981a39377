"""Which samples are broken or there already, and are dropped: a base at temperature 1 derails now and then.

    loop:            one stretch four times in a row, over at least 12 tokens and a third of what was sampled
    near duplicate:  |F(a) ∩ F(b)| / |F(a) ∪ F(b)| >= 0.9,   F: the token 3-grams of a sequence (Jaccard, 1912)

Read next: `making`, which counts what was dropped and why.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from math import ceil

__all__ = ["Sieve", "broken", "grams"]

REPEATS, LEAST, SHARE, PERIODS = 4, 12, 1 / 3, 24
ALIKE = 0.9

Ids = Sequence[int]


def grams(ids: Ids, n: int = 3) -> set[tuple[int, ...]]:
    """The token n-grams of a sequence; of a shorter one, the whole.

    >>> sorted(grams([1, 2, 3, 4]))
    [(1, 2, 3), (2, 3, 4)]
    """
    return {tuple(ids[i : i + n]) for i in range(max(1, len(ids) - n + 1))}


def broken(ids: Ids) -> str | None:
    """Why sampled tokens are of no use: `one token`, `loop`, or None.

    >>> broken([7] * 12), broken([1, 2, 3] * 4), broken(list(range(12)))
    ('one token', 'loop', None)
    """
    least = max(LEAST, SHARE * len(ids))
    for period in range(1, min(PERIODS, len(ids) // REPEATS) + 1):
        run = 0
        for i in range(period, len(ids)):
            run = run + 1 if ids[i] == ids[i - period] else 0
            if run + period >= max(least, REPEATS * period):
                return "one token" if period == 1 else "loop"
    return None


class Sieve:
    """Lets through what it has not seen, exactly or nearly.

    Two sets that are alike share a feature among the |F| - ceil(0.9 |F|) + 1 first of each in any fixed order (prefix
    filtering: Bayardo et al., 2007), so only sets that do are compared, and none that is alike is missed.
    """

    def __init__(self) -> None:
        self._exact: set[tuple[int, ...]] = set()
        self._sets: list[set[tuple[int, ...]]] = []
        self._holders: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)

    def seen(self, ids: Ids) -> str | None:
        """Why a sequence is there already: `duplicate`, `near duplicate`; None: it was new, and is remembered.

        >>> sieve = Sieve()
        >>> [sieve.seen(ids) for ids in ([1, 2, 3], [1, 2, 3], [1, 2, 4])]
        [None, 'duplicate', None]
        """
        if tuple(ids) in self._exact:
            return "duplicate"
        found = grams(ids)
        first = sorted(found)[: len(found) - ceil(ALIKE * len(found) - 1e-9) + 1]
        for other in {place for gram in first for place in self._holders[gram]}:
            shared = len(found & self._sets[other])
            if shared >= ALIKE * (len(found) + len(self._sets[other]) - shared) - 1e-9:
                return "near duplicate"
        for gram in first:
            self._holders[gram].append(len(self._sets))
        self._exact.add(tuple(ids))
        self._sets.append(found)
        return None
