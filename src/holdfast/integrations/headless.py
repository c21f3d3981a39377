"""One forward of a language model without its logits: the loss is the caller's, from what would have made them.

    −Σ_t log p(label_t) = read(hidden, labels),    loss = that / n

A transformers model's forward is its own (`headless`), wrappers and all, so nothing of it need be known here but that
its head is one module and that it asks its loss function, given labels. The head hands on its input, and
`outputs.logits` is a tensor of the right shape on torch's *meta* device, which has no numbers in it: whoever reads one
gets an error from torch, never a wrong number. TRL's own forward (`fused_lm_head=True`) makes no logits either: it runs
the backbone alone and returns what its trainer reads of every position, and so it does here (`headless_in_trl`).
Everything is as it was when the loss is asked for, so `read` may run the model. Read next: `one_pass`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..core.errors import NotYetSupported
from ..core.tap import Tap, last_hidden_state
from ..core.types import IGNORED


@dataclass(frozen=True)
class Rows:
    """What TRL's trainer reads of every position that predicts another, [B, T-1]; 0 where it is ignored."""

    log_probs: Tensor  # the only one with a gradient
    entropy: Tensor
    top1: Tensor
    mask: Tensor  # where it is not ignored


Read = Callable[[Tensor, Tensor], Tensor]
"""Computes −log p, summed over the labels, from hidden states [B, T, H] and labels [B, T]."""
ReadRows = Callable[[Tensor, Tensor], Rows]
"""Computes rows from the same."""


@contextmanager
def headless(tap: Tap, read: Read) -> Iterator[None]:
    """Let the model's next forward with labels have no logits, and its loss from `read`.

    Args:
        tap: the model's.
        read: called once, with what enters the head; or never, where the forward does without head or loss function.
    """
    swaps = ExitStack()
    entered: list[Tensor] = []

    def head(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        entered.append(hidden)
        return hidden.new_empty(*hidden.shape[:-1], tap.head().weight.shape[0], device="meta")

    def loss(
        logits: Tensor, labels: Tensor, vocab_size: int | None = None, num_items_in_batch: Any = None, **kwargs: Any
    ) -> Tensor:
        swaps.close()  # now the model is its own again
        if not entered:
            raise NotYetSupported("The model asked for its loss before its head had run. Attach with one_pass=False.")
        total = read(entered[-1], labels)
        if num_items_in_batch is None:
            return total / (labels[:, 1:] != IGNORED).sum()
        items = num_items_in_batch
        return total / (items.to(total.device) if isinstance(items, Tensor) else items)

    swaps.enter_context(_swapped(tap.head_module(), "forward", head))
    swaps.enter_context(_swapped(tap.language_model, "_loss_function", loss))
    with swaps:
        yield


@contextmanager
def headless_in_trl(tap: Tap, read: ReadRows) -> Iterator[None]:
    """Let the model's next forward with `fused_lm_head=True` have all that TRL's trainer reads from `read`.

    Args:
        tap: the model's.
        read: called once, with what the backbone returned.
    """
    model, swaps = tap.language_model, ExitStack()
    own_forward = model.forward

    def forward(*args: Any, fused_lm_head: bool = False, labels: Any = None, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return own_forward(*args, **kwargs, **({} if labels is None else {"labels": labels}))
        kwargs.pop("num_items_in_batch", None)  # its trainer divides by it
        hidden = last_hidden_state(tap.backbone(*args, **{**kwargs, "use_cache": False}))
        swaps.close()
        return _as_trl(read(hidden, labels))

    swaps.enter_context(_swapped(model, "forward", forward))
    with swaps:
        yield


def _as_trl(rows: Rows) -> Any:
    from trl.trainer.utils import FusedCausalLMOutput

    return FusedCausalLMOutput(
        loss=-rows.log_probs.sum() / rows.mask.sum(), log_probs=rows.log_probs, entropy=rows.entropy, is_top1=rows.top1,
        label_mask=rows.mask,
    )  # fmt: skip


@contextmanager
def _swapped(module: nn.Module, name: str, value: object) -> Iterator[None]:
    """Hang an attribute on a module itself, in front of its class's, and what was there back afterwards."""
    own: dict[str, Any] = vars(module)
    before = {name: own[name]} if name in own else {}
    own[name] = value
    try:
        yield
    finally:
        del own[name]
        own.update(before)
