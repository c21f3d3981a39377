"""Time and memory of the linear divergences against named peers, as ratios inside one interleaved run.

    python benchmarks/divergence.py                       # the committed table: an hour and a half on one core, 14 GiB
    python benchmarks/divergence.py --quick               # a few seconds, to see that it runs; nothing written
    python benchmarks/divergence.py --only accuracy       # jobs whose name has this in it; --help names them all
    python benchmarks/divergence.py --chunk-rows          # which height of a chunk is best? three quarters of an hour

Every variant is a forward and a backward pass down to the hidden states, with a frozen head. A job that was measured
at this commit is left out, so a run that was stopped goes on. See README.md beside this.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from accuracy import confident_target, gradient, small_kl
from holdfast.functional.divergence import Divergence
from peaks import memory, room_for_logits
from peers import (
    BEST,
    BOUND,
    CACHED,
    CE,
    FULL,
    LIGER,
    MISSING,
    PLAIN,
    TORCH_CE,
    TORCHTUNE,
    TRL,
    VARIANTS,
    WIDENED,
    Case,
    Variant,
    make,
    one_pass,
)
from record import NOT_INSTALLED, Row, carry_out, parser
from turns import CPU, in_turns, rows

RESULTS = Path(__file__).parent / "results" / "divergence.csv"
SMALL, LARGE, TINY = "512/32000", "896/151936", "64/1000"
HEIGHTS = [32, 64, 128, 256, 512, 1024]
EVERY = [name for name in VARIANTS if name not in ("autograd: masked KL", "autograd: full KL", *MISSING)]
CORE = [name for name in EVERY if "full" not in name and name != TORCH_CE]
LONG = [PLAIN, BEST, BOUND, CE, CACHED]
RIVALS = [FULL, *(name for name in (LIGER, TORCHTUNE) if name not in MISSING)]
# (variant, the peer it is divided by): what the rows of the table compare
RATIOS = [
    (BEST, PLAIN),
    ("holdfast: CE + masked KL, two calls", PLAIN),
    (BEST, WIDENED),
    (BEST, "autograd: CE + full KL"),
    (BEST, BOUND),
    ("holdfast: masked KL", CE),
    (BEST, CE),
    (CACHED, CE),
    (FULL, LIGER),
    (FULL, TORCHTUNE),
    ("holdfast: full KL", TRL),
    (CE, TORCH_CE),
    (CE, "autograd: CE"),
]
PEAK_RATIOS = [*RATIOS, *((name, PLAIN) for name in ("holdfast: masked KL", "holdfast: full KL", TRL))]


def correctness_gate(shape: str) -> None:
    """Stop unless all variants of one objective agree on value and gradient; nothing wrong is worth timing."""
    case = make(shape, 64, "float32", drift=0.3, cached=True)
    plain: dict[str, str] = {}
    for name, (objective, _) in VARIANTS.items():
        first = plain.setdefault(objective, name)
        if name in (first, *MISSING):
            continue
        (value, wanted), (other, found) = gradient(first, case), gradient(name, case)
        error = ((found - wanted).norm() / wanted.norm()).item()
        wrong_value = abs(other / value - 1) > 1e-5 and name != TORCHTUNE  # which leaves out a constant
        if wrong_value or error > 1e-4:
            sys.exit(f"{name} disagrees with {first}: {other} for {value}, gradient off by {error:.1e}")
    print("correctness gate passed", flush=True)


def timings(shape: str, tokens: int, dtype: str, names: Sequence[str], rounds: int) -> list[Row]:
    """Time variants, and the pairs of the table; say of a peer that is not installed that it is not."""
    if PLAIN in names:
        room_for_logits(shape, tokens)
    common: Row = {"dtype": dtype, "shape": shape, "tokens": tokens}
    absent: Row = {**common, "variant": FULL, "metric": f"{CPU}, ratio", "value": NOT_INSTALLED}
    found = interleaved({name: VARIANTS[name] for name in names}, RATIOS, common, rounds)
    return found + ([{**absent, "peer": name} for name in MISSING] if FULL in names else [])


def heights(shape: str, tokens: int, dtype: str, chunks: Sequence[int], rounds: int) -> list[Row]:
    """Time the one pass at several heights of its chunks against the three products on whole logits."""
    variants = {BOUND: VARIANTS[BOUND]}
    for height in chunks:
        run = partial(one_pass, member=Divergence(), chunk_rows=height)
        variants[f"{BEST}, chunks of {height}"] = Variant("CE + masked KL", run)
    pairs = [(name, BOUND) for name in variants if name != BOUND]
    return interleaved(variants, pairs, {"dtype": dtype, "shape": shape, "tokens": tokens}, rounds)


def interleaved(
    variants: Mapping[str, Variant], pairs: Sequence[tuple[str, str]], common: Row, rounds: int
) -> list[Row]:
    """Run the variants in turn after a warm-up at 8 tokens."""
    shape, tokens, dtype = str(common["shape"]), int(str(common["tokens"])), str(common["dtype"])
    case = make(shape, tokens, dtype, cached=CACHED in variants)
    few = case.first(8)
    runs = {name: partial(passes, variant, case) for name, variant in variants.items()}
    for variant in variants.values():
        passes(variant, few)
    return rows(in_turns(runs, rounds, f"{shape}, {tokens} tokens, {dtype}"), pairs, common)


def passes(variant: Variant, case: Case) -> None:
    """One forward and one backward pass."""
    torch.autograd.grad(variant.run(case), case.hidden)


def jobs(rounds: int = 7, long_rounds: int = 7) -> dict[str, Callable[[], list[Row]]]:
    """Return what there is to measure, the quick before the slow."""
    table: dict[str, Callable[[], list[Row]]] = {"accuracy": lambda: [*small_kl(), *confident_target()]}
    for shape, tokens, dtype, names, count in (
        (SMALL, 512, "float32", [CE, TORCH_CE], rounds),
        (SMALL, 1024, "float32", EVERY, rounds),
        (SMALL, 1024, "bfloat16", CORE, rounds),
        (LARGE, 128, "float32", EVERY, rounds),
        (LARGE, 128, "bfloat16", CORE, rounds),
        (LARGE, 2048, "float32", [*LONG, *RIVALS], long_rounds),
        (LARGE, 2048, "bfloat16", LONG, long_rounds),
    ):
        table[f"time {shape}, {tokens} tokens, {dtype}"] = partial(timings, shape, tokens, dtype, names, count)
    table[f"memory {SMALL}"] = lambda: memory(SMALL, "float32", [(CE, 512), (TORCH_CE, 512)], PEAK_RATIOS)
    at_once = [PLAIN, BEST, "holdfast: masked KL", "holdfast: full KL", TRL, *RIVALS]
    for dtype, most in (("float32", 16_384), ("bfloat16", 4096)):
        runs = [(BEST, 1024), *((name, 2048) for name in at_once), (BEST, most)]
        table[f"memory {LARGE}, {dtype}"] = partial(memory, LARGE, dtype, runs, PEAK_RATIOS)
    return table


def quick_jobs() -> dict[str, Callable[[], list[Row]]]:
    """Return every kind of job at its smallest."""
    return {
        "accuracy": lambda: [*small_kl(TINY, 16), *confident_target(256, 16)],
        "time float32": lambda: timings(TINY, 16, "float32", EVERY, 1),
        "time bfloat16": lambda: timings(TINY, 16, "bfloat16", CORE, 1),
        "memory": lambda: memory(TINY, "float32", [(PLAIN, 2048), (BEST, 1024), (BEST, 2048)], PEAK_RATIOS),
    }


def sweep_jobs(chunks: Sequence[int], rounds: int, *, quick: bool) -> dict[str, Callable[[], list[Row]]]:
    """Return one job for each shape and dtype, of as many tokens as the highest chunk has."""
    table: dict[str, Callable[[], list[Row]]] = {}
    for shape in [TINY] if quick else [SMALL, LARGE]:
        for dtype in ("float32", "bfloat16"):
            tokens = max(chunks) if quick else max(1024, *chunks)
            table[f"chunk rows {shape}, {dtype}"] = partial(heights, shape, tokens, dtype, chunks, rounds)
    return table


def main() -> None:
    """Run the jobs, writing each one's rows when it is done."""
    asked = parser(__doc__, jobs())
    asked.add_argument("--rounds", type=int, default=7, help="of the short jobs (7)")
    asked.add_argument("--long-rounds", type=int, default=7, help="at 2,048 tokens, two to four minutes each (7)")
    text = "sweep the height of chunks, these or a row of them, and nothing else"
    asked.add_argument("--chunk-rows", type=int, nargs="*", metavar="N", help=text)
    options = asked.parse_args()
    if options.chunk_rows and min(options.chunk_rows) < 1:
        asked.error(f"--chunk-rows: a chunk has at least one row, got {min(options.chunk_rows)}")
    torch.set_num_threads(1)
    correctness_gate(TINY if options.quick else SMALL)
    rounds = 1 if options.quick else options.rounds
    if options.chunk_rows is not None:
        todo = sweep_jobs(options.chunk_rows or HEIGHTS, rounds, quick=options.quick)
    else:
        todo = quick_jobs() if options.quick else jobs(rounds, options.long_rounds)
    carry_out(todo, RESULTS, options)


if __name__ == "__main__":
    main()
