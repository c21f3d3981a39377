"""Near-duplicates: which texts of a collection are alike, exactly and without comparing every pair.

    likeness(a, b) = |F(a) ∩ F(b)| / |F(a) ∪ F(b)|        F: the words and word pairs of a text (Jaccard, 1912)

If the likeness of two texts is at least t, they share at least ceil(t |F|) features, hence one of the
|F| - ceil(t |F|) + 1 rarest of each (prefix filtering: Chaudhuri et al., 2006; Bayardo et al., 2007). Only texts that
share a rare feature are compared, and none that is alike is missed. Standard library only.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

__all__ = ["alike", "clusters", "features", "likeness", "words"]


def words(text: str) -> list[str]:
    """The words of a text in small letters, without punctuation.

    >>> words("Don’t STOP, 2nd try!")
    ["don't", 'stop', '2nd', 'try']
    """
    return re.findall(r"\w+(?:'\w+)?", text.lower().replace("’", "'"))


def features(text: str) -> frozenset[str]:
    """The words and word pairs of a text.

    >>> sorted(features("to be"))
    ['be', 'to', 'to be']
    """
    found = words(text)
    return frozenset((*found, *(f"{a} {b}" for a, b in pairwise(found))))


def likeness(a: str, b: str) -> float:
    """How alike two texts are, from 0 to 1; 0 if neither has words.

    >>> likeness("How do I kill time?", "how do I kill time"), likeness("a b", "c d")
    (1.0, 0.0)
    """
    first, second = features(a), features(b)
    return len(first & second) / len(first | second) if first or second else 0.0


def alike(texts: Sequence[str], threshold: float) -> Iterator[tuple[int, int, float]]:
    """Places i < j of all pairs of texts with a likeness of at least the threshold, and the likeness; j ascends.

    Raises:
        ValueError: if the threshold is not above 0 and at most 1.

    >>> [(i, j) for i, j, _ in alike(["a b c d", "x y", "a b c d e"], 0.7)]
    [(0, 2)]
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"The threshold of likeness must be above 0 and at most 1, got {threshold}.")
    sets = [features(text) for text in texts]
    frequency = Counter(feature for found in sets for feature in found)
    holders: defaultdict[str, list[int]] = defaultdict(list)  # who has a feature among its rarest
    for j, found in enumerate(sets):
        rarest = sorted(found, key=lambda feature: (frequency[feature], feature))
        prefix = rarest[: len(found) - math.ceil(threshold * len(found) - 1e-9) + 1]
        for i in sorted({i for feature in prefix for i in holders[feature]}):
            shared = len(found & sets[i])
            if (value := shared / (len(found) + len(sets[i]) - shared)) >= threshold:
                yield i, j, value
        for feature in prefix:
            holders[feature].append(j)


def clusters(n: int, links: Iterable[tuple[int, int]]) -> list[int]:
    """For each of n items the smallest item that links lead to, directly or through others.

    >>> clusters(5, [(3, 1), (4, 3)])
    [0, 1, 2, 1, 1]
    """
    root = list(range(n))

    def find(i: int) -> int:
        while root[i] != i:
            root[i] = i = root[root[i]]
        return i

    for a, b in links:
        low, high = sorted((find(a), find(b)))
        root[high] = low
    return [find(i) for i in range(n)]
