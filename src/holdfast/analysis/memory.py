"""What a training step takes of memory, in bytes: arithmetic on a model's sizes, without torch and without weights.

    peak = held + max(forward + the largest moment, update, start)

*Held* from the first step to the last; *forward*: from a micro-batch's forward to its backward pass; *moment*: for a
part of it, one after another; *update*: around the optimizer's step; *start*: while states are made. Activations are
those that autograd keeps of a Llama-like layer, which is an estimate for any other. Letters: n tokens of a micro-batch,
N of them supervised, H hidden, I intermediate, V vocabulary, L layers, A heads of d numbers, K of them for keys and
values, e bytes of an activation, P trained numbers. Read next: `memory_states`, what methods hold; docs/memory.md.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

When = Literal["held", "forward", "moment", "update", "start", "host", "disk"]
GIB = 2**30
WIDE = 4  # bytes of a float32
TRL_ROWS, TRL_COLUMNS = 4096, 32768  # of the tile of logits in TRL's fused head


@dataclass(frozen=True)
class Decoder:
    """The sizes of a decoder.

    Attributes:
        hidden: H.
        intermediate: I, of a gated feed-forward part.
        layers: L, those that a backward pass goes through.
        heads: A.
        kv_heads: K.
        head_dim: d.
        vocabulary: V.
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int


@dataclass(frozen=True)
class Part:
    """One line of a memory table.

    Attributes:
        name: what it is.
        size: bytes.
        formula: how they come about, in the letters above.
        when: it is there.
        exact: whether this is what is allocated, to the byte; else it is an estimate.
        of: the method that brings it; empty: the host.
    """

    name: str
    size: int
    formula: str
    when: When = "held"
    exact: bool = False
    of: str = ""


def total(parts: Iterable[Part], *when: When) -> int:
    """Return the sum of the parts of these kinds.

    >>> total([Part("a", 2, ""), Part("b", 3, "", "disk")], "held")
    2
    """
    return sum(part.size for part in parts if part.when in when)


def peak(parts: Iterable[Part]) -> int:
    """Return the most that a device holds at one time: held + max(forward + the largest moment, update, start).

    What happens at the start happens one method after another.

    >>> peak([Part("w", 5, ""), Part("x", 2, "", "forward"), Part("y", 3, "", "moment"), Part("z", 4, "", "update")])
    10
    """
    all_parts = list(parts)
    moment = max((part.size for part in all_parts if part.when == "moment"), default=0)
    starts = (total([p for p in all_parts if p.of == method], "start") for method in {p.of for p in all_parts})
    each = total(all_parts, "forward") + moment, total(all_parts, "update"), max(starts, default=0)
    return total(all_parts, "held") + max(each)


# --- the host ------------------------------------------------------------------------------------------------------


def adam_state(trained: int, tensors: int) -> int:
    """AdamW's state: two moments in the parameters' own dtype, and a count of 4 bytes a tensor: 2·trained + 4·tensors.

    Args:
        trained: bytes of the trained parameters.
        tensors: how many there are.
    """
    return 2 * trained + WIDE * tensors


def layer_activations(model: Decoder, tokens: int, element: int, *, repeated: bool = False) -> int:
    """What autograd keeps of one layer, adapters apart: n · (8 H + e (2 A d + 2 K d + 3 I) + 4 A).

    Two norms keep their input in float32; the attention its query, key, value and result, and 4 bytes a head; the gated
    product its two sides and what entered the gate. Inputs of frozen linear maps are not kept.

    Args:
        model: the decoder.
        tokens: n.
        element: e.
        repeated: keys and values are repeated for every head (K = A), as for a padded batch without flash attention.
    """
    kv_heads = model.heads if repeated else model.kv_heads
    attention = 2 * (model.heads + kv_heads) * model.head_dim
    return tokens * (2 * WIDE * model.hidden + element * (attention + 3 * model.intermediate) + WIDE * model.heads)


def eager_scores(model: Decoder, tokens: int, length: int, element: int) -> int:
    """What eager attention keeps of one layer beside that: its softmax in float32 and in e bytes, n · T · A · (4 + e).

    In float32 the two are one: n · T · A · 4.
    """
    return tokens * length * model.heads * (WIDE if element == WIDE else WIDE + element)


def adapter_inputs(inputs: Iterable[int], ranks: Iterable[int], tokens: int, element: int) -> int:
    """What LoRA keeps to train its factors, what enters A and what enters B: n · e · Σ (in + r).

    Args:
        inputs: sizes of the inputs that are kept: one a layer where it is cast for each, else one for all that share.
        ranks: of each adapted layer.
        tokens: n.
        element: bytes of a number as the adapter multiplies it.
    """
    return tokens * element * (sum(inputs) + sum(ranks))


def kept_inputs(model: Decoder, tokens: int, element: int) -> int:
    """What activation checkpointing keeps, the input of every layer: L · n · H · e."""
    return model.layers * tokens * model.hidden * element


def autocast_copies(numbers: int, element: int = 2) -> int:
    """What autocast adds where weights are wider than it: a copy of every frozen matrix, kept by autograd: W · e.

    Args:
        numbers: of the frozen linear maps that a backward pass goes through: all layers', or one's with checkpointing.
        element: e.
    """
    return numbers * element


def fused_head(tokens: int, supervised: int, model: Decoder, element: int) -> int:
    """TRL's loss at its largest: a tile of logits, and float32 gradients: min(N, 4096) · 32768 · e + 4 N H.

    Args:
        tokens: n; where there is no GPU every position is scored, so pass them as supervised too.
        supervised: N.
        model: the decoder.
        element: e.
    """
    rows = min(supervised, tokens)
    return min(rows, TRL_ROWS) * TRL_COLUMNS * element + WIDE * rows * model.hidden


# --- the output methods --------------------------------------------------------------------------------------------


def reference_pass(model: Decoder, tokens: int, element: int) -> int:
    """The base's forward at its largest, in the feed-forward part of one layer: n · (e (2 H + 3 I) + 4 H)."""
    return tokens * (element * (2 * model.hidden + 3 * model.intermediate) + WIDE * model.hidden)


def hidden_states(model: Decoder, tokens: int, element: int) -> int:
    """The base's last hidden states h0: n · H · e."""
    return tokens * model.hidden * element


def chunk_workspace(rows: int, chunk_rows: int, vocabulary: int, *, sides: int = 2, element: int = WIDE) -> int:
    """Logits of a chunk, of base and student: 2 · min(C, N) · V · 4; of a cached base one side alone.

    Args:
        rows: N.
        chunk_rows: C.
        vocabulary: V.
        sides: 2, or 1 where the base's side is read from a cache.
        element: 4; 8 where the model is in float64.
    """
    return sides * min(chunk_rows, rows) * vocabulary * element


def chunk_products(rows: int, chunk_rows: int, vocabulary: int, on_cpu: bool, element: int = WIDE) -> int:
    """One product of two rows of logits, as it is summed: min(C, N) · V · 4; on a CPU a block of 2^18 numbers."""
    block = min(chunk_rows, rows)
    return (min(block, max(1, 2**18 // vocabulary)) if on_cpu else block) * vocabulary * element


def finished_gradient(rows: int, hidden: int, element: int = WIDE) -> int:
    """The loss's gradient on the hidden states, finished in the forward pass, and its places: N · (4 H + 8)."""
    return rows * (hidden * element + 8)
