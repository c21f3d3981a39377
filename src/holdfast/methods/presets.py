"""Papers as lists of methods: what a paper calls one method is often several terms."""

from __future__ import annotations

from typing import Literal

from ..core.method import Method
from .gradient.orthogonal_projection import OrthogonalProjection
from .output.target_masked_kl import TargetMaskedKL


def target_masked_kl(*, strength: float = 1.0, as_published: bool = False) -> list[Method]:
    """Return the list of "Mask the Target" (arXiv 2605.29498).

    Args:
        strength: the paper's lambda.
        as_published: with the paper's exclusion threshold and its normalisation by kept tokens, for reproduction;
            this form is refused with gradient accumulation, under which its value is not defined.

    >>> target_masked_kl(as_published=True)[0].exclusion
    0.0001
    """
    if as_published:
        return [TargetMaskedKL(strength=strength, exclusion=1e-4, normalise="kept")]
    return [TargetMaskedKL(strength=strength)]


def ogpsa(
    *, stage: Literal["sft", "dpo"] = "sft", exact: bool = False, official: bool = False, leak: float = 0.0
) -> list[Method]:
    """Return the list of OGPSA (arXiv 2602.07892): updates without a component along retain gradients.

    Args:
        stage: of safety post-training: the paper refreshes every 30 steps in SFT and every 5 in DPO.
        exact: what kept most in our lab instead of the paper's form: the update is projected, 16 gradients on
            minibatches, refreshed every 5 steps and early. Put benign look-alikes of the forbidden prompts into the
            retain data: it protects what they contain.
        official: as the public code does it: a projection for each tensor, and in DPO the likelihood of chosen and
            rejected answers.
        leak: with `official`, its leak of reference gradients into the step after a refresh: 1 / accumulation steps
            reproduces the code under ZeRO-2, 0 repairs it.

    Raises:
        ValueError: if `exact` and `official` are both asked for, or a leak without `official`.

    >>> ogpsa(stage="dpo")[0].refresh_every
    5
    >>> ogpsa(exact=True)[0].apply_to
    'update'
    """
    if (exact and official) or (leak and not official):
        raise ValueError("exact=True and official=True are two forms: choose one; leak is the official form's alone.")
    if exact:
        return [OrthogonalProjection()]
    return [
        OrthogonalProjection(
            apply_to="gradient",
            rank=None,
            samples=200,
            refresh_every=30 if stage == "sft" else 5,
            early_refreshes=(),
            scope="tensor" if official else "global",
            references="chosen_and_rejected" if official and stage == "dpo" else "likelihood",
            leak=leak,
        )
    ]
