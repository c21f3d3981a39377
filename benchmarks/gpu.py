"""Row G1: cross-entropy + KL on a GPU against named peers, as ratios inside one interleaved run, with CUDA events.

    python benchmarks/gpu.py                # hidden 4,096, vocabulary 128,256, 4,096 tokens; ten minutes, 30 GiB
    python benchmarks/gpu.py --quick        # the smallest shapes once, nothing written

Every variant is a forward and a backward pass down to the hidden states. Equality is checked first: nothing wrong is
worth timing. Peers that are not installed are named. Without a GPU it says so and stops. Read next: `gpu_peers`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from gpu_peers import HERE, MISSING, PAIRS, PEERS, gradient, machine
from holdfast.functional.head import Head
from peers import Case, make
from record import NOT_INSTALLED, NotEnoughMemory, Row, carry_out, parser
from torch import Tensor
from turns import ratio, spread

RESULTS = Path(__file__).parent / "results" / "gpu.csv"
LARGE, TINY = "4096/128256", "64/1000"
SECONDS, PEAK = "gpu seconds", "peak MiB"


def on(device: str, shape: str, tokens: int, drift: float = 0.0145) -> Case:
    """Make a case in bfloat16 and move it to a device."""
    case = make(shape, tokens, "bfloat16", drift=drift)
    hidden = case.hidden.detach().to(device).requires_grad_()
    return Case(hidden, case.reference_hidden.to(device), Head(case.head.weight.to(device)), case.targets.to(device))


def correctness_gate(device: str, names: Sequence[str] = HERE) -> None:
    """Stop unless all peers of one objective agree, as far as rounding whole logits to bfloat16 lets them."""
    case, first = on(device, TINY, 64, drift=0.3), dict[str, tuple[Tensor, Tensor]]()
    for name in names:
        if not PEERS[name].objective:
            continue
        value, found = gradient(name, case)
        wanted_value, wanted = first.setdefault(PEERS[name].objective, (value, found))
        error = ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()
        if abs(value.item() / wanted_value.item() - 1) > 0.01 or error > 0.05:
            sys.exit(f"{name} disagrees: {value.item()} for {wanted_value.item()}, gradient off by {error:.1%}")
    print("correctness gate passed", flush=True)


def seconds(work: Callable[[], object]) -> float:
    """Time one call on the GPU by events of its own stream."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000


def peak_mib(work: Callable[[], object]) -> float:
    """Return by how much a call raises the memory of the GPU at its highest."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def turns(
    shape: str, tokens: int, rounds: int, case: Case, clock: Callable[..., float], peak: Callable[..., float]
) -> list[Row]:
    """Time every peer in turn after two warm-ups, then take each one's peak; `clock` and `peak` measure one call."""
    runs = {name: partial(gradient, name, case) for name in HERE}
    for run in [*runs.values()] * 2:
        run()
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            found[name].append(clock(run))
    common: Row = {"dtype": "bfloat16", "shape": shape, "tokens": tokens}
    timed: Row = {**common, "rounds": rounds}
    table: list[Row] = [{**timed, "variant": name, "metric": SECONDS, **spread(each)} for name, each in found.items()]
    peaks = {name: peak(run) for name, run in runs.items()}
    table += [{**common, "variant": name, "metric": PEAK, "value": value} for name, value in peaks.items()]
    for mine, theirs in PAIRS:
        both: Row = {**common, "variant": mine, "peer": theirs}
        if mine in MISSING or theirs in MISSING:
            table.append({**both, "metric": f"{SECONDS}, ratio", "value": NOT_INSTALLED})
            continue
        table.append({**both, "rounds": rounds, "metric": f"{SECONDS}, ratio", **ratio(found[mine], found[theirs])})
        table.append({**both, "metric": f"{PEAK}, ratio", "value": peaks[mine] / peaks[theirs]})
    return table + [{"variant": name, "metric": "version", "value": version} for name, version in machine()]


def timings(shape: str, tokens: int, rounds: int) -> list[Row]:
    """Measure one shape on the GPU, if whole logits, which the plain peer holds, fit."""
    width, vocab = map(int, shape.split("/"))
    need = (12 * tokens * vocab * 4 + 2 * width * vocab * 2) / 2**30
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < need:
        raise NotEnoughMemory(f"{need:.0f} GiB of GPU memory are needed and {free:.0f} GiB are free.")
    return turns(shape, tokens, rounds, on("cuda", shape, tokens), seconds, peak_mib)


def main() -> None:
    """Check, then measure."""
    asked = parser(__doc__, {"G1": None})
    asked.add_argument("--rounds", type=int, default=9, help="each peer once a round (9)")
    options = asked.parse_args()
    if not torch.cuda.is_available():
        sys.exit(
            "This benchmark needs a GPU, and torch sees none: run it on a machine with CUDA and torch built for it "
            "(tests/functional/test_triton.py checks the kernels' numbers on any machine)."
        )
    correctness_gate("cuda")
    shape, tokens, rounds = (TINY, 64, 1) if options.quick else (LARGE, 4096, max(7, options.rounds))
    carry_out({"G1": lambda: timings(shape, tokens, rounds)}, RESULTS, options)


if __name__ == "__main__":
    main()
