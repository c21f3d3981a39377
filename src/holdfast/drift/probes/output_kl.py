"""How far a model has moved on given texts: KL(base ‖ side) at every position, averaged over tokens.

    KL = Σ_i Σ_t KL( base(· | text_i, ≤t) ‖ side(· | text_i, ≤t) ) / Σ_i n_i           (n_i tokens in text i)

On texts unlike the task it is forgetting that needs no labels; on the task's own prompts it has been found to follow
forgetting elsewhere (Shenfeld et al., 2025, "RL's Razor", arXiv 2509.04259). Each text's item is linearised
(`holdfast.drift.scoring.ratio`), so that items average to the value. Read next: `holdfast.drift.probes.perplexity`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from holdfast.drift.entry import JSON
from holdfast.drift.probe import BASE, Found, Probe, ProbeError, Tick, digest_of
from holdfast.drift.score import Score
from holdfast.drift.scoring import VERSION, Row, divergences, ratio

if TYPE_CHECKING:
    from holdfast.drift.models import Models

__all__ = ["OutputKL"]


class OutputKL(Probe):
    """The KL from the base on texts, or on users' prompts.

    Args:
        name: of the texts, as in `output_kl.name`.
        texts: sorted, so that their order does not matter.
        prompts: whether they are what users say, to be put into the chat template; else plain text.
        max_length: tokens a text; what is over, or over what the model can read, is cut off at the end.

    Raises:
        ProbeError: for no texts, or a `max_length` below 1, and names every text that is empty; when measuring, names
            every text without tokens.
    """

    note = (
        "KL(base || tuned) in nats a token: how far predictions moved on these texts, for better or worse; 0 only for "
        "a model that predicts as the base does."
    )

    def __init__(self, name: str, texts: Sequence[str], *, prompts: bool = False, max_length: int = 1024) -> None:
        self.of, self.name, self.prompts, self.max_length = name, f"output_kl.{name}", prompts, max_length
        if faults := text_faults(name, texts, max_length):
            raise ProbeError(f"The KL on {name!r} cannot be measured:", faults)
        self.texts = sorted(texts)

    @property
    def size(self) -> int:
        """One number for each text."""
        return len(self.texts)

    @property
    def identity(self) -> Mapping[str, JSON]:
        """Texts, how they are read, and how they are compared."""
        texts = digest_of(self.texts)
        return {"texts": texts, "prompts": self.prompts, "max_length": self.max_length, "scoring": VERSION}

    def measure(self, models: Models, side: str, tick: Tick) -> Found:
        """Compare both sides at every token; the base has not moved from itself."""
        if side == BASE:
            tick(self.size)
            score = Score(0.0, items=(0.0,) * self.size)
        else:
            read = models.ids if self.prompts else lambda text: list(models.tokenizer(text).input_ids)
            rows = [Row(tuple(read(text))) for text in self.texts]
            if empty := [f"{text!r:.60}" for text, row in zip(self.texts, rows, strict=True) if not row.ids]:
                raise ProbeError(f"Some texts of {self.of!r} have no tokens; leave them out:", empty)
            moved = divergences(models, side, rows, max_length=self.max_length, done=tick)
            score = replace(ratio([math.fsum(one) for one in moved], [len(one) for one in moved]), standard_error=None)
        kind = "prompts" if self.prompts else "texts"
        instrument = f"KL(base || side) a token on {self.of}, {self.size} {kind} to {self.max_length} tokens"
        return Found({self.name: replace(score, instrument=f"{instrument} {self.identity['texts']}")})


def text_faults(name: str, texts: Sequence[str], max_length: int) -> list[str]:
    """What is wrong with texts to be read, all faults; empty if nothing is."""
    faults = [] if isinstance(name, str) and name.strip() else [f"the texts need a name, got {name!r:.40}"]
    if isinstance(texts, str) or not texts:
        faults.append(f"give several texts, not {texts!r:.40}" if texts else "there are no texts")
    else:
        bad = [(row, text) for row, text in enumerate(texts, 1) if not isinstance(text, str) or not text.strip()]
        faults += [f"row {row} is empty or not a text: {text!r:.40}" for row, text in bad]
    if type(max_length) is not int or max_length < 1:
        faults.append(f"max_length must be a whole number from 1, got {max_length!r}")
    return faults
