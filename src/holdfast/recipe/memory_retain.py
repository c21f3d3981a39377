"""What retain data cost: tokens that run beside a micro-batch, passes for a Fisher, and the cache of the base on disk.

Read `memory_methods` first.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..analysis import memory_states
from ..core.method import Method, OutputMethod
from ..core.packing import TOKENS
from ..core.retain import Retain
from ..core.stream import beside
from ..core.types import Positions
from ..functional.divergence import Divergence
from ..retain.cache_facts import inexact
from ..retain.cached_reference import LARGEST
from ..retain.settings import Settings
from ..retain.task_kinds import Kind, kinds_of
from .memory_facts import Facts
from .skeleton import ShapeTap

POOL_TOKENS = 2 * Settings.max_tokens  # of a sequence that the base has written, at most, with its prompt


def pass_tokens(facts: Facts) -> int:
    """Return the tokens of the largest pass over retain batches: small ones are put together, large ones run alone."""
    own = [batch["input_ids"].numel() for batches in facts.retain.values() for batch in batches]
    return max(own, default=0) if max(own, default=0) > TOKENS else min(TOKENS, sum(own) or TOKENS)


def retain_tokens(method: OutputMethod, facts: Facts) -> int:
    """Return how many retain tokens run beside one micro-batch, at most."""
    step = beside(facts.batch * facts.accumulation, method.share)
    longest = [batch["input_ids"].shape[1] for batches in facts.retain.values() for batch in batches]
    return -(-step // facts.accumulation) * max(longest, default=min(facts.length, POOL_TOKENS))


def cache_size(method: OutputMethod, facts: Facts) -> int:
    """Return the bytes of the pool's cache; 0 where it would be too large and the base runs in every step."""
    exact = exact_statistics(method, facts)
    size = memory_states.statistics_a_token if exact else memory_states.states_a_token
    a_token = size(facts.decoder.hidden, facts.wide if exact else facts.weight)
    if facts.retain:
        sequences = Retain(facts.retain).sequences(method.data)
        count, positions = len(sequences), sum(len(ids) - 1 for ids in sequences)
    else:
        count, positions = Settings.n, Settings.n * (POOL_TOKENS - 1)
    largest = positions * facts.decoder.hidden * facts.wide
    return memory_states.pool_cache(positions, count, a_token) if largest <= LARGEST else 0


def exact_statistics(method: OutputMethod, facts: Facts) -> bool:
    """Return whether a cache of the base keeps exact statistics for this method, by the cache's own rules."""
    divergence = method.statistic()
    if divergence is None:
        return False
    tap = ShapeTap(facts.skeleton.model)
    try:
        return not inexact(tap.head(), tap.head(original=True), divergence)
    finally:
        tap.remove()


def kinds_on_task(methods: Sequence[Method], facts: Facts) -> dict[tuple[Divergence, Positions], Kind]:
    """Return what a cache of the task keeps for methods, by its own rules; nothing where one of them needs more."""
    on_task = [m for m in methods if isinstance(m, OutputMethod) and m.on == "task" and m.strength]
    tap = ShapeTap(facts.skeleton.model)
    try:
        return kinds_of(on_task, tap.head(), tap.head(original=True)).table
    finally:
        tap.remove()


def cache_formula(method: OutputMethod, facts: Facts) -> str:
    """Return in words what a token takes in that cache."""
    if exact_statistics(method, facts):
        return f"(H · {facts.wide} + 12) a token: e0, c0, the token"
    return f"(H · {facts.weight} + 4) a token: the base's hidden state, the token"
