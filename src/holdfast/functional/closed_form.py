"""Value and logit gradient of the divergences and of the cross-entropy for a few rows, in closed form.

Write d = z − b for the change of the logits since the base, q~ for the base without the target y, and

    μ = E_q~[d],   e_v = exp(d_v − μ) − 1,   r = E_q~[e],   KL(q~ ‖ p~) = log(1 + r),   p~_v = q~_v (1 + e_v) / (1 + r).

Every gradient of the forward family is then one expression, a and c being numbers per row,

    g_v = q~_v [ a (e_v − r) / (1 + r) + c ]   (v ≠ y),      g_y = −c,

with (a, c) = (w, 0) for the target-masked KL, (1 − p_y, 1 − p_y) for the cross-entropy, and
(w (1 − p_y), w (p_base(y) − p_y)) for the full KL, which is the masked one plus a choice between y and not y.
Nothing here subtracts two nearly equal numbers: the small KL of early training and targets of probability
1 − 1e-17 come out right in float32, and d = 0 gives exactly 0. The other directions are f-divergences,
g_v = p_v (s_v − E_p[s]). What hosts log of a row is had on the way: the entropy −Σ_v p_v log p_v, term by term, and
whether y is the likeliest token. `linear_divergence` calls this for every few rows of a chunk.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from holdfast.functional.divergence import FLOOR, Divergence, log_miss_probability, position_weight

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

# exp(40) is far from overflow in float32, and a token whose q underflows (below e^-87) stays below e^-47 in p.
SAFE_RANGE = 40.0


class Rows(NamedTuple):
    """What a few rows give: their divergence and cross-entropy, and which of them `exclusion` keeps.

    Where they are asked for also the student's entropy, and whether the target is its likeliest token (the first of
    several that are equal, as `argmax` has it).
    """

    divergence: Float[Tensor, " rows"]
    cross_entropy: Float[Tensor, " rows"]
    kept: Bool[Tensor, " rows"]
    entropy: Float[Tensor, " rows"] | None = None
    top1: Bool[Tensor, " rows"] | None = None


def cross_entropy_rows_(z: Float[Tensor, "rows vocab"], y: Int[Tensor, "rows 1"]) -> Tensor:
    """Return −log p(y) per row, `[rows]`, right also where p(y) rounds to 1; `z` becomes its gradient on the logits."""
    z_y = z.gather(1, y)
    z.scatter_(1, y, FLOOR)
    top = z.amax(1, keepdim=True)
    p = z.sub_(top).exp_()
    total = p.sum(1, keepdim=True)
    gap = z_y - top - total.log()  # log p(y) / (1 − p(y)), from the other tokens alone
    miss = torch.sigmoid(-gap)  # 1 − p(y)
    p.mul_(miss / total).scatter_(1, y, -miss)
    return -F.logsigmoid(gap).squeeze(1)


def likelihood_rows_(z: Float[Tensor, "rows vocab"], y: Int[Tensor, "rows 1"], *, statistics: bool = False) -> Rows:
    """Return what `cross_entropy_rows_` does as `Rows` without a divergence; `statistics` as in `divergence_rows_`."""
    top1 = _is_top(z, y) if statistics else None
    nll = cross_entropy_rows_(z, y)
    entropy = _entropy(z.clamp(min=0), nll) if statistics else None  # the gradient is p but at y, where it is negative
    return Rows(torch.zeros_like(nll), nll, torch.ones_like(nll, dtype=torch.bool), entropy, top1)


def divergence_rows_(
    b: Float[Tensor, "rows vocab"],
    d: Float[Tensor, "rows vocab"],
    y: Int[Tensor, "rows 1"],
    divergence: Divergence,
    strength: float = 1.0,
    cross_entropy: float = 0.0,
    *,
    statistics: bool = False,
) -> Rows:
    """Return the values; `d` becomes the logit gradient of `strength * divergence + cross_entropy * (−log p(y))`.

    Args:
        b: Base logits, `[rows, vocab]`; overwritten.
        d: Student logits minus base logits, `[rows, vocab]`; overwritten by the gradient.
        y: Targets, `[rows, 1]`.
        divergence: The member of the family.
        strength: Factor of the divergence in the gradient (not in the value).
        cross_entropy: Factor of the cross-entropy in the gradient; its value is 0 where this is 0.
        statistics: Whether entropy and top1 are asked for; they need a cross-entropy.
    """
    masked = divergence.mask == "target"
    top1 = _is_top(b + d, y) if statistics else None
    forward = divergence.direction == "forward" and (_is_safe(d) or (masked and _is_safe(d.scatter(1, y, 0.0))))
    rows = (_forward_rows if forward else _general_rows)(b, d, y, divergence, strength, cross_entropy, statistics)
    return rows._replace(top1=top1)


def _forward_rows(
    b: Tensor, d: Tensor, y: Tensor, divergence: Divergence, strength: float, cross_entropy: float, statistics: bool
) -> Rows:
    b_y, d_y = b.gather(1, y), d.gather(1, y)
    b.scatter_(1, y, FLOOR)
    top = b.amax(1, keepdim=True)
    q = b.sub_(top).exp_()  # times its sum, by which numbers of a row are divided, not all of it; exactly 0 at y
    total = q.sum(1, keepdim=True)

    d.scatter_(1, y, 0.0)  # any finite number: q is 0 there
    mean = _expect(q, d) / total
    e = d.sub_(mean).scatter_(1, y, 0.0)
    residue = _expect(q, e) / total  # what rounding left in the mean
    e.expm1_()
    r = _expect(q, e) / total
    shift = torch.log1p(r)
    kl = (shift - residue).clamp_(min=0)

    gap_b = b_y - top - total.log()  # log p_base(y) / (1 − p_base(y))
    change = d_y - mean - shift  # of that gap, from base to student
    gap = gap_b + change
    weight, kept = position_weight(F.logsigmoid(-gap_b).squeeze(1), divergence)
    w = strength * weight.unsqueeze(1)
    miss = torch.sigmoid(-gap)  # 1 − p(y) of the student
    if divergence.mask == "target":
        a, c = w, torch.zeros_like(w)
    else:
        kl = torch.sigmoid(-gap_b) * kl + _binary_kl(gap_b, change)
        a, c = w * miss, -w * miss * torch.sigmoid(gap_b) * torch.expm1(change)
    nll = torch.zeros_like(kl)
    if cross_entropy:
        nll = -F.logsigmoid(gap)
        a, c = a + cross_entropy * miss, c + cross_entropy * miss
    entropy = _entropy(torch.addcmul(q, q, e).mul_(miss / (1 + r) / total), nll.squeeze(1)) if statistics else None

    slope = a / (1 + r) / total
    e.mul_(slope).add_(c / total - slope * r).mul_(q).scatter_(1, y, -c)  # e is d: its memory now holds the gradient
    return Rows(weight * kl.squeeze(1), nll.squeeze(1), kept, entropy)


def _general_rows(
    b: Tensor, d: Tensor, y: Tensor, divergence: Divergence, strength: float, cross_entropy: float, statistics: bool
) -> Rows:
    """Every direction, and logits that moved by more than exp can hold: two log-softmaxes instead of one ratio."""
    weight, kept = position_weight(log_miss_probability(b, y), divergence)
    out, z = d, b + d
    if divergence.mask == "target":
        b, d = b.scatter(1, y, FLOOR), d.scatter(1, y, 0.0)
    log_q, log_p = b.log_softmax(1), (b + d).log_softmax(1)
    q, p = log_q.exp(), log_p.exp()
    u = _log_ratio(q, d, log_p - log_q)
    if divergence.direction == "forward":
        values, gradient = -_expect(q, u), p - q
    elif divergence.direction == "reverse":
        values = _expect(p, u)
        gradient = p * (u - values)
    else:
        # log p/m and log q/m with m = (p + q)/2; the clamp only acts where p or q is below e^-80
        log_p_m = -torch.log1p(0.5 * torch.expm1(-u.clamp(min=-80.0)))
        log_q_m = -torch.log1p(0.5 * torch.expm1(u.clamp(max=80.0)))
        kl_p_m = _expect(p, log_p_m)
        values = 0.5 * (kl_p_m + _expect(q, log_q_m))
        gradient = 0.5 * p * (log_p_m - kl_p_m)
    torch.mul(gradient, strength * weight.unsqueeze(1), out=out)
    nll, entropy = torch.zeros_like(weight), None
    if cross_entropy:
        rows = likelihood_rows_(z, y, statistics=statistics)
        nll, entropy = rows.cross_entropy, rows.entropy
        out.add_(z, alpha=cross_entropy)
    return Rows(weight * values.squeeze(1).clamp(min=0), nll, kept, entropy)


def _entropy(others: Tensor, nll: Tensor) -> Tensor:
    """Return −Σ p log p from the probabilities of all tokens but y, 0 at y, and from −log p(y), near 0 if y is sure."""
    terms: Tensor = torch.special.entr(others)
    return terms.sum(1) + (-nll).exp() * nll


def _is_top(z: Tensor, y: Tensor) -> Tensor:
    return z.argmax(1) == y.squeeze(1)


def _is_safe(d: Tensor) -> bool:
    low, high = torch.aminmax(d)
    return bool(high - low <= SAFE_RANGE)


def _log_ratio(q: Tensor, d: Tensor, fallback: Tensor) -> Tensor:
    """Return log p − log q from d where exp can hold it (exact for small d), else the difference of log-softmaxes."""
    centred = d - _expect(q, d)
    safe = centred.amax(1, keepdim=True) <= SAFE_RANGE
    r = _expect(q, torch.expm1(centred.clamp(max=SAFE_RANGE)))
    return torch.where(safe, centred - torch.log1p(r), fallback)


def _binary_kl(gap: Tensor, change: Tensor) -> Tensor:
    """Return the KL of two coins, the base's with log-odds `gap` and the student's with `gap + change`, centred."""
    yes, no = torch.sigmoid(gap), torch.sigmoid(-gap)
    return torch.log1p(yes * torch.expm1(no * change) + no * torch.expm1(-yes * change)).clamp(min=0)


def _expect(p: Tensor, x: Tensor) -> Tensor:
    return (p * x).sum(1, keepdim=True)


def rows_at_once(vocab: int, device: torch.device) -> int:
    """Return how many rows to treat together: on a CPU, as many as keep the temporaries of a row block in its cache."""
    return max(1, 2**18 // vocab) if device.type == "cpu" else 2**30
