"""Write docs/memory.md: what a run of 7 B and 72 B takes, and what each method adds; `--check` only compares.

Nothing is measured here and no weight is read: models are made on the meta device from the sizes of well-known public
configurations, and `holdfast.recipe.memory` does the arithmetic that `holdfast doctor RECIPE` does.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from holdfast import methods
from holdfast.analysis import memory_states
from holdfast.analysis.memory import GIB, Part, total
from holdfast.analysis.tables import markdown_table
from holdfast.core.method import Method
from holdfast.recipe.memory import host_parts
from holdfast.recipe.memory_facts import Facts
from holdfast.recipe.memory_methods import added
from holdfast.recipe.model import ModelSpec
from holdfast.recipe.skeleton import of_config

PAGE = Path(__file__).parents[1] / "docs" / "memory.md"
RANKS, LENGTHS = (16, 64), (4096, 32768)
SIZES = {  # of Qwen2.5-7B and Qwen2.5-72B, as their config.json has them
    "7 B": {
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "vocab_size": 152064, "max_position_embeddings": 32768,
    },
    "72 B": {
        "hidden_size": 8192, "intermediate_size": 29568, "num_hidden_layers": 80, "num_attention_heads": 64,
        "num_key_value_heads": 8, "vocab_size": 152064, "max_position_embeddings": 32768,
    },
}  # fmt: skip
METHODS: dict[str, Method] = {
    "target_masked_kl, full_kl": methods.TargetMaskedKL(),
    "self_replay": methods.SelfReplay(),
    "self_replay, cache: false": methods.SelfReplay(cache=False),
    "update_decay": methods.UpdateDecay(),
    "l2_sp": methods.L2SP(),
    "ewc": methods.EWC(),
    "fisher_alignment and its kin": methods.FisherAlignment(),
    "orthogonal_lora": methods.OrthogonalLoRA(),
    "agem": methods.AGEM(),
    "pcgrad": methods.PCGrad(),
    "orthogonal_projection": methods.OrthogonalProjection(),
    "orthogonal_projection, bfloat16": methods.OrthogonalProjection(storage="bfloat16"),
    "orthogonal_projection, host": methods.OrthogonalProjection(storage="host"),
    "random_subspace": methods.RandomSubspace(),
}
HEAD = """# What a run takes of memory, and what each method adds

<!-- written by scripts/memory_page.py (`make docs`): do not edit -->

`holdfast doctor RECIPE` says this of your own recipe, line by line with its formulas, before anything is trained:

```
holdfast doctor recipe.yaml --memory 80GiB --length 4096 --batch 2
```

It looks at shapes alone (the model on torch's meta device, PEFT's adapter put on it), so it reads no weights. What is
*held* is exact, to the byte: weights, adapter, optimizer state, and the states of methods are what a run allocates, and
tests compare them. Activations and workspaces are estimates: what autograd keeps of a Llama-like layer, and the buffers
that the losses make; neither the allocator's reserve nor the CUDA context are in them. One process is counted: DDP adds
its buckets, about as large as the gradients.

    peak = held + max(in a step + the largest moment, at the optimizer's step, before the first step)

- **in a step**: from a micro-batch's forward to its backward pass; **moment**: parts of it that come one after another;
- **at the optimizer's step**: activations are gone, methods have buffers of what is trained;
- **before the first step**, and at every refresh: Fishers are collected, reference gradients taken.

Below: weights in bfloat16, bf16 training, LoRA on all linear layers with factors in float32, AdamW, one sequence a
micro-batch, on a GPU; methods with their defaults, one retain set. All in GiB.
"""
LAYER = """
Activations are L layers of n · (8 H + e (2 A d + 2 K d + 3 I) + 4 A) and the inputs of LoRA's factors,
n · e · Σ (in + r); with checkpointing L · n · H · e and one layer. (n tokens, e bytes of an activation, H hidden, I
intermediate, A heads of d numbers, K of them for keys and values, r rank.) TRL computes its own loss in tiles of 4,096
tokens by 32,768 pieces.
"""


def facts(sizes: dict[str, int], rank: int) -> Facts:
    """The facts of a model with LoRA on all its linear layers, at the first length."""
    from transformers import Qwen2Config

    adapter = {"r": rank, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    config = Qwen2Config(**sizes, tie_word_embeddings=False)
    bones = of_config(config, ModelSpec("of its sizes alone", "LORA", adapter, "bfloat16"))
    return Facts(bones, batch=1, length=LENGTHS[0], autocast=2, checkpointing=True, reference="off")


def gib(size: float) -> str:
    """A size in GiB; a dash for none."""
    if not size:
        return "–"
    return f"{size / GIB:.1f}" if size >= 10 * GIB else f"{size / GIB:.2f}" if size >= GIB / 100 else "< 0.01"


def host_table(of: dict[int, Facts]) -> str:
    """What training takes without a method."""
    rows: dict[str, dict[str, str]] = {}
    for rank, known in of.items():
        for part in host_parts(known):
            if part.when == "held":
                rows.setdefault(part.name, {"what": part.name})[f"r = {rank}"] = gib(part.size)
        for length in LENGTHS:
            for twice in (False, True):
                name = f"activations, {length:,} tokens{', with checkpointing' if twice else ''}"
                parts = host_parts(replace(known, length=length, checkpointing=twice))
                size = next(part.size for part in parts if part.name == "activations")
                rows.setdefault(name, {"what": name})[f"r = {rank}"] = gib(size)
    rows["loss"] = {"what": "the host's loss, 32,768 tokens, for a moment"}
    for rank, known in of.items():
        parts = list(host_parts(replace(known, length=LENGTHS[-1])))
        rows["loss"][f"r = {rank}"] = gib(total(parts, "moment"))
    return markdown_table(list(rows.values()))


def in_step(parts: list[Part]) -> int:
    """What methods add between forward and backward: what stays, and their largest moment."""
    return total(parts, "forward") + max((part.size for part in parts if part.when == "moment"), default=0)


def method_table(of: dict[int, Facts]) -> str:
    """What each method adds."""
    rows = []
    for name, method in METHODS.items():
        parts = {rank: added([method], known) for rank, known in of.items()}
        row = {"method": name}
        row |= {f"held, r = {rank}": gib(total(each, "held")) for rank, each in parts.items()}
        for length in LENGTHS:
            row[f"in a step, {length:,} tokens"] = gib(in_step(added([method], replace(of[RANKS[0]], length=length))))
        row |= {f"optimizer's step, r = {rank}": gib(total(each, "update")) for rank, each in parts.items()}
        row |= {f"before the first, r = {rank}": gib(total(each, "start")) for rank, each in parts.items()}
        host = total(parts[RANKS[-1]], "host")
        row["elsewhere"] = gib(total(parts[RANKS[0]], "disk")) + " on disk" if total(parts[RANKS[0]], "disk") else "–"
        if host:
            row["elsewhere"] = f"{gib(total(parts[RANKS[0]], 'host'))}, r = {RANKS[-1]}: {gib(host)} on the host"
        rows.append(row)
    return markdown_table(rows)


def token_table(of: dict[str, dict[int, Facts]]) -> str:
    """What a token takes in a cache of the base."""
    rows = []
    for name, known in of.items():
        hidden = known[RANKS[0]].decoder.hidden
        kept = {
            "statistics in float32, exact": memory_states.statistics_a_token(hidden),
            "statistics in float16": memory_states.statistics_a_token(hidden, 2),
            "hidden states in bfloat16": memory_states.states_a_token(hidden, 2),
        }
        rows.append({"model": name} | {text: f"{size:,} bytes" for text, size in kept.items()})
    return markdown_table(rows)


NOTES = """
- *in a step* of an output method is the base's forward, or h0 with two float32 logits of a chunk of 1,024 rows and one
  product of them (3 · 1,024 · V · 4 bytes), whichever is larger, and the finished gradient, 4 N H. It does not grow
  with tokens x vocabulary. Its reference is the adapter switched off and takes nothing; where it must be a frozen copy
  (PiSSA, trained biases, all weights trained) that is as large as what is trained, and another model is a whole base.
- `self_replay` runs the student on one retain sequence beside each of these (of at most 256 tokens, as the base writes
  them). Its cache is of 256 such sequences; where that would be above 4 GiB the base runs in every step instead.
- Fishers are of the adapted layers, with 64 eigenvectors a side, inputs that layers share counted once (q, k, v; gate,
  up). `task_stability`, `riemannian_overlap` and `geodesic_separation` hold the same one, once for all of them if they
  ask for the same data. `ewc` keeps diagonals.
- *before the first step* is nearly all activations: Fishers and reference gradients are taken in evaluation mode, where
  activation checkpointing is off, and in the weights' own precision, so LoRA's inputs are float32. A pass has 2,048
  tokens, or one retain batch of 4 rows where that is longer: short retain rows are what makes it small.
- `orthogonal_projection` holds rank x P numbers: 16 · P · 4 bytes, in bfloat16 half of that; on the host it is sent
  over at every step. `rank: 4` is a quarter of all three. At a refresh its gradients and a fresh basis join the old.
- Methods of the gradient space have two flat buffers at the optimizer's step, the parameters before and what was taken
  off: 2 · 4 · P bytes, whatever their number.
- Where a method's divergence and the host's loss are computed [in one pass](one-step.md), the host's tile falls away.
"""


def page() -> str:
    """The page as Markdown."""
    known = {name: {rank: facts(sizes, rank) for rank in RANKS} for name, sizes in SIZES.items()}
    lines = [HEAD, "## The host", LAYER]
    for name, of in known.items():
        numbers = {rank: sum(p.numel() for p in each.trained.values()) for rank, each in of.items()}
        base = of[RANKS[0]].skeleton.base_bytes // 2
        sizes = SIZES[name]
        told = ", ".join(f"{count / 1e6:,.0f} M trained at r = {rank}" for rank, count in numbers.items())
        lines += [
            f"### {name}\n",
            f"Sizes of Qwen2.5-{name.replace(' ', '')}: {base / 1e9:.1f} B parameters, hidden "
            f"{sizes['hidden_size']:,}, {sizes['num_hidden_layers']} layers, vocabulary {sizes['vocab_size']:,};\n"
            f"{told}.\n",
            host_table(of) + "\n",
        ]
    lines.append("## What each method adds\n")
    for name, of in known.items():
        lines += [f"### {name}\n", method_table(of) + "\n"]
    lines += [NOTES.strip() + "\n", "## A token in a cache of the base\n", token_table(known) + "\n"]
    return "\n".join(lines)


def main() -> None:
    """Write the page, or say that it is out of date."""
    new = page()
    if "--check" in sys.argv:
        sys.exit(0 if PAGE.is_file() and PAGE.read_text() == new else "docs/memory.md is out of date: run `make docs`.")
    PAGE.write_text(new)


if __name__ == "__main__":
    main()
