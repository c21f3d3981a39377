"""What a stage of a recipe takes of memory without any method: weights, optimizer, activations, from shapes alone.

Sizes of what is held are exact; activations and workspaces are estimates (`analysis.memory` has the formulas, a test
compares them with what autograd keeps). Read next: `memory_methods`, what methods add; `memory_facts`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..analysis import memory
from ..analysis.memory import Part
from ..core.layers import LowRankUpdate
from .memory_facts import Facts, shape_of
from .skeleton import LAYER


def host_parts(facts: Facts) -> Iterator[Part]:
    """Yield what training takes without any method."""
    trained, tensors = facts.trained_bytes, len(facts.trained)
    numbers = sum(p.numel() for p in facts.trained.values())
    base = facts.skeleton.base_bytes
    yield Part("base weights", base, "parameters · bytes each", exact=True)
    if added := sum(p.numel() * p.element_size() for p in facts.skeleton.model.parameters()) - base:
        yield Part("adapter", added, f"parameters · bytes each ({numbers:,} are trained)", exact=True)
    yield Part("gradients", trained, "as large as what is trained", exact=True)
    state, formula, exact = optimizer_state(facts.optimizer, trained, numbers, tensors)
    yield Part(f"optimizer ({facts.optimizer})", state, formula, exact=exact)
    if facts.again:
        yield Part("the base, loaded again", facts.again * base, f"{facts.again} · base weights", exact=True)
    if facts.own_copy:
        yield Part("DPO's copy of the adapter", trained, "as large as what is trained", exact=True)
    kept = activations(facts, facts.tokens)
    yield Part("activations", kept, activations_formula(facts), "forward")
    rows = facts.tokens
    tile = memory.fused_head(rows, rows, facts.decoder, facts.element)
    formula = f"min(N, 4096) · 32768 · {facts.element} + 4 N H (N = {rows:,})"
    yield Part("host's loss, a tile of logits", tile, formula, "moment")


def optimizer_state(name: str, trained: int, numbers: int, tensors: int) -> tuple[int, str, bool]:
    """Return bytes, formula, and whether they are exact, of an optimizer's state.

    >>> optimizer_state("adamw_torch_fused", 400, 100, 2)
    (808, '2 · trained + 4 · tensors', True)
    >>> optimizer_state("sgd", 400, 100, 2)[0], optimizer_state("adamw_8bit", 400, 100, 2)[0]
    (0, 200)
    """
    if name.startswith("adamw_torch"):
        return memory.adam_state(trained, tensors), "2 · trained + 4 · tensors", True
    if name == "sgd":
        return 0, "no state", True
    if "8bit" in name:
        return 2 * numbers, "2 · P: two moments of a byte", False
    return memory.adam_state(trained, tensors), "taken to be AdamW's, 2 · trained; not known for this one", False


def activations(facts: Facts, tokens: int, *, adapters: bool = True) -> int:
    """Return what autograd keeps of a forward on so many tokens, with checkpointing or without.

    Args:
        facts: of the stage.
        tokens: of the forward.
        adapters: whether they are on.
    """
    model, element = facts.decoder, facts.element
    layers = max(model.layers, 1)
    repeated = facts.batch > 1 and "flash" not in str(facts.skeleton.config._attn_implementation)
    layer = memory.layer_activations(model, tokens, element, repeated=repeated)
    if facts.skeleton.config._attn_implementation == "eager":
        layer += memory.eager_scores(model, tokens, min(facts.length, tokens), element)
    sizes = _adapter_inputs(facts) if adapters else ([], [])
    adapter = memory.adapter_inputs(*sizes, tokens, facts.autocast or _adapter_bytes(facts))
    copies = memory.autocast_copies(_frozen(facts)) if 0 < facts.autocast < facts.weight else 0
    if not facts.checkpointing:
        return layers * layer + adapter + copies
    stream = facts.weight  # the residual stream is as wide as the embeddings, also under autocast
    return memory.kept_inputs(model, tokens, stream) + layer + (adapter + copies) // layers


def activations_formula(facts: Facts) -> str:
    """Return in words how activations come about."""
    one = f"n (8 H + {facts.element} (attention + 3 I) + 4 A) + LoRA's inputs"
    per = f"n = {facts.tokens:,}, L = {facts.decoder.layers}"
    if facts.checkpointing:
        return f"L · n · H · {facts.weight} + one layer: {one} ({per})"
    return f"L · [{one}] ({per})"


def _adapter_inputs(facts: Facts) -> tuple[list[int], list[int]]:
    """Return sizes of the inputs that are kept to train, and ranks: one a layer where it is cast or dropped out."""
    inputs, ranks = list[int](), list[int]()
    config = getattr(facts.skeleton.model, "peft_config", {}).get("default")
    apart = bool(facts.autocast or getattr(config, "lora_dropout", 0) or _adapter_bytes(facts) != facts.weight)
    for update in facts.skeleton.updates:
        if apart or facts.skeleton.inputs.get(update.layer, update.layer) == update.layer:
            inputs.append(shape_of(update)[1])
        ranks.append(update.a.shape[0] if isinstance(update, LowRankUpdate) else 0)
    return inputs, ranks


def _adapter_bytes(facts: Facts) -> int:
    return int(next(iter(facts.trained.values())).element_size())


def _frozen(facts: Facts) -> int:
    """Return how many numbers the frozen linear maps of the layers have that a backward pass goes through."""
    first = facts.skeleton.config.num_hidden_layers - facts.decoder.layers
    modules = facts.skeleton.model.named_modules()
    linear = [(name, m.weight) for name, m in modules if isinstance(m, torch.nn.Linear) and not m.weight.requires_grad]
    return sum(w.numel() for name, w in linear if (found := LAYER.search(f"{name}.")) and int(found[1]) >= first)
