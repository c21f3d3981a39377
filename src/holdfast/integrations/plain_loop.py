"""Methods inside a loop of your own: one context around it, two calls inside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..core.distributed import rank
from ..core.errors import WrongSetup
from ..core.held_out import Measure
from ..core.method import Method
from ..core.selection import trainable
from ..core.session import Session
from ..retain.cached_reference import keep
from .peft import tap_and_reference
from .pools import RetainData, retain_rows
from .progress import progress_bar
from .retain_data import to_sets
from .task_cache import Cache, keeper, tell_if_idle


@contextmanager
def preserve(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    methods: Sequence[Method],
    *,
    retain: RetainData = (),
    reference: str | nn.Module | None = None,
    tokenizer: Any = None,
    backbone: str | None = None,
    head: str | None = None,
    seed: int = 0,
    measures: Mapping[str, Measure] | None = None,
    share_prefix: bool = True,
    cache: Cache = False,
) -> Iterator[Session]:
    """Protect a model in a plain PyTorch loop.

        with holdfast.preserve(model, optimizer, [TargetMaskedKL()]) as session:
            for batch in loader:
                loss = model(**batch).loss + session.loss(batch)
                loss.backward()
                session.gradients_ready()
                optimizer.step()
                optimizer.zero_grad()

    With accumulation, count first: `counts = session.count(micro_batches)`, then `session.loss(batch, counts)`; under
    DDP add `host_factor=world_size`, since it averages gradients. Clip between `gradients_ready` and `step`.

    Args:
        model: a causal language model, plain, in PEFT or in DDP; another module needs `backbone` and `head`.
        optimizer: the one that will step; every trainable parameter must be its own.
        methods: the methods to run.
        retain: rows in a TRL format (then `tokenizer` is needed), batches of tensors, a pool or the folder of one;
            several sets of them by name where a method tells them apart. Self-replay that is given nothing samples a
            pool from the base (then `tokenizer` is needed too).
        reference: as in `holdfast.attach`.
        tokenizer: for retain rows, and to sample a pool.
        backbone: name of the submodule that returns the last hidden state.
        head: name of the linear submodule that makes logits of it.
        seed: of the generator that methods draw from.
        measures: as in `holdfast.attach`.
        share_prefix: as in `holdfast.attach`.
        cache: as in `holdfast.attach`; what is kept is written as it grows, and when the context is left.

    Yields:
        The session.

    Raises:
        WrongSetup: if the optimizer holds other parameters than the model trains, and as `holdfast.attach`.
    """
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if lost := [name for name, p in trainable(model).items() if id(p) not in held]:
        raise WrongSetup(
            f"{len(lost)} trainable parameters are not in the optimizer ({lost[0]}, ...): it was made for another "
            "model, or before the adapter was added. Make the optimizer from the model as it is now."
        )
    tap, chosen = tap_and_reference(model, methods, reference, backbone=backbone, head=head)
    device = next(model.parameters()).device
    rows = retain_rows(methods, retain, tokenizer, model, chosen, seed=seed, shown=rank() == 0)
    sets = to_sets(rows, tokenizer, device=device)
    bar = progress_bar(rank() == 0)
    session = Session(
        model, methods, reference=chosen, retain=sets, tap=tap, seed=seed, keep=keep, progress=bar, measures=measures,
        share_prefix=share_prefix, keep_task=keeper(cache, tokenizer),
    )  # fmt: skip
    tell_if_idle(cache, session)
    session.watch(optimizer)
    try:
        yield session
    finally:
        session.close()
