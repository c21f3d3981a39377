"""What a Fisher costs to collect: against plain backward passes over the same rows, and per-sample gradients.

    python benchmarks/fisher.py                       # the committed table: six minutes on one core
    python benchmarks/fisher.py --quick               # small shapes, nothing written

A Llama of 31 M parameters with LoRA on every linear map but the head. *Plain* is forward and backward with gradients of
all its weights; *per-sample* is `torch.func`'s vmap(grad) of the adapted layers' weights, squared and summed: the
diagonal Fisher as it is usually had. *Activations alone* is forward and backward without the gradient of any weight,
what no Fisher can do without. A collection is passes over the rows, and once what makes factors of the sums
(eigenvectors), a hash of the weights and a file. Collections over one and over two passes are timed; figures are for
the default 256 rows: the first pass and seven times the difference.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest.mock import patch

import torch
from holdfast.core import fisher_cache
from holdfast.core.fisher import Fishers, unseen
from holdfast.core.retain import Retain
from holdfast.core.selection import layer_updates, trainable
from holdfast.core.tap import Tap
from holdfast.core.types import FisherSpec
from holdfast.functional.head import Head
from holdfast.functional.linear_divergence import linear_cross_entropy
from peft import LoraConfig, get_peft_model
from record import Row, carry_out, parser
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from transformers import LlamaConfig, LlamaForCausalLM
from turns import Seconds, in_turns
from turns import rows as rows_of

RESULTS = Path(__file__).parent / "results" / "fisher.csv"
LENGTH, HEIGHT = 64, 32  # a pass of the collector: 2,048 tokens
PASSES = 8  # 256 rows, the default
AT_ONCE = 8  # rows that vmap takes together: of 1, 2, 4, 8 and 16 the fastest here
PLAIN, SAMPLES = "forward and backward, all weights", "per-sample gradients, torch.func"
BOUND = "forward and backward, activations alone"
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


def plain(model: nn.Module, batch: dict[str, Tensor]) -> None:
    """Forward and backward of one pass."""
    model.zero_grad()
    model(**batch).loss.backward()


def activations(model: LlamaForCausalLM, batch: dict[str, Tensor]) -> None:
    """Forward and backward of one pass down to the embeddings, the head on supervised positions alone."""
    embedded = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
    hidden = model.model(inputs_embeds=embedded, attention_mask=batch["attention_mask"]).last_hidden_state
    loss = linear_cross_entropy(hidden[:, :-1], Head(model.lm_head.weight), batch["labels"][:, 1:])
    torch.autograd.grad(loss, embedded)


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


def collection(model: nn.Module, spec: FisherSpec, passes: int) -> Callable[[], None]:
    """Return a whole collection over so many passes: hash of the weights, passes, factors, file."""
    tap, updates = Tap(model), layer_updates(model, trainable(model))
    data = Retain([rows(HEIGHT, 100 + i) for i in range(passes)])

    def whole() -> None:
        shutil.rmtree(fisher_cache.folder(), ignore_errors=True)
        Fishers(model, tap, data, 0, unseen)(updates, (), spec, 0)

    return whole


def measure(width: int, layers: int, rounds: int) -> list[Row]:
    """Time one pass of each peer and collections over one and two passes, in turns; the rest is arithmetic."""
    dense, batch = llama(width, layers), rows(HEIGHT, 1)
    frozen = llama(width, layers).requires_grad_(False)
    few = {key: value[: 2 * AT_ONCE] for key, value in batch.items()}
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(llama(width, layers), lora)
    runs: dict[str, Callable[[], object]] = {
        PLAIN: lambda: plain(dense, batch),
        BOUND: lambda: activations(frozen, batch),
        SAMPLES: lambda: per_sample(dense, few, AT_ONCE),
    }
    runs |= {f"{kind} {n}": collection(adapted, spec, n) for kind, spec in KINDS.items() for n in (1, 2)}
    for peer in (PLAIN, BOUND, SAMPLES):
        runs[peer]()  # a first call is slower
    found = in_turns(runs, rounds, f"width {width}")
    whole = {peer: times(found[peer], PASSES) for peer in (PLAIN, BOUND)}
    whole[SAMPLES] = times(found[SAMPLES], PASSES * HEIGHT / len(few["labels"]))
    for kind in KINDS:
        each = [minus(two, one) for one, two in zip(found[f"{kind} 1"], found[f"{kind} 2"], strict=True)]
        more = zip(found[f"{kind} 1"], times(each, PASSES - 1), strict=True)
        whole[kind] = [Seconds(first.cpu + rest.cpu, first.wall + rest.wall) for first, rest in more]
        whole[f"{kind}, passes alone"] = times(each, PASSES)
    mine = [name for name in whole if name not in (PLAIN, BOUND, SAMPLES)]
    pairs = [(name, peer) for name in mine for peer in (PLAIN, SAMPLES)]
    pairs += [(BOUND, PLAIN), (BOUND, SAMPLES)]
    return rows_of(whole, pairs, {"dtype": "float32", "tokens": PASSES * HEIGHT * LENGTH})


def times(found: Sequence[Seconds], factor: float) -> list[Seconds]:
    """The same for so many passes."""
    return [Seconds(factor * one.cpu, factor * one.wall) for one in found]


def minus(one: Seconds, other: Seconds) -> Seconds:
    """What one takes more than the other."""
    return Seconds(one.cpu - other.cpu, one.wall - other.wall)


def main() -> None:
    """Run the table."""
    asked = parser(__doc__, {"fisher": None})
    asked.add_argument("--rounds", type=int, default=7, help="three quarters of a minute each (7)")
    options = asked.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    size = (128, 2, 1) if options.quick else (512, 8, options.rounds)
    with tempfile.TemporaryDirectory() as cache, patch.dict(os.environ, HOLDFAST_CACHE=cache):
        carry_out({"fisher": lambda: measure(*size)}, RESULTS, options)


if __name__ == "__main__":
    main()
