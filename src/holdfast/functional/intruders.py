"""Intruder dimensions: strong directions of a tuned weight that its base weight does not have.

    W0 = Σᵢ s⁰ᵢ u⁰ᵢ v⁰ᵢᵀ      W0 + dW = Σⱼ sⱼ uⱼ vⱼᵀ      j is an intruder if maxᵢ |⟨uⱼ, u⁰ᵢ⟩| < threshold, j <= top

u are directions of the layer's output: every one of W0 counts, of W0 + dW only the strongest. After Shuttleworth et al.
(arXiv 2410.21228, algorithm 1). Where W0 has nearly equal singular values, a small dW turns their vectors among each
other, and turned ones count as intruders although nothing is new: so says the definition.

Read next: `holdfast.methods.intruder_dimensions`, which scales them down.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .lowrank import LowRank, Update
from .named import wide


def intruders(base: Tensor, update: Update, *, threshold: float = 0.5, top: int = 10) -> LowRank:
    """Return the part of W0 + dW that lies in intruder dimensions, Σ sⱼ uⱼ vⱼᵀ; its rank is how many there are.

    It takes two singular value decompositions, in float32 at least.

    Args:
        base: W0 [out, in].
        update: dW.
        threshold: a direction is an intruder if its cosine with every one of the base is below this.
        top: how many singular vectors of W0 + dW are looked at, the strongest first.

    >>> from holdfast.functional.lowrank import squared_norm
    >>> base = torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    >>> planted = LowRank(torch.tensor([[0.0], [0.0], [5.0]]), torch.tensor([[0.0, 1.0]]))
    >>> found = intruders(base, planted)  # along the third axis of the output the base has nothing
    >>> found.left.shape[1], round(float(squared_norm(found)), 3)  # 5² and the base's 1², now in one direction
    (1, 26.0)
    """
    start = wide(base)
    known = torch.linalg.svd(start, full_matrices=False).U
    u, s, vt = torch.linalg.svd(start + update.rows(0, len(start)), full_matrices=False)
    u, s, vt = u[:, :top], s[:top], vt[:top]
    likeness = (u.T @ known).abs().amax(dim=1)
    carries = s > torch.finfo(s.dtype).eps * max(start.shape) * s[0]  # of no strength: any vector would do there
    new = (likeness < threshold) & carries
    return LowRank(u[:, new], s[new, None] * vt[new])
