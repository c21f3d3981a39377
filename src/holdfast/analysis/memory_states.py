"""What the methods hold, in bytes: bases, Fishers, caches; each as it is allocated, so that sizes are exact.

    basis k·P·b + 8·blocks·k²        Kronecker factor (d·q + q + 1)·b        cache of the base (H·b + 12) a position

Read `memory` first, whose letters these are; `recipe.memory_methods` says which method holds which.
"""

from __future__ import annotations

from collections.abc import Iterable

from .memory import WIDE

LONG = 8  # bytes of an int64 or a float64
DENSE = 1024  # inputs up to this size have their second moment summed as it is


def basis(rank: int, parameters: int, bytes_each: int = WIDE) -> int:
    """Directions, one for each number that is trained: k · P · b.

    >>> basis(16, 1000)
    64000
    """
    return rank * parameters * bytes_each


def coordinates(rank: int, blocks: int = 1) -> int:
    """Reference gradients in the coordinates of their basis, in float64: 8 · blocks · k²."""
    return LONG * blocks * rank**2


def factor(size: int, keep: int, *, diagonal: bool = False, element: int = WIDE) -> int:
    """One side of a Kronecker Fisher: q = min(keep, d) eigenvectors and values, and a rest: (d q + q + 1) · b.

    Args:
        size: d, of what enters or leaves the layer.
        keep: eigenvectors kept.
        diagonal: the diagonal alone: (d + 1) · b.
        element: b, 4; 8 where the model is in float64.

    >>> factor(100, 64), factor(100, 64, diagonal=True)
    (25860, 404)
    """
    kept = min(keep, size)
    return element * (size + 1 if diagonal else size * kept + kept + 1)


def kronecker(
    outputs: Iterable[int], inputs: Iterable[int], keep: int, *, diagonal: bool = False, element: int = WIDE
) -> int:
    """The Kronecker Fisher of all layers, on one retain set: a factor for each output, one for each different input.

    Args:
        outputs: d of every layer.
        inputs: d of every input; layers that are called one after another on the same tensor share one.
        keep: eigenvectors kept on each side.
        diagonal: diagonals alone.
        element: b.
    """
    return sum(factor(size, keep, diagonal=diagonal, element=element) for size in (*outputs, *inputs))


def sample_gram(rows: int, keep: int, shapes: Iterable[tuple[int, int]], element: int = WIDE) -> int:
    """The exact Fisher, gradients of single rows in factors: rows · keep · Σ (out + in) · b."""
    return rows * keep * element * sum(out + into for out, into in shapes)


def moment_sums(sizes: Iterable[int], keep: int, *, diagonal: bool = False) -> int:
    """Sums while a Kronecker Fisher is collected, a side: d² · 4 where d <= 1024, else a sketch, 2 keep · d · 4."""
    if diagonal:
        return WIDE * sum(sizes)
    return WIDE * sum(d * d if d <= max(DENSE, 4 * keep) else 2 * keep * d for d in sizes)


def statistics_a_token(hidden: int, element: int = WIDE) -> int:
    """The exact cache of a token, e0 and c0, and the token itself: H · b + 8 + 4.

    >>> statistics_a_token(896), statistics_a_token(896, 2)
    (3596, 1804)
    """
    return hidden * element + LONG + WIDE


def states_a_token(hidden: int, element: int) -> int:
    """The cache of a token where statistics would not be exact, the base's hidden state and the token: H · e + 4."""
    return hidden * element + WIDE


def pool_cache(positions: int, sequences: int, a_token: int) -> int:
    """A pool's cache on disk: its positions, and of each sequence one token more and where it begins.

    Args:
        positions: of all sequences, one fewer than each has tokens.
        sequences: how many.
        a_token: bytes, of `statistics_a_token` or `states_a_token`.
    """
    return positions * a_token + WIDE * sequences + LONG * (sequences + 1)


def batches(tokens: int, columns: int = 3) -> int:
    """Retain batches, ids, mask and labels in int64: 24 bytes a token, padding included."""
    return LONG * columns * tokens
