"""What the KL of a fixed pool costs with the base cached, against the base at hand and against cross-entropy alone.

    python benchmarks/cached_kl.py              # four minutes on one core, 4 GiB
    python benchmarks/cached_kl.py --quick      # the lab alone, one round, nothing written

Every variant goes from the student's hidden states to their gradient, with a frozen head. See README.md beside this.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from holdfast import lab
from holdfast.core.reference import OtherModel
from holdfast.core.tap import Call, Tap
from holdfast.functional.divergence import Divergence
from holdfast.functional.head import Head
from holdfast.functional.linear_divergence import linear_cross_entropy, linear_full_kl, linear_target_masked_kl
from holdfast.retain.cache import ReferenceCache
from holdfast.retain.cached_reference import CachedReference
from record import Row, carry_out, parser, peak_mib
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from turns import CPU, WALL, in_turns, rows, timed

RESULTS = Path(__file__).parent / "results" / "cached_kl.csv"
SEQUENCES, LENGTH = 4, 65  # 256 positions


class Case(NamedTuple):
    """What every variant is given; `run_base` is the forward that a cache saves."""

    hidden: Tensor  # [B, T, H], carries gradient
    run_base: Callable[[], Tensor]
    head: Head
    ids: Tensor
    caches: dict[str, CachedReference]


def base_model(name: str) -> LlamaForCausalLM:
    """Return the lab's model, or random weights in the shape of Qwen2.5-0.5B's body with a vocabulary of 32,000."""
    if name == "lab":
        return lab.load("lab-aligned")[0]
    torch.manual_seed(0)
    shape = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14}
    model = LlamaForCausalLM(LlamaConfig(**shape, vocab_size=32_000, num_key_value_heads=2, tie_word_embeddings=False))
    with torch.no_grad():
        model.lm_head.weight.mul_(5)  # logits of standard deviation 3
    return model.eval()


def make(name: str, folder: Path, variant: str = "") -> Case:
    """Return a student whose hidden states have drifted by a twentieth, and caches of its base: those of a variant."""
    model = base_model(name).requires_grad_(False)
    tap, reference = Tap(model), OtherModel(model)
    ids = torch.randint(5, model.config.vocab_size, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    call = Call(torch.empty(0), (), tap.inputs(batch), ("cpu", torch.bfloat16, False))
    base = reference.hidden(tap, call)
    drift = torch.randn(base.shape, generator=torch.Generator().manual_seed(2))
    hidden = base + 0.05 * base.std() * drift
    caches = {}
    for kept, divergence, store, dtype in (
        ("statistics", Divergence("none"), "auto", torch.float32),
        ("statistics in float16", Divergence("none"), "auto", torch.float16),
        ("masked statistics", Divergence("target"), "auto", torch.float32),
        ("hidden states", Divergence("none"), "hidden", torch.float32),
    ):
        if variant and not variant.endswith(f"cached {kept}"):
            continue
        cache = ReferenceCache.of(
            tap, reference, [batch], divergence=divergence, store=store, dtype=dtype, folder=folder / name
        )
        caches[kept] = CachedReference(cache, reference.head(tap), divergence)
    return Case(hidden.requires_grad_(), lambda: reference.hidden(tap, call), reference.head(tap), ids, caches)


def live(case: Case, loss: Callable[..., Tensor]) -> Tensor:
    """Run the base, then the divergence."""
    base = case.run_base()
    return loss(case.hidden[:, :-1], base[:, :-1], case.head, case.ids[:, 1:])


def cached(case: Case, kept: str) -> Tensor:
    """Read the file, then the divergence."""
    mask = torch.ones_like(case.ids[:, 1:], dtype=torch.bool)
    return case.caches[kept].kl(case.hidden, case.head, range(len(case.ids)), mask).total


VARIANTS: dict[str, Callable[[Case], Tensor]] = {
    "cross-entropy": lambda case: linear_cross_entropy(case.hidden[:, :-1], case.head, case.ids[:, 1:]),
    "full KL, cached statistics": lambda case: cached(case, "statistics"),
    "full KL, cached statistics in float16": lambda case: cached(case, "statistics in float16"),
    "full KL, cached hidden states": lambda case: cached(case, "hidden states"),
    "full KL, base run": lambda case: live(case, linear_full_kl),
    "masked KL, cached statistics": lambda case: cached(case, "masked statistics"),
    "masked KL, base run": lambda case: live(case, linear_target_masked_kl),
}
RATIOS = [(name, "cross-entropy") for name in VARIANTS if name != "cross-entropy"] + [
    ("full KL, cached statistics", "full KL, base run"),
    ("full KL, cached statistics", "full KL, cached hidden states"),
    ("masked KL, cached statistics", "masked KL, base run"),
]


def gradient(name: str, case: Case) -> tuple[float, Tensor]:
    """Run forward and backward; return the value and the gradient on the hidden states."""
    value = VARIANTS[name](case)
    return value.item(), torch.autograd.grad(value, case.hidden)[0]


def correctness_gate(case: Case) -> None:
    """Stop unless a cached form agrees with its live one; nothing wrong is worth timing."""
    for name in VARIANTS:
        if "cached" in name:
            value, found = gradient(name, case)
            wanted_value, wanted = gradient(name.split(",")[0] + ", base run", case)
            error = ((found - wanted).norm() / wanted.norm()).item()
            if error > (2e-2 if "float16" in name else 2e-4) or abs(value / wanted_value - 1) > 1e-3:
                sys.exit(f"{name} is wrong: gradient off by {error:.1e}, value {value} for {wanted_value}")


def timings(label: str, folder: Path, rounds: int) -> list[Row]:
    """Run the variants in turn, once they agree; keep the median of each, then divide."""
    case = make(label, folder)
    correctness_gate(case)
    runs = {name: partial(gradient, name, case) for name in VARIANTS}
    runs["cross-entropy"]()  # the others are warm
    common: Row = {"dtype": "float32", "tokens": SEQUENCES * (LENGTH - 1)}
    return rows(in_turns(runs, rounds, label), RATIOS, common, f"{label}: ")


def memory_child(label: str, name: str, folder: Path) -> None:
    """Print the peak of resident memory, in MiB, above what the loaded inputs take."""
    gradient(name, make("lab", folder, name))  # libraries load and allocate before we look
    case = make(label, folder, name)
    print(peak_mib(lambda: gradient(name, case)))


def memory(label: str, folder: Path) -> list[Row]:
    """Measure each variant in a process of its own, one at a time."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"}  # freed tensors go back to the system
    table: list[Row] = []
    for name in ("cross-entropy", "full KL, cached statistics", "full KL, cached hidden states", "full KL, base run"):
        command = [sys.executable, __file__, "--child", name, "--label", label, "--folder", str(folder)]
        peak = float(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout)
        common: Row = {"dtype": "float32", "tokens": SEQUENCES * (LENGTH - 1)}
        table.append({**common, "variant": f"{label}: {name}", "metric": "peak MiB", "value": peak})
    return table


def making(folder: Path, sequences: int = 256, length: int = 49) -> list[Row]:
    """Time the making of a cache of the lab's base, digests and file included."""
    model = base_model("lab").requires_grad_(False)
    ids = torch.randint(5, model.config.vocab_size, (sequences, length), generator=torch.Generator().manual_seed(3))
    tap, base, place = Tap(model), OtherModel(model), folder / "making"
    seconds = timed(lambda: ReferenceCache.of(tap, base, [{"input_ids": ids}], folder=place))
    size = sum(file.stat().st_size for file in place.rglob("*") if file.is_file()) / 1e6
    common: Row = {"dtype": "float32", "tokens": sequences * (length - 1), "variant": "lab: making the cache"}
    found = {CPU: seconds.cpu, WALL: seconds.wall, "file MB": size}
    return [{**common, "metric": metric, "value": value} for metric, value in found.items()]


def jobs(folder: Path, *, quick: bool = False) -> dict[str, Callable[[], list[Row]]]:
    """Return what there is to measure."""
    if quick:
        return {"time lab": lambda: timings("lab", folder, 1), "making": lambda: making(folder, 8)}
    return {
        "time lab": lambda: timings("lab", folder, 21),
        "time 0.5B": lambda: timings("0.5B", folder, 7),
        "memory 0.5B": lambda: memory("0.5B", folder),  # the lab's logits are too small to show
        "making": lambda: making(folder),
    }


def main() -> None:
    """Run the jobs, writing each one's rows when it is done."""
    asked = parser(__doc__, jobs(Path()))
    for name in ("--child", "--label", "--folder"):
        asked.add_argument(name, help=argparse.SUPPRESS)
    options = asked.parse_args()
    torch.set_num_threads(1)
    if options.child:
        memory_child(options.label, options.child, Path(options.folder))
        return
    with tempfile.TemporaryDirectory() as folder:
        carry_out(jobs(Path(folder), quick=options.quick), RESULTS, options)


if __name__ == "__main__":
    main()
