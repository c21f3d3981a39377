"""Time and memory of the linear divergences against named peers, as ratios inside one interleaved run.

    python benchmarks/divergence.py                       # the committed table: about half an hour on one core
    python benchmarks/divergence.py --quick               # one small round, to see that it runs

Every variant is a forward and a backward pass down to the hidden states, with a frozen head. See README.md beside this.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from holdfast.functional.divergence import FLOOR, Divergence, full_kl, target_masked_kl
from holdfast.functional.head import Head
from holdfast.functional.linear_divergence import (
    linear_cross_entropy,
    linear_cross_entropy_with_divergence,
    linear_full_kl,
    linear_target_masked_kl,
)
from record import process_mib, write
from torch import Tensor

RESULTS = Path(__file__).parent / "results" / "divergence.csv"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Case(NamedTuple):
    """What every variant is given."""

    hidden: Tensor
    reference_hidden: Tensor
    head: Head
    targets: Tensor


def make(tokens: int, dtype: str, width: int = 896, vocab: int = 151_936, drift: float = 0.0145) -> Case:
    """Return hidden states and a head with the shapes of Qwen2.5-0.5B; logits have standard deviation 3.2."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.empty(vocab, width, dtype=DTYPES[dtype])
    for rows in weight.split(8192):
        rows.copy_(torch.randn(rows.shape, generator=generator) * 3.2 / width**0.5)
    reference_hidden = torch.randn(tokens, width, generator=generator)
    hidden = reference_hidden + drift * torch.randn(tokens, width, generator=generator)
    targets = torch.randint(vocab, (tokens,), generator=generator)
    return Case(
        hidden.to(DTYPES[dtype]).requires_grad_(), reference_hidden.to(DTYPES[dtype]), Head(weight.detach()), targets
    )


# The peers. Logits are widened to float32 before every softmax, the usual practice.
def whole_logits(case: Case, *, widen_head: bool = False) -> tuple[Tensor, Tensor]:
    """Return both sides' logits, tokens x vocabulary, multiplied in the head's dtype (or in float32) and widened."""
    weight = case.head.weight.float() if widen_head else case.head.weight
    student = case.hidden.to(weight.dtype) @ weight.t()
    with torch.no_grad():
        reference = case.reference_hidden.to(weight.dtype) @ weight.t()
    return student.float(), reference.float()


def kl(z: Tensor, b: Tensor) -> Tensor:
    """Return KL(base ‖ student), summed."""
    return F.kl_div(z.log_softmax(-1), b.log_softmax(-1), reduction="sum", log_target=True)


def masked(logits: Tensor, targets: Tensor) -> Tensor:
    """Take the target out of the softmax."""
    return logits.scatter(-1, targets[:, None], FLOOR)


def autograd_masked(case: Case, *, widen_head: bool = False) -> Tensor:
    """The anchor: everything on whole logits, gradients by autograd."""
    z, b = whole_logits(case, widen_head=widen_head)
    return F.cross_entropy(z, case.targets, reduction="sum") + kl(masked(z, case.targets), masked(b, case.targets))


def autograd_full(case: Case) -> Tensor:
    """The same with the plain KL."""
    z, b = whole_logits(case)
    return F.cross_entropy(z, case.targets, reduction="sum") + kl(z, b)


def autograd_cross_entropy(case: Case) -> Tensor:
    """Cross-entropy alone on whole logits."""
    return F.cross_entropy((case.hidden @ case.head.weight.t()).float(), case.targets, reduction="sum")


def torch_linear_cross_entropy(case: Case) -> Tensor:
    """The chunked cross-entropy of torch 2.13, with its own choice of chunks."""
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(case.hidden, case.head.weight, case.targets, reduction="sum", options=options).float()


def trl_full(case: Case) -> Tensor:
    """The chunked divergence behind TRL's distillation trainer, in plain torch as on any CPU."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    weight = case.head.weight
    values, _ = ChunkedDivergenceFunction.apply(case.hidden, weight, None, case.reference_hidden, weight, None, 0.0)
    return values.sum()


def three_products(case: Case) -> Tensor:
    """The bound: the three matrix products on whole logits, in the head's dtype, and nothing else."""
    with torch.no_grad():
        z = case.hidden @ case.head.weight.t()
        case.reference_hidden @ case.head.weight.t()
        dh = z @ case.head.weight
    return (case.hidden * dh.detach()).sum()


def ours_one_pass(case: Case) -> Tensor:
    """Both losses, each chunk's logits used once."""
    return linear_cross_entropy_with_divergence(*case, Divergence()).loss


def ours_two_calls(case: Case) -> Tensor:
    """What a host pays that computes a chunked cross-entropy of its own."""
    return linear_cross_entropy(case.hidden, case.head, case.targets) + linear_target_masked_kl(*case)


VARIANTS: dict[str, Callable[[Case], Tensor]] = {
    "autograd: CE + masked KL": autograd_masked,
    "holdfast: CE + masked KL, one pass": ours_one_pass,
    "holdfast: CE + masked KL, two calls": ours_two_calls,
    "autograd, head widened: CE + masked KL": lambda case: autograd_masked(case, widen_head=True),
    "autograd: CE + full KL": autograd_full,
    "autograd: CE": autograd_cross_entropy,
    "holdfast: masked KL": lambda case: linear_target_masked_kl(*case),
    "holdfast: full KL": lambda case: linear_full_kl(*case),
    "holdfast: CE": lambda case: linear_cross_entropy(case.hidden, case.head, case.targets),
    "TRL ChunkedDivergence: full KL": trl_full,
    "torch F.linear_cross_entropy: CE": torch_linear_cross_entropy,
    "three products, whole": three_products,
}
ANCHOR, BEST = "autograd: CE + masked KL", "holdfast: CE + masked KL, one pass"
CORE = [name for name in VARIANTS if "full" not in name and "torch" not in name]
# (variant, the peer it is divided by): what each row of the table compares
RATIOS = [
    (BEST, ANCHOR),
    ("holdfast: CE + masked KL, two calls", ANCHOR),
    (BEST, "autograd, head widened: CE + masked KL"),
    (BEST, "autograd: CE + full KL"),
    (BEST, "three products, whole"),
    ("holdfast: masked KL", "holdfast: CE"),
    (BEST, "holdfast: CE"),
    ("holdfast: full KL", "TRL ChunkedDivergence: full KL"),
    ("holdfast: CE", "torch F.linear_cross_entropy: CE"),
    ("holdfast: CE", "autograd: CE"),
]


def gradient(function: Callable[[Case], Tensor], case: Case) -> tuple[float, Tensor]:
    """Run forward and backward; return the value and the gradient on the hidden states."""
    value = function(case)
    return value.item(), torch.autograd.grad(value, case.hidden)[0]


def correctness_gate() -> None:
    """Stop unless all variants of one objective agree on value and gradient; nothing wrong is worth timing."""
    case = make(64, "float32", vocab=32_000, drift=0.3)
    for words in ("CE + masked KL", "CE + full KL", ": full KL", ": CE"):
        names = [n for n in VARIANTS if (n.endswith(words) if words.startswith(":") else words in n)]
        results = {name: gradient(VARIANTS[name], case) for name in names}
        if words == ": full KL":
            results["twin"] = gradient(
                lambda case: full_kl(*(case.head.logits(h) for h in case[:2]), case.targets), case
            )
        if words == "CE + full KL":
            results["twin"] = gradient(lambda case: autograd_cross_entropy(case) + linear_full_kl(*case), case)
        (value, wanted), *others = results.values()
        for name, (other, found) in zip(list(results)[1:], others, strict=True):
            error = ((found - wanted).norm() / wanted.norm()).item()
            if abs(other / value - 1) > 1e-5 or error > 1e-4:
                raise SystemExit(f"{name} disagrees with {names[0]}: {other} vs {value}, gradient error {error:.1e}")
    print("correctness gate passed", flush=True)


def accuracy(rows: list[dict[str, object]]) -> None:
    """Relative error of the masked KL's gradient in bfloat16 at a KL near 1e-3, against float64 on the same numbers."""
    case = make(64, "bfloat16", width=512, vocab=32_000)
    exact = case.hidden.detach().double().requires_grad_()
    weight = case.head.weight.double()
    truth = target_masked_kl(exact @ weight.t(), case.reference_hidden.double() @ weight.t(), case.targets)
    (wanted,) = torch.autograd.grad(truth, exact)
    print(f"KL per token {truth.item() / 64:.2e}")
    usual: Callable[[Case], Tensor] = lambda case: target_masked_kl(*whole_logits(case), case.targets)  # noqa: E731
    for name, function in (("holdfast: masked KL", VARIANTS["holdfast: masked KL"]), ("autograd: masked KL", usual)):
        error = ((gradient(function, case)[1].double() - wanted).norm() / wanted.norm()).item()
        rows.append({"variant": name, "dtype": "bfloat16", "tokens": 64, "metric": "gradient error", "value": error})


def timings(rows: list[dict[str, object]], tokens: int, dtype: str, names: list[str], rounds: int) -> None:
    """Run the variants in turn, `rounds` times after a warm-up at 8 tokens; keep the median of each, then divide."""
    case = make(tokens, dtype)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for name in names:
        gradient(VARIANTS[name], Case(*(x[:8] for x in case[:2]), case.head, case.targets[:8]))
    for turn in range(rounds):
        for name in names:
            cpu, wall = time.process_time(), time.perf_counter()
            gradient(VARIANTS[name], case)
            times[name].append((time.process_time() - cpu, time.perf_counter() - wall))
        print(f"{dtype}, {tokens} tokens: round {turn + 1} of {rounds}", flush=True)
    common = {"dtype": dtype, "tokens": tokens, "rounds": rounds}
    for column, metric in enumerate(("cpu seconds", "wall seconds")):
        medians = {name: statistics.median(pair[column] for pair in times[name]) for name in names}
        for name, seconds in medians.items():
            rows.append({"variant": name, "metric": metric, "value": seconds, **common})
        for name, peer in RATIOS:
            if name in medians and peer in medians:
                ratio = medians[name] / medians[peer]
                rows.append({"variant": name, "peer": peer, "metric": f"{metric}, ratio", "value": ratio, **common})


def memory_child(name: str, tokens: int, dtype: str) -> None:
    """Print the peak of resident memory, in MiB, above what the loaded inputs take."""
    gradient(VARIANTS[name], make(2, dtype, vocab=100))  # libraries load and allocate before we look
    case = make(tokens, dtype)
    before = process_mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    gradient(VARIANTS[name], case)
    print(process_mib("VmHWM") - before)


def memory(rows: list[dict[str, object]], runs: list[tuple[str, int, str]]) -> None:
    """Measure each run in a process of its own, one at a time."""
    peaks: dict[tuple[str, int, str], float] = {}
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"}  # freed tensors go back to the system
    for name, tokens, dtype in runs:
        command = [sys.executable, __file__, "--child", name, "--tokens", str(tokens), "--dtype", dtype]
        peak = float(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)
        peaks[name, tokens, dtype] = peak
        common: dict[str, object] = {"variant": name, "dtype": dtype, "tokens": tokens}
        rows.append({**common, "metric": "peak MiB", "value": peak})
        if name != ANCHOR and (ANCHOR, tokens, dtype) in peaks:
            ratio = peak / peaks[ANCHOR, tokens, dtype]
            rows.append({**common, "peer": ANCHOR, "metric": "peak MiB, ratio", "value": ratio})
        print(rows[-1], flush=True)


def main() -> None:
    """Run the whole table, writing it as it grows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round at 64 tokens, nothing written")
    parser.add_argument("--only", choices=["memory", "time"], help="measure only this, and keep the other rows")
    parser.add_argument("--long-rounds", type=int, default=1, help="rounds at 2,048 tokens, a minute or more each")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--tokens", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--dtype", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.child:
        memory_child(options.child, options.tokens, options.dtype)
        return
    rows: list[dict[str, object]] = []
    correctness_gate()
    accuracy(rows)
    if options.quick:
        timings(rows, 64, "float32", list(VARIANTS), rounds=1)
        for row in rows:
            print(*row.values(), sep="\t")
        return
    for dtype in DTYPES if options.only != "time" else ():
        runs = [(ANCHOR, 2048), (BEST, 1024), (BEST, 2048), (BEST, 4096)]
        runs += [(n, 2048) for n in ("holdfast: masked KL", "holdfast: full KL", "TRL ChunkedDivergence: full KL")]
        memory(rows, [(name, tokens, dtype) for name, tokens in runs])
        write(rows, RESULTS)
    for dtype in DTYPES if options.only != "memory" else ():
        # whole bfloat16 products take 3x the time of float32 ones on this machine: fewer peers there
        timings(rows, 128, dtype, list(VARIANTS) if dtype == "float32" else CORE, rounds=7)
        write(rows, RESULTS)
    for dtype in DTYPES if options.only != "memory" else ():
        timings(rows, 2048, dtype, [ANCHOR, BEST], rounds=options.long_rounds)
        write(rows, RESULTS)


if __name__ == "__main__":
    main()
