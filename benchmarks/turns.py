"""Times in turns: every variant once, then all again, so that whatever else the machine does falls on all alike.

    ratio of a to b = median of a / median of b,    its spread: the least and the greatest a/b of one round

CPU seconds are the main figure (user + system time of this process), wall seconds stand beside them. Read next:
`record`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from record import Row

CPU, WALL = "cpu seconds", "wall seconds"


class Seconds(NamedTuple):
    """What one call took."""

    cpu: float
    wall: float


def timed(work: Callable[[], object]) -> Seconds:
    """Time one call."""
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return Seconds(time.process_time() - cpu, time.perf_counter() - wall)


def in_turns(runs: Mapping[str, Callable[[], object]], rounds: int, label: str) -> dict[str, list[Seconds]]:
    """Run the variants in turn, saying after each round how long the rest will take."""
    found: dict[str, list[Seconds]] = {name: [] for name in runs}
    started = time.perf_counter()
    for turn in range(1, rounds + 1):
        for name, run in runs.items():
            found[name].append(timed(run))
        left = (time.perf_counter() - started) / turn * (rounds - turn) / 60
        print(f"{label}: round {turn} of {rounds}" + (f", {left:.0f} minutes to go" if left >= 1 else ""), flush=True)
    return found


def rows(
    found: Mapping[str, Sequence[Seconds]], pairs: Iterable[tuple[str, str]], common: Row, prefix: str = ""
) -> list[Row]:
    """Return the seconds of every variant, and the ratio of every pair that was timed, as rows for `record.write`."""
    pairs, table = list(pairs), list[Row]()
    common = {**common, "rounds": len(next(iter(found.values())))}
    for column, metric in enumerate((CPU, WALL)):
        times = {name: [each[column] for each in values] for name, values in found.items()}
        for name, seconds in times.items():
            table.append({**common, "variant": prefix + name, "metric": metric, **spread(seconds)})
        for name, peer in pairs:
            if name in times and peer in times:
                names: Row = {"variant": prefix + name, "peer": prefix + peer, "metric": f"{metric}, ratio"}
                table.append({**common, **names, **ratio(times[name], times[peer])})
    return table


def spread(values: Sequence[float]) -> Row:
    """Return the median of some rounds with the least and the greatest.

    >>> spread([3.0, 1.0, 2.0])
    {'value': 2.0, 'low': 1.0, 'high': 3.0}
    """
    return {"value": statistics.median(values), "low": min(values), "high": max(values)}


def ratio(mine: Sequence[float], theirs: Sequence[float]) -> Row:
    """Return the ratio of two medians, with the least and the greatest ratio of one round.

    >>> ratio([1.0, 2.0, 6.0], [2.0, 4.0, 6.0])
    {'value': 0.5, 'low': 0.5, 'high': 1.0}
    """
    each = [a / b for a, b in zip(mine, theirs, strict=True)]
    return {"value": statistics.median(mine) / statistics.median(theirs), "low": min(each), "high": max(each)}
