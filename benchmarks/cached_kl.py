"""What the KL of a fixed pool costs with the base cached, against the base at hand and against cross-entropy alone.

    python benchmarks/cached_kl.py              # three minutes on one free core
    python benchmarks/cached_kl.py --quick      # one round, nothing written

Every variant goes from the student's hidden states to their gradient, with a frozen head. See README.md beside this.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
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
from record import process_mib, write
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

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


def timings(rows: list[dict[str, object]], label: str, case: Case, rounds: int) -> None:
    """Run the variants in turn; keep the median of each, then divide."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in VARIANTS}
    for name in VARIANTS:
        gradient(name, case)
    for _ in range(rounds):
        for name in VARIANTS:
            cpu, wall = time.process_time(), time.perf_counter()
            gradient(name, case)
            times[name].append((time.process_time() - cpu, time.perf_counter() - wall))
    common = {"dtype": "float32", "tokens": SEQUENCES * (LENGTH - 1), "rounds": rounds}
    for column, metric in enumerate(("cpu seconds", "wall seconds")):
        medians = {name: statistics.median(pair[column] for pair in times[name]) for name in VARIANTS}
        for name, seconds in medians.items():
            rows.append({"variant": f"{label}: {name}", "metric": metric, "value": seconds, **common})
        for name, peer in RATIOS:
            ratio = medians[name] / medians[peer]
            names = {"variant": f"{label}: {name}", "peer": f"{label}: {peer}"}
            rows.append({**names, "metric": f"{metric}, ratio", "value": ratio, **common})


def memory_child(label: str, name: str, folder: Path) -> None:
    """Print the peak of resident memory, in MiB, above what the loaded inputs take."""
    gradient(name, make("lab", folder, name))  # libraries load and allocate before we look
    case = make(label, folder, name)
    before = process_mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    gradient(name, case)
    print(process_mib("VmHWM") - before)


def memory(rows: list[dict[str, object]], label: str, folder: Path) -> None:
    """Measure each variant in a process of its own, one at a time."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"}  # freed tensors go back to the system
    for name in ("cross-entropy", "full KL, cached statistics", "full KL, cached hidden states", "full KL, base run"):
        command = [sys.executable, __file__, "--child", name, "--label", label, "--folder", str(folder)]
        peak = float(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)
        common = {"dtype": "float32", "tokens": SEQUENCES * (LENGTH - 1)}
        rows.append({"variant": f"{label}: {name}", "metric": "peak MiB", "value": peak, **common})


def making(rows: list[dict[str, object]], folder: Path, sequences: int = 256, length: int = 49) -> None:
    """Time the making of a cache of the lab's base, digests and file included."""
    model = base_model("lab").requires_grad_(False)
    ids = torch.randint(5, model.config.vocab_size, (sequences, length), generator=torch.Generator().manual_seed(3))
    cpu, wall = time.process_time(), time.perf_counter()
    cache = ReferenceCache.of(Tap(model), OtherModel(model), [{"input_ids": ids}], folder=folder / "making")
    seconds = {"cpu seconds": time.process_time() - cpu, "wall seconds": time.perf_counter() - wall}
    for metric, value in {**seconds, "file MB": cache.file.stat().st_size / 1e6}.items():
        common = {"dtype": "float32", "tokens": sequences * (length - 1)}
        rows.append({"variant": "lab: making the cache", "metric": metric, "value": value, **common})


def main() -> None:
    """Measure both models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round, nothing written")
    for name in ("--child", "--label", "--folder"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.child:
        memory_child(options.label, options.child, Path(options.folder))
        return
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        for label, rounds in (("lab", 21), ("0.5B", 5)):
            case = make(label, Path(folder))
            correctness_gate(case)
            timings(rows, label, case, 1 if options.quick else rounds)
            del case
            if label != "lab" and not options.quick:  # the lab's logits are too small to show
                memory(rows, label, Path(folder))
        making(rows, Path(folder))
    for row in rows:
        print(*(row.get(c, "") for c in ("tokens", "variant", "peer", "metric")), f"{row['value']:.4g}", sep="\t")
    if not options.quick:
        write(rows, RESULTS)


if __name__ == "__main__":
    main()
