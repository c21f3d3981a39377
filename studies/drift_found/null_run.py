"""Evaluates one adapter of the lab again in a process of its own: rows in another order, answers in other batches.

    python -m studies.drift_found.null_run ADAPTER OUTPUT [--order SEED] [--batch-size N]

Prints one line of JSON: the digest of the scores, seconds, and what the load of the machine was. Read next: `timing`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from .adapters import LAB

ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def rows_in_order(seed: int | None) -> Iterator[None]:
    """Have the lab give its rows to probes in an order drawn with a seed; None: as they come."""
    from holdfast.drift.suite import Suite
    from holdfast.lab import probes, world

    if seed is None:
        yield
        return
    draw, sample, twins = random.Random(seed), world.sample, probes.twins

    def mixed(*args: Any) -> list[world.Item]:
        found = list(sample(*args))
        return draw.sample(found, len(found))

    def mixed_twins(*args: Any) -> Suite:
        found = twins(*args)
        return replace(found, pairs=tuple(draw.sample(found.pairs, len(found.pairs))))

    with patch.object(world, "sample", mixed), patch.object(probes, "twins", mixed_twins):
        yield


def evaluated(folder: str, output: Path, order: int | None, batch_size: int | None) -> dict[str, Any]:
    """What one evaluation from nothing gives, and takes."""
    from holdfast.recipe.drift import Question, run
    from holdfast.recipe.drift_probes import Wanted
    from holdfast.recipe.model import ModelSpec

    from .measuring import digest

    output.mkdir(parents=True)
    load, wall, cpu = os.getloadavg()[0], time.perf_counter(), time.process_time()
    with rows_in_order(order):
        asked = Question(ModelSpec(LAB), {"tuned": folder}, Wanted(), output, batch_size=batch_size)
        entries = run(asked, say=lambda said: None).entries
    return {
        "digests": {side: digest(entry.scores) for side, entry in entries.items()},
        "scores": len(entries["tuned"].scores),
        "items": sum(score.n or 0 for score in entries["tuned"].scores.values()),
        "cpu_seconds": round(time.process_time() - cpu, 2),
        "wall_seconds": round(time.perf_counter() - wall, 2),
        "load": [round(load, 2), round(os.getloadavg()[0], 2)],
    }


def in_a_process(folder: Path, output: Path, order: int | None = None, batch_size: int | None = None) -> dict[str, Any]:
    """The same in a new process, whose own seconds include starting Python and importing everything."""
    options = [*(["--order", str(order)] if order is not None else [])]
    options += ["--batch-size", str(batch_size)] if batch_size else []
    line: Sequence[str] = [sys.executable, "-m", "studies.drift_found.null_run", str(folder), str(output), *options]
    started = time.perf_counter()
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(line)} failed:\n{done.stderr[-2000:]}")
    found = dict(json.loads(done.stdout.splitlines()[-1]))
    return {**found, "process_seconds": round(time.perf_counter() - started, 2)}


def main() -> None:
    """Evaluate once and print what came out."""
    import torch

    parser = argparse.ArgumentParser(prog="python -m studies.drift_found.null_run", description=__doc__)
    parser.add_argument("adapter")
    parser.add_argument("output", type=Path)
    parser.add_argument("--order", type=int)
    parser.add_argument("--batch-size", type=int)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(json.dumps(evaluated(args.adapter, args.output, args.order, args.batch_size)))


if __name__ == "__main__":
    main()
