"""One forward of a language model without its logits: the head hands on its input, and the loss is the caller's.

    model(**inputs).loss  =  −Σ_t log p(label_t) / n,    log p(label_t) = read(hidden, labels)

The forward is the model's own, wrappers and all, so nothing of it need be known here but that its head is one module
and that it asks its loss function, given labels. `outputs.logits` is then a tensor of the right shape on torch's *meta*
device, which has no numbers in it: whoever reads one gets an error from torch, never a wrong number. Under TRL, whose
own forward (`fused_lm_head=True`) makes no logits either, the output is the one that its trainer reads. Everything is
as it was when the loss is asked for, so `read` may run the model. Read next: `one_pass`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..core.errors import NotYetSupported
from ..core.tap import Tap


@dataclass(frozen=True)
class Rows:
    """What a host reads of every position that predicts another, [B, T-1]; 0 where it is ignored."""

    log_probs: Tensor  # the only one with a gradient
    entropy: Tensor
    top1: Tensor
    mask: Tensor  # where it is not ignored

    def loss(self, items: Any = None) -> Tensor:
        """Return the loss as transformers' models do: a sum over `items`, or a mean for None."""
        if isinstance(items, Tensor):
            items = items.to(self.mask.device)
        return -self.log_probs.sum() / (self.mask.sum() if items is None else items)


Read = Callable[[Tensor, Tensor], Rows]
"""Computes the rows from hidden states [B, T, H] and labels [B, T]."""


@contextmanager
def headless(tap: Tap, read: Read, *, fused: bool) -> Iterator[None]:
    """Let the model's next forward with labels have no logits, and its loss from `read`.

    Args:
        tap: the model's.
        read: called once, with what enters the head.
        fused: whether the host is TRL's, which reads rows.
    """
    model, swaps, found = tap.language_model, ExitStack(), _Found()

    def head(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        found.hidden = hidden
        return hidden.new_empty(*hidden.shape[:-1], tap.head().weight.shape[0], device="meta")

    def loss(
        logits: Tensor, labels: Tensor, vocab_size: int | None = None, num_items_in_batch: Any = None, **kwargs: Any
    ) -> Tensor:
        swaps.close()  # now the model is its own again
        found.rows = read(found.given(), labels)
        return found.rows.loss(num_items_in_batch)

    own_forward = model.forward

    def forward(*args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        output = own_forward(*args, **kwargs)  # TRL's, which without its keyword is the model's own
        return _as_trl(found.asked()) if fused_lm_head else output

    swaps.enter_context(_swapped(tap.head_module(), "forward", head))
    swaps.enter_context(_swapped(model, "_loss_function", loss))
    if fused:
        swaps.enter_context(_swapped(model, "forward", forward))
    with swaps:
        yield


class _Found:
    """What a forward has come by so far."""

    hidden: Tensor | None = None
    rows: Rows | None = None

    def given(self) -> Tensor:
        if self.hidden is None:
            raise NotYetSupported("The model asked for its loss before its head had run. Attach with one_pass=False.")
        return self.hidden

    def asked(self) -> Rows:
        if self.rows is None:
            raise NotYetSupported("The model did not ask its loss function, given labels. Attach with one_pass=False.")
        return self.rows


def _as_trl(rows: Rows) -> Any:
    from trl.trainer.utils import FusedCausalLMOutput

    return FusedCausalLMOutput(
        loss=rows.loss(), log_probs=rows.log_probs, entropy=rows.entropy, is_top1=rows.top1, label_mask=rows.mask
    )


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
