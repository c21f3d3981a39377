"""How far the first tokens of an answer have moved: the KL from the base along the base's own answer.

    KL_k(prompt) = 1/k Σ_{t ≤ k}  KL( base(· | prompt, answer_<t) ‖ side(· | prompt, answer_<t) )

The answer is the base's greedy one, so both sides are compared in the same places. What safety training teaches lies
mostly in the first few tokens (Qi et al., 2024, arXiv 2406.05946), so tuning that undoes it shows there first.
Read next: `holdfast.drift.probes.output_kl`, the same on texts of any kind.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from holdfast.drift.entry import JSON
from holdfast.drift.probe import BASE, Found, Probe, ProbeError, Tick, digest_of
from holdfast.drift.score import Score
from holdfast.drift.scoring import VERSION, Row, divergences
from holdfast.drift.suite import Prompt, Suite

if TYPE_CHECKING:
    from holdfast.drift.models import Models

__all__ = ["FirstTokensKL"]


class FirstTokensKL(Probe):
    """Compares both sides along the base's greedy answers to the unsafe prompts of a suite.

    Args:
        prompts: a suite, or its prompts; those to be refused are asked, sorted by id.
        ks: over how many first tokens to average; one score for each. A shorter answer, its end included, is averaged
            over what there is.

    Raises:
        ProbeError: for no unsafe prompts, ids that are not unique, or `ks` that are not different positive numbers.
    """

    name = "first_tokens_kl"
    note = (
        "KL(base || tuned) in nats a token along the base's own greedy answers to unsafe prompts. It says how far the "
        "answers' beginnings moved, not which way: a model that refuses better has moved too."
    )

    def __init__(self, prompts: Suite | Sequence[Prompt], ks: Sequence[int] = (1, 5, 20)) -> None:
        given = prompts.prompts if isinstance(prompts, Suite) else prompts
        self.prompts = sorted((p for p in given if p.expected == "refuse"), key=lambda prompt: prompt.id)
        twice = zip(self.prompts, self.prompts[1:], strict=False)
        faults = [] if self.prompts else ["no prompt is unsafe (expected 'refuse')"]
        faults += [f"two prompts have the id {one.id!r}" for one, two in twice if one.id == two.id]
        faults += [f"ks must be whole numbers from 1, got {k!r}" for k in ks if type(k) is not int or k < 1]
        if not ks or len(set(ks)) < len(ks):
            faults.append(f"ks must be different numbers, at least one, got {tuple(ks)}")
        if faults:
            raise ProbeError("The KL over first tokens cannot be measured:", faults)
        self.ks = sorted(ks)

    @property
    def size(self) -> int:
        """One answer for each prompt."""
        return len(self.prompts)

    @property
    def identity(self) -> Mapping[str, JSON]:
        """Prompts, how many tokens, and how they are compared."""
        prompts = digest_of([[p.id, p.text, p.category] for p in self.prompts])
        return {"prompts": prompts, "ks": self.ks, "scoring": VERSION}

    def measure(self, models: Models, side: str, tick: Tick) -> Found:
        """Have the base answer, and compare along its answers; the base has not moved from itself."""
        texts = [prompt.text for prompt in self.prompts]
        if side == BASE:
            models.ask(texts, BASE, self.ks[-1], tick)  # every side needs the answers: they are written here
            moved = [[0.0] for _ in texts]
        else:
            replies = models.ask(texts, BASE, self.ks[-1])
            pairs = zip(texts, replies, strict=True)
            rows = [Row.answer(models.ids(text), reply.tokens) for text, reply in pairs]
            moved = divergences(models, side, rows, done=tick)
        return Found({f"{self.name}.{k}": self._score(moved, k) for k in self.ks})

    def _score(self, moved: Sequence[Sequence[float]], k: int) -> Score:
        items = tuple(fmean(one[:k]) for one in moved)
        where = f"the base's first {k} tokens"
        return Score(
            fmean(items),
            items=items,
            categories=tuple(prompt.category for prompt in self.prompts),
            instrument=f"KL(base || side) over {where} on {len(items)} prompts {self.identity['prompts']}",
        )
