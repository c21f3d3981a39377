"""What each method adds to a stage's memory: its state, what it needs in a step, what it keeps on disk.

Tensors that methods share (retain batches, the base's side, a Fisher of the same data) are counted once, with the first
that needs them. Read `memory` first, and `memory_state`, which knows the states to the byte.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from ..analysis import memory, memory_states
from ..analysis.memory import Part
from ..core.method import GradientMethod, Method, OutputMethod, WeightMethod, needs_reference, needs_retain
from ..functional.products import rows_of_chunk
from ..methods.gradient.orthogonal_projection import OrthogonalProjection
from ..methods.gradient.pcgrad import PCGrad
from ..methods.gradient.subspace_method import SubspaceMethod
from ..methods.weight.fisher_method import FisherMethod
from ..methods.weight.orthogonal_lora import OrthogonalLoRA
from ..retain.cached_rows import weighted
from .memory import activations
from .memory_facts import Facts
from .memory_retain import cache_formula, cache_size, exact_statistics, kinds_on_task, pass_tokens, retain_tokens
from .memory_state import (
    fisher_sets,
    fisher_size,
    layers_of,
    numbers,
    rank_of,
    selected,
    set_names,
    state_size,
)

Parts = Iterator[Part]
FISHERS = {
    "kronecker": "(d q + q + 1) · 4 a side, q = min({keep}, d); inputs that layers share once",
    "diagonal": "(d + 1) · 4 a side; inputs that layers share once",
    "samples": "rows · {keep} · (out + in) · 4",
}


def added(methods: Sequence[Method], facts: Facts) -> list[Part]:
    """Return what methods add; each part has the name of the first method that needs it."""
    shared, found = _Shared(facts, methods), list[Part]()
    for method in methods:
        if method.strength:
            found += [replace(part, of=method.name) for part in shared.of(method)]
    return found


@dataclass
class _Shared:
    """What was counted already."""

    facts: Facts
    methods: Sequence[Method]
    seen: set[object] = field(default_factory=set)

    def first(self, what: object) -> bool:
        known = what in self.seen
        self.seen.add(what)
        return not known

    def of(self, method: Method) -> Parts:
        if needs_retain(method) and self.first("retain"):
            yield from _retain(self.facts)
        if needs_reference(method) and self.first("reference"):
            yield from _reference(self.facts)
        if isinstance(method, OutputMethod):
            yield from self.output(method)
        elif isinstance(method, GradientMethod):
            yield from self.gradient(method)
        elif isinstance(method, FisherMethod):
            yield from self.fisher(method)
        else:
            yield from _state(method, self.facts)
        if isinstance(method, WeightMethod):
            size = sum(p.numel() * p.element_size() for p in selected(method, self.facts).values())
            yield Part("penalty's gradient", size, "P · bytes each", "update")

    # --- output ---------------------------------------------------------------------------------------------------

    def output(self, method: OutputMethod) -> Parts:
        facts, model = self.facts, self.facts.decoder
        chunk = getattr(method, "chunk_rows", None) or rows_of_chunk(model.vocabulary, on_cpu=facts.on_cpu)
        rows = facts.tokens if method.on == "task" else retain_tokens(method, facts)
        kept = method.on == "retain" and method.cache and cache_size(method, facts)
        if method.on == "retain" and self.first(("stream", method.share)):
            kind = f"as of the task, on {rows:,} tokens more: {method.share:.0%} of a step's sequences"
            yield Part("the student on retain sequences", activations(facts, rows), kind, "forward")
            if kept:
                known = bool(facts.retain)
                yield Part("cache of the base", kept, cache_formula(method, facts), "disk", exact=known)
        if method.on == "task" and facts.kept:
            yield from self.cache_of_task(method)
        if not kept and self.first(("base", method.on)):
            size = memory.reference_pass(model, rows, facts.element)
            yield Part("the base's forward", size, f"n (e (2 H + 3 I) + 4 H), n = {rows:,}", "moment")
        base = 0 if kept else memory.hidden_states(model, rows, facts.weight)
        sides = 1 if kept and exact_statistics(method, facts) else 2
        logits = memory.chunk_workspace(rows, chunk, model.vocabulary, sides=sides, element=facts.wide)
        products = memory.chunk_products(rows, chunk, model.vocabulary, facts.on_cpu, facts.wide)
        copies = 2 * memory.hidden_states(model, rows, facts.weight)  # of the supervised rows, of both sides
        text = f"h0, n H {facts.weight}, and its rows; {sides} · C · V · {facts.wide} and one product (C = {chunk:,})"
        yield Part("the loss's workspace", base + copies + logits + products, text, "moment")
        size = memory.finished_gradient(rows, model.hidden, facts.wide)
        yield Part("the loss's gradient", size, f"N ({facts.wide} H + 8), N = {rows:,}", "forward")

    def cache_of_task(self, method: OutputMethod) -> Parts:
        """What one method needs of the base is kept once for all that need the same; nothing, if one needs more."""
        facts, table = self.facts, kinds_on_task(self.methods, self.facts)
        asked, positions = method.statistic(), getattr(method, "positions", None)
        kind = table.get((asked, positions)) if asked is not None and positions is not None else None
        if kind is None or not self.first(("kept", kind)):
            return
        if kind.statistics is None:
            element, what = facts.weight, "the base's hidden state, as the model makes it"
        else:
            element, what = facts.kept, "e0, c0, w" if weighted(kind.statistics) else "e0, c0"
        a_token = kind.bytes_a_token(facts.decoder.hidden, element)
        text = f"at most {facts.rows:,} rows of {facts.length:,} tokens, {a_token:,} bytes a supervised token: {what}"
        yield Part("cache of the base on the task", facts.rows * facts.length * a_token, text, "disk")

    # --- gradient -------------------------------------------------------------------------------------------------

    def gradient(self, method: GradientMethod) -> Parts:
        facts = self.facts
        count, b = numbers(selected(method, facts)), 4
        yield from _state(method, facts)
        if self.first("update"):
            each = [selected(m, facts) for m in self.methods if m.strength and isinstance(m, GradientMethod)]
            both = numbers({name: p for params in each for name, p in params.items()}) + max(map(numbers, each))
            text = f"2 · 4 P (P = {count:,}): parameters before, and what the optimizer took off"
            yield Part("flat buffers", b * both, text, "update", exact=True)
        if getattr(method, "metric", "") == "optimizer":
            yield Part("the optimizer's metric", 2 * b * count, "2 · 4 P: by name and as one vector", "update")
        groups = 1
        if isinstance(method, SubspaceMethod):
            rank, _, groups = rank_of(method, facts)
            if method.strength != 1:
                yield Part("a part of the projection", 2 * b * count, "2 · 4 P: projected, and mixed", "update")
            if method.storage == "host":
                yield Part("the basis, sent over", b * rank * count, f"4 k P, k = {rank}", "update")
            yield Part("a fresh basis beside the old", b * rank * count, f"4 k P, k = {rank}", "start")
            yield Part("what spans it", b * groups * count, f"4 g P, g = {groups}", "start")
        elif method.uses_retain:
            groups = len(set_names(facts))
            yield Part("fresh reference gradients", b * groups * count, f"4 g P, g = {groups}", "start")
            if isinstance(method, PCGrad):
                yield Part("all objectives' gradients", b * (groups + 1) * count, "4 (g + 1) P", "update")
        if method.uses_retain:
            yield from _pass(facts)
        if isinstance(method, OrthogonalProjection) and method.uses_reference and self.first(("base", "start")):
            size = memory.reference_pass(facts.decoder, pass_tokens(facts), facts.element)
            yield Part("the base's forward", size, "n (e (2 H + 3 I) + 4 H)", "start")

    # --- weight ---------------------------------------------------------------------------------------------------

    def fisher(self, method: FisherMethod) -> Parts:
        """A Fisher is kept by the session for all methods that ask for the same; a rotated one is the method's own."""
        facts, layers = self.facts, layers_of(method, self.facts)
        held = [(name, place) for place in fisher_sets(method) for name in set_names(facts, place)]
        read = [method.data] if isinstance(method, OrthogonalLoRA) and method.uses_retain else []
        beside_them = [name for names in (*read, *filter(None, [method.compare])) for name in set_names(facts, names)]
        sizes = {name: fisher_size(method.spec, layers, facts, name) for name in (*(n for n, _ in held), *beside_them)}
        new = sum(size for name, size in sizes.items() if self.first((name, method.spec, tuple(layers))))
        own = state_size(method, facts)
        if not method.rotated:
            own -= sum(sizes[name] for name, _ in held)  # the very tensors that the session keeps
        if new:
            text, sure = FISHERS[method.kind].format(keep=method.keep), facts.skeleton.ran
            yield Part(f"Fisher ({method.kind})", new, text, exact=sure)
            sums = [size for shape in layers.values() for size in shape]
            sketch = memory_states.moment_sums(sums, method.keep, diagonal=method.kind == "diagonal")
            if method.kind != "samples":
                yield Part("sums while it is collected", sketch, "2 keep · d · 4 a side (d <= 1024: d² · 4)", "start")
            yield from _pass(facts, adapters=False)
        if own:
            yield Part("state", own, "starts of whole layers, directions, which factor is whose", exact=True)


def _state(method: Method, facts: Facts) -> Parts:
    size = state_size(method, facts)
    on_host = getattr(method, "storage", "") == "host" and not facts.on_cpu
    if isinstance(method, SubspaceMethod):
        rank = rank_of(method, facts)[0]
        text = f"k P {method.bytes_each} + 8 blocks k² + a few numbers (k = {rank})"
    else:
        text = f"P = {numbers(selected(method, facts)):,}"
    if size:
        known = type(method).__module__.startswith("holdfast.")
        yield Part("state", size, text, "host" if on_host else "held", exact=known)


def _retain(facts: Facts) -> Parts:
    tensors = [tensor for batches in facts.retain.values() for batch in batches for tensor in batch.values()]
    if tensors:
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        yield Part("retain batches", size, "8 bytes a token, for ids, mask and labels", exact=True)


def _reference(facts: Facts) -> Parts:
    if facts.reference == "copy":
        yield Part("reference: a frozen copy", facts.trained_bytes, "as large as what is trained", exact=True)
    elif facts.reference == "other":
        yield Part("reference: another model", facts.skeleton.base_bytes, "base weights", exact=True)


def _pass(facts: Facts, *, adapters: bool = True) -> Parts:
    tokens = pass_tokens(facts)
    # in evaluation mode, which turns checkpointing off, and in the weights' own precision
    size = activations(replace(facts, checkpointing=False, autocast=0), tokens, adapters=adapters)
    yield Part("activations of a retain pass", size, f"as of the task, on {tokens:,} tokens, all kept", "start")
