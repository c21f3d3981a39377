"""What a Fisher costs to collect: against plain backward passes over the same rows, and per-sample gradients.

    python benchmarks/fisher.py                       # the committed table: three minutes on one core
    python benchmarks/fisher.py --quick               # small shapes, nothing written

A Llama of 31 M parameters with LoRA on every linear map but the head. *Plain* is forward and backward with gradients of
all its weights; *per-sample* is `torch.func`'s vmap(grad) of the adapted layers' weights, squared and summed: the
diagonal Fisher as it is usually had. A collection is passes over the rows, and once what makes factors of the sums
(eigenvectors), a hash of the weights and a file. Collections over one and over two passes are timed; figures are for
the default 256 rows: the first pass and seven times the difference.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch
from holdfast.core import fisher_cache
from holdfast.core.fisher import Fishers, unseen
from holdfast.core.retain import Retain
from holdfast.core.selection import layer_updates, trainable
from holdfast.core.tap import Tap
from holdfast.core.types import FisherSpec
from peft import LoraConfig, get_peft_model
from record import write
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from transformers import LlamaConfig, LlamaForCausalLM

RESULTS = Path(__file__).parent / "results" / "fisher.csv"
LENGTH, HEIGHT = 64, 32  # a pass of the collector: 2,048 tokens
PASSES = 8  # 256 rows, the default
AT_ONCE = 8  # rows that vmap takes together: of 1, 2, 4, 8 and 16 the fastest here
PLAIN, SAMPLES = "forward and backward, all weights", "per-sample gradients, torch.func"
KINDS = {"diagonal": FisherSpec("diagonal"), "kronecker": FisherSpec("kronecker")}


def llama(width: int, layers: int) -> LlamaForCausalLM:
    """A Llama with random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192, hidden_size=width, intermediate_size=width * 11 // 4, num_hidden_layers=layers,
        num_attention_heads=8, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def rows(n: int, seed: int) -> dict[str, Tensor]:
    """Random tokens, the second half of each row a response."""
    ids = torch.randint(8192, (n, LENGTH), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[:, : LENGTH // 2] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def timed(work: Callable[[], object]) -> float:
    """Return cpu seconds."""
    started = time.process_time()
    work()
    return time.process_time() - started


def plain(model: nn.Module, batch: dict[str, Tensor]) -> None:
    """Forward and backward of one pass."""
    model.zero_grad()
    model(**batch).loss.backward()


def per_sample(model: nn.Module, batch: dict[str, Tensor], at_once: int) -> dict[str, Tensor]:
    """Sum the squares of each row's gradient of its summed loss, over the weights of linear layers but the head."""
    named = dict(model.named_parameters())
    chosen = {name: p.detach() for name, p in named.items() if name.endswith("proj.weight")}

    def loss(params: dict[str, Tensor], ids: Tensor, labels: Tensor) -> Tensor:
        logits = functional_call(model, params, (ids[None],)).logits[0, :-1]
        return nn.functional.cross_entropy(logits, labels[1:], reduction="sum")

    sums = {name: torch.zeros_like(p) for name, p in chosen.items()}
    for ids, labels in zip(batch["input_ids"].split(at_once), batch["labels"].split(at_once), strict=True):
        gradients = vmap(grad(loss), (None, 0, 0))(chosen, ids, labels)
        for name, gradient in gradients.items():
            sums[name] += gradient.square().sum(0)
    return sums


def collection(model: nn.Module, spec: FisherSpec, passes: int) -> Callable[[], float]:
    """Return what times a whole collection over so many passes: hash of the weights, passes, factors, file."""
    tap, updates = Tap(model), layer_updates(model, trainable(model))
    data = Retain([rows(HEIGHT, 100 + i) for i in range(passes)])

    def whole() -> float:
        shutil.rmtree(fisher_cache.folder(), ignore_errors=True)
        return timed(lambda: Fishers(model, tap, data, 0, unseen)(updates, (), spec, 0))

    return whole


def measure(width: int, layers: int, rounds: int) -> list[dict[str, object]]:
    """Time one pass of each peer and collections over one and two passes, in turns; the rest is arithmetic."""
    dense, batch = llama(width, layers), rows(HEIGHT, 1)
    few = {key: value[: 2 * AT_ONCE] for key, value in batch.items()}
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(llama(width, layers), lora)
    runs: dict[str, Callable[[], float]] = {
        PLAIN: lambda: timed(lambda: plain(dense, batch)),
        SAMPLES: lambda: timed(lambda: per_sample(dense, few, AT_ONCE)) * HEIGHT / len(few["labels"]),
    }
    runs |= {f"{kind} {n}": collection(adapted, spec, n) for kind, spec in KINDS.items() for n in (1, 2)}
    found: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds):
        for name, run in runs.items():
            found[name].append(run())
        print(f"round {turn + 1} of {rounds}", {name: round(times[-1], 2) for name, times in found.items()}, flush=True)
    median = {name: statistics.median(times) for name, times in found.items()}
    common = {"dtype": "float32", "tokens": PASSES * HEIGHT * LENGTH, "rounds": rounds}
    seconds = {peer: PASSES * median[peer] for peer in (PLAIN, SAMPLES)}
    for kind in KINDS:
        each = median[f"{kind} 2"] - median[f"{kind} 1"]
        seconds[kind] = median[f"{kind} 1"] + (PASSES - 1) * each
        seconds[f"{kind}, passes alone"] = PASSES * each
    table: list[dict[str, object]] = []
    for name, value in seconds.items():
        table.append({**common, "variant": name, "metric": "cpu seconds", "value": value})
        for peer in (PLAIN, SAMPLES) if name not in (PLAIN, SAMPLES) else ():
            ratio = {"metric": "cpu seconds, ratio", "peer": peer, "value": value / seconds[peer]}
            table.append({**common, "variant": name, **ratio})
    return table


def main() -> None:
    """Run the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small shapes, nothing written")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as cache, patch.dict(os.environ, HOLDFAST_CACHE=cache):
        table = measure(128, 2, 1) if options.quick else measure(512, 8, options.rounds)
    if not options.quick:
        write(table, RESULTS)
    for row in table:
        print("\t".join(str(value) for value in row.values()))


if __name__ == "__main__":
    main()
