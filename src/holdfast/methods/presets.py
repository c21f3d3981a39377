"""Papers as lists of methods: what a paper calls one method is often several terms."""

from __future__ import annotations

from ..core.method import Method
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
