"""Perplexity: how surprised a model is by given texts, the simplest measure of what it knows of them.

    perplexity = exp L,    L = Σ_i Σ_t −log p(text_i,t | text_i,<t) / Σ_i n_i           (n_i predicted tokens in text i)

Each text's item is its linearised loss (`holdfast.drift.scoring.ratio`): items average to L, the logarithm of the
value, and two sides are compared text by text. Read next: `holdfast.drift.scoring`, how losses are read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from holdfast.drift.entry import JSON
from holdfast.drift.probe import Found, Probe, ProbeError, Tick, digest_of
from holdfast.drift.probes.output_kl import text_faults
from holdfast.drift.scoring import VERSION, Row, log_probabilities, ratio

if TYPE_CHECKING:
    from holdfast.drift.models import Models

__all__ = ["Perplexity"]


class Perplexity(Probe):
    """The perplexity of plain texts.

    Args:
        name: of the texts, as in `perplexity.name`.
        texts: sorted, so that their order does not matter.
        max_length: tokens read of a text; what is over, or over what the model can read, is cut off at the end.

    Raises:
        ProbeError: for no texts, or a `max_length` below 1, and names every text that is empty; when measuring, names
            every text of a single token, which has nothing to predict.
    """

    note = (
        "exp of the mean loss a token, on plain text without chat template. It depends on the tokenizer: compare it "
        "between a base and what was tuned from it, not between families."
    )

    def __init__(self, name: str, texts: Sequence[str], *, max_length: int = 1024) -> None:
        self.of, self.name, self.max_length = name, f"perplexity.{name}", max_length
        if faults := text_faults(name, texts, max_length):
            raise ProbeError(f"The perplexity of {name!r} cannot be measured:", faults)
        self.texts = sorted(texts)

    @property
    def size(self) -> int:
        """One loss for each text."""
        return len(self.texts)

    @property
    def identity(self) -> Mapping[str, JSON]:
        """Texts, how much of them, and how they are scored."""
        return {"texts": digest_of(self.texts), "max_length": self.max_length, "scoring": VERSION}

    def measure(self, models: Models, side: str, tick: Tick) -> Found:
        """Score every text."""
        rows = [Row.text(models.tokenizer(text).input_ids) for text in self.texts]
        if short := [f"{text!r:.60}" for text, row in zip(self.texts, rows, strict=True) if not row.targets]:
            raise ProbeError(f"Some texts of {self.of!r} have fewer than two tokens, so none to predict:", short)
        scored = log_probabilities(models, side, rows, max_length=self.max_length, done=tick)
        loss = ratio([-math.fsum(one) for one in scored], [len(one) for one in scored])
        instrument = f"loss a token on {self.of}, {self.size} texts to {self.max_length} tokens"
        value = math.exp(loss.value) if loss.value < 700 else math.inf
        score = replace(loss, value=value, standard_error=None, instrument=f"{instrument} {self.identity['texts']}")
        return Found({self.name: score})
