"""What orthogonal projection costs: a whole training step with it against the same step without, and its parts.

    python benchmarks/projection.py                  # the committed table: a quarter of an hour on one core, 11 GiB
    python benchmarks/projection.py --quick          # small shapes, nothing written

The step is that of OGPSA's SFT recipe (128 sequences, here 8 micro-batches of 16) on a model of 31 M parameters with
LoRA r = 16; 64 retain rows of the same length, refreshed every 30 steps. The projection of one direction alone, of 10 M
and of 100 M numbers, is in `projection_parts`. See README.md beside this.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import holdfast
import torch
from holdfast.core.method import Method
from holdfast.methods import OrthogonalProjection, ogpsa
from peft import LoraConfig, get_peft_model
from projection_parts import flat, parts
from record import Row, carry_out, parser
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

RESULTS = Path(__file__).parent / "results" / "projection.csv"
EVERY, SAMPLES = 30, 64
PLAIN = "no method"
Timer = Callable[[], float]


def model(width: int, layers: int) -> nn.Module:
    """A Llama with random weights and a LoRA adapter that has moved off its start."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192, hidden_size=width, intermediate_size=width * 11 // 4, num_hidden_layers=layers,
        num_attention_heads=8, tie_word_embeddings=True,
    )  # fmt: skip
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(LlamaForCausalLM(config), lora)
    for p in adapted.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.02)
    return adapted.train()


def rows(n: int, length: int, seed: int) -> dict[str, Tensor]:
    """A batch of random tokens."""
    ids = torch.randint(8192, (n, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def variants() -> dict[str, list[Method]]:
    """What is timed, by name."""
    every = {"refresh_every": EVERY, "early_refreshes": (), "samples": SAMPLES}
    return {
        PLAIN: [],
        "gradient, one mean": [OrthogonalProjection(apply_to="gradient", rank=None, **every)],
        "update, k = 16": [OrthogonalProjection(**every)],
        "update, k = 16, Adam's metric": [OrthogonalProjection(metric="optimizer", **every)],
        "update, k = 16, rolling, one batch of 4 every 2 steps": [
            OrthogonalProjection(rolling=0.0, refresh_every=2, early_refreshes=(), samples=SAMPLES)
        ],
        "update, k = 16, refreshed every 5": ogpsa(exact=True),
    }


def steps(width: int, layers: int, length: int, micro_batches: int, rounds: int) -> list[Row]:
    """Time a step's forwards and backwards, and what each variant does after them, with and without a refresh."""
    student = model(width, layers)
    batches = [rows(16, length, i) for i in range(micro_batches)]
    retain = [rows(4, length, 100 + i) for i in range(SAMPLES // 4)]
    params = [p for p in student.parameters() if p.requires_grad]
    print(f"{sum(p.numel() for p in student.parameters()):,} parameters, {sum(p.numel() for p in params):,} trained")

    def passes() -> None:
        for batch in batches:
            (student(**batch).loss / len(batches)).backward()

    def rest(methods: list[Method]) -> tuple[Timer, Timer]:
        """Return the times of the end of a step, without a refresh and with one."""
        optimizer = torch.optim.AdamW(params, lr=0.0)
        context = holdfast.preserve(student, optimizer, methods, retain=retain)
        session = context.__enter__()
        gradients = [p.grad.clone() for p in params]

        def end(step: int) -> float:
            for p, gradient in zip(params, gradients, strict=True):
                p.grad = gradient.clone()
            session.step = step
            started = time.process_time()
            session.gradients_ready()
            optimizer.step()
            return time.process_time() - started

        end(0)  # the first basis
        return lambda: end(1), lambda: end(EVERY * 5)

    passes()
    ends = {name: rest(methods) for name, methods in variants().items()}
    found: dict[str, list[float]] = {key: [] for key in ("passes", *ends, *(f"{name}, refresh" for name in ends))}
    for turn in range(rounds):
        started = time.process_time()
        passes()
        found["passes"].append(time.process_time() - started)
        for name, (plain, refresh) in ends.items():
            found[name].append(statistics.median(plain() for _ in range(3)))
            found[f"{name}, refresh"].append(refresh())
        print(f"step: round {turn + 1} of {rounds}", flush=True)
    median = {key: statistics.median(values) for key, values in found.items()}
    step = median["passes"] + median[PLAIN]
    table: list[Row] = []
    common = {"dtype": "float32", "tokens": micro_batches * 16 * length, "rounds": rounds}
    for name, methods in variants().items():
        every = methods[0].refresh_every if methods else 1
        assert isinstance(every, int)
        added = median[name] - median[PLAIN] + max(median[f"{name}, refresh"] - median[name], 0) / every
        whole = step if name == PLAIN else step + added
        table.append({**common, "variant": name, "metric": "cpu seconds a step", "value": whole})
        if name != PLAIN:
            table.append(
                {**common, "variant": name, "peer": PLAIN, "metric": "cpu seconds a step, ratio", "value": whole / step}
            )
            table.append(
                {**common, "variant": name, "metric": "cpu seconds a refresh", "value": median[f"{name}, refresh"]}
            )
    return table


def sizes(width: int, layers: int) -> list[int]:
    """Return how many numbers each trained tensor has."""
    return [p.numel() for p in model(width, layers).parameters() if p.requires_grad]


def jobs(rounds: int = 7) -> dict[str, Callable[[], list[Row]]]:
    """Return what there is to measure, the quick before the slow."""
    return {
        "parts k = 8": lambda: parts(sizes(512, 8), 8, 41),
        "parts k = 2": lambda: parts(sizes(512, 8), 2, 41),
        "flat 10 M": partial(flat, 10_000_000, 8, 21),
        "flat 100 M": partial(flat, 100_000_000, 8, 7),
        "steps": lambda: steps(512, 8, 64, 8, rounds),
    }


def quick_jobs() -> dict[str, Callable[[], list[Row]]]:
    """Return every kind of job at its smallest."""
    return {
        "parts": lambda: parts(sizes(128, 2), 8, 5),
        "flat": partial(flat, 100_000, 8, 1),
        "steps": lambda: steps(128, 2, 32, 2, 1),
    }


def main() -> None:
    """Run the jobs, writing each one's rows when it is done."""
    asked = parser(__doc__, jobs())
    asked.add_argument("--rounds", type=int, default=7, help="of whole steps, a minute each (7)")
    options = asked.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    carry_out(quick_jobs() if options.quick else jobs(options.rounds), RESULTS, options)


if __name__ == "__main__":
    main()
