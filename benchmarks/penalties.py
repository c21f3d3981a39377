"""What AlignGuard-LoRA's penalties cost: a whole training step with them against the same step without.

    python benchmarks/penalties.py                 # the committed table: about five minutes on one core
    python benchmarks/penalties.py --quick         # small shapes, nothing written

Model and step are those of `projection.py`: 31 M parameters, LoRA r = 16, 128 sequences of 64 tokens. The Fisher is
collected beforehand; its own cost is in `fisher.py`. See README.md beside this.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import holdfast
import torch
from holdfast.core.method import Method
from holdfast.methods import (
    EWC,
    FisherAlignment,
    GeodesicSeparation,
    RiemannianOverlap,
    TaskStability,
    UpdateDecay,
)
from projection import model, rows
from record import write

RESULTS = Path(__file__).parent / "results" / "penalties.csv"
PLAIN = "no method"


def variants() -> dict[str, list[Method]]:
    """What is timed, by name."""
    data = {"data": ("alignment",)}
    terms: list[Method] = [
        FisherAlignment(top=0.9, **data),
        TaskStability(**data),
        RiemannianOverlap(**data),
        GeodesicSeparation(**data),
    ]
    return {
        PLAIN: [],
        "all four terms": terms,
        **{term.name: [term] for term in terms},
        "fisher_alignment, full": [FisherAlignment(**data)],
        "ewc": [EWC(**data)],
        "update_decay": [UpdateDecay()],
    }


def steps(width: int, layers: int, length: int, micro_batches: int, rounds: int) -> list[dict[str, object]]:
    """Time a step's forwards and backwards, and what each variant does after them."""
    student = model(width, layers)
    batches = [rows(16, length, i) for i in range(micro_batches)]
    retain = {name: [rows(4, length, seed + i) for i in range(8)] for name, seed in (("alignment", 100), ("task", 200))}
    params = [p for p in student.parameters() if p.requires_grad]
    print(f"{sum(p.numel() for p in student.parameters()):,} parameters, {sum(p.numel() for p in params):,} trained")

    def passes() -> float:
        started = time.process_time()
        for batch in batches:
            (student(**batch).loss / len(batches)).backward()
        return time.process_time() - started

    def rest(methods: list[Method]) -> Callable[[], float]:
        optimizer = torch.optim.AdamW(params, lr=0.0)
        session = holdfast.preserve(student, optimizer, methods, retain=retain).__enter__()
        gradients = [p.grad.clone() for p in params]

        def end() -> float:
            for p, gradient in zip(params, gradients, strict=True):
                p.grad = gradient.clone()
            session.step = 1  # no diagnostics, which come every tenth step
            started = time.process_time()
            session.gradients_ready()
            optimizer.step()
            return time.process_time() - started

        session.gradients_ready()  # the Fishers
        return end

    passes()
    ends = {name: rest(methods) for name, methods in variants().items()}
    found: dict[str, list[float]] = {name: [] for name in ("passes", *ends)}
    for turn in range(rounds):
        found["passes"].append(passes())
        for name, end in ends.items():
            found[name].append(statistics.median(end() for _ in range(3)))
        print(f"round {turn + 1} of {rounds}", flush=True)
    median = {name: statistics.median(values) for name, values in found.items()}
    step = median["passes"] + median[PLAIN]
    common = {"dtype": "float32", "tokens": micro_batches * 16 * length, "rounds": rounds}
    table: list[dict[str, object]] = [{**common, "variant": PLAIN, "metric": "cpu seconds a step", "value": step}]
    for name in ends:
        if name != PLAIN:
            ratio = (step + median[name] - median[PLAIN]) / step
            row = {**common, "variant": name, "peer": PLAIN, "metric": "cpu seconds a step, ratio", "value": ratio}
            table.append(row)
    return table


def main() -> None:
    """Time the steps, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small shapes, nothing written")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    table = steps(128, 2, 32, 2, 1) if options.quick else steps(512, 8, 64, 8, options.rounds)
    if not options.quick:
        write(table, RESULTS)
    for row in table:
        print("\t".join(str(value) for value in row.values()))


if __name__ == "__main__":
    main()
