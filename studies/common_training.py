"""The training loop of the studies: one context around it, one yield after each step; the studies say what to train."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from holdfast.core.method import Method
    from torch import Tensor, nn


def own_loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """The model's own loss of a batch."""
    return model(**batch).loss


def steps(
    model: nn.Module,
    batches: Sequence[Mapping[str, Any]],
    methods: Sequence[Method],
    *,
    rate: float,
    warm_up: int,
    retain: Any,
    tokenizer: Any = None,
    seed: int = 0,
    loss: Callable[[nn.Module, Mapping[str, Any]], Tensor] = own_loss,
) -> Iterator[tuple[int, float]]:
    """Train on one batch a step; after each yield how many there were, and the CPU seconds of training so far.

    AdamW, gradients clipped to 1, a linear warm-up and then a constant rate: a prefix of a run is a shorter run.
    """
    import torch
    from holdfast import preserve

    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, rate, weight_decay=0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / warm_up))
    seconds, started = 0.0, time.process_time()
    rows = retain if methods else ()
    with preserve(model, optimizer, methods, retain=rows, tokenizer=tokenizer, seed=seed) as session:
        for done, batch in enumerate(batches, start=1):
            (loss(model, batch) + session.loss(batch)).backward()
            session.gradients_ready()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            seconds += time.process_time() - started
            yield done, seconds
            started = time.process_time()
