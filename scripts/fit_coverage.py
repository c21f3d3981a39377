"""How often the intervals of `holdfast fit` hold what was planted: synthetic runs of known laws, fitted again.

    python scripts/fit_coverage.py --sets 200
    python scripts/fit_coverage.py --sets 200 --together 0.02 --shared runs               # checkpoints of long runs
    python scripts/fit_coverage.py --sets 200 --together 0.02 --shared seeds --draw seeds

Every set has its own noise, on log L; `--together` adds noise that all points of a run, or of a seed, share. Coverage
is the share of sets whose 95 % interval holds the planted number, with its own 95 % interval (Wilson). `10x` is the
mean loss at 10 times the largest amount of data.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal, TypeAlias

import numpy as np
from holdfast.analysis.fit import LAWS, Points, fit

Drawn: TypeAlias = Literal["points", "runs", "seeds"]
BASE = 2.0
PLANTED: Mapping[str, Mapping[str, float]] = {
    "base": {"A": 0.01, "α": 0.3, "β": 0.4},
    "drift": {"A": 0.01, "α": 0.3, "β": 0.4, "E": 0.06},
    "injected": {"A": 0.01, "B": 800.0, "α": 0.3, "β": 0.4},
    "shifted": {"S": 1.5, "A": 0.8, "α": 0.5, "C": 2.0, "β": 0.3},
}


def synthetic(
    law: str,
    random: np.random.Generator,
    noise: float = 0.01,
    seeds: int = 3,
    together: float = 0,
    shared: Drawn = "seeds",
) -> Points:
    """Six amounts of data over three decades, three sizes, and seeds.

    Args:
        law: that is planted.
        random: source of the noise.
        noise: of every point.
        seeds: how many.
        together: noise that several points share.
        shared: which do: the amounts of data of one size and seed, as checkpoints of one run, or all points of a seed.
    """
    shares = (0.0, 0.001, 0.01) if law == "injected" else (0.0,)
    grid = np.meshgrid(np.geomspace(1e2, 1e5, 6), [4.0, 16.0, 64.0], shares, np.arange(seeds), indexing="ij")
    data, size, injected, seed = (axis.ravel() for axis in grid)
    loss = BASE + LAWS[law].at(PLANTED[law], data, size, injected)
    run = np.unique(np.stack([size, injected, seed]), axis=1, return_inverse=True)[1].ravel()
    group = run if shared == "runs" else seed.astype(int)
    own, common = random.standard_normal(len(loss)), random.standard_normal(group.max() + 1)[group]
    loss *= np.exp(noise * own + together * common)
    return Points(data, loss, size, injected, seed, run if shared == "runs" else (), base=BASE)


def coverage(
    law: str,
    sets: int,
    draws: int = 100,
    seed: int = 0,
    draw: Drawn = "runs",
    shared: Drawn = "seeds",
    **how: float,
) -> dict[str, int]:
    """By parameter, and for the prediction at 10x, in how many of the sets the interval holds what was planted."""
    truth, form = PLANTED[law], LAWS[law]
    held = dict.fromkeys([*truth, "10x"], 0)
    for number in range(sets):
        points = synthetic(law, np.random.default_rng([seed, number]), shared=shared, **how)
        points = replace(points, run=()) if draw == "points" else points  # as if each were a run of its own
        found = fit(points, form, together="seeds" if draw == "seeds" else "runs", draws=draws, seed=number)
        for name, value in truth.items():
            low, high = found.intervals[name]
            held[name] += low <= value <= high
        low, high = found.predict(1e6, 16.0).interval
        held["10x"] += low <= BASE + form.forgetting(truth, 1e6, 16.0) <= high
    return held


def wilson(held: int, sets: int, z: float = 1.96) -> tuple[float, float]:
    """The interval of a share."""
    middle, half = held + z**2 / 2, z * math.sqrt(held * (sets - held) / sets + z**2 / 4)
    return (middle - half) / (sets + z**2), (middle + half) / (sets + z**2)


def main() -> None:
    """Print one line for each law and parameter."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sets", type=int, default=200)
    parser.add_argument("--draws", type=int, default=100)
    parser.add_argument("--laws", nargs="+", default=list(PLANTED), choices=list(PLANTED))
    parser.add_argument("--noise", type=float, default=0.01)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--together", type=float, default=0.0, help="noise that several points share")
    parser.add_argument("--shared", default="seeds", choices=["runs", "seeds"], help="which points share it")
    parser.add_argument("--draw", default="runs", choices=["points", "runs", "seeds"], help="what the bootstrap draws")
    asked = parser.parse_args()
    for law in asked.laws:
        how = {"noise": asked.noise, "seeds": asked.seeds, "together": asked.together}
        counts = coverage(law, asked.sets, asked.draws, draw=asked.draw, shared=asked.shared, **how)
        for name, held in counts.items():
            low, high = wilson(held, asked.sets)
            print(f"{law:9} {name:4} {held / asked.sets:6.1%} [{low:.1%}, {high:.1%}] of {asked.sets} sets", flush=True)


if __name__ == "__main__":
    main()
