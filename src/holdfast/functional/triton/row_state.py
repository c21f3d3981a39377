"""What a kernel keeps of a row while the vocabulary streams by, and what it makes of it at the end.

Per row, over the tokens v that are not the target y, with b the base's logits, d = z − b, c a centre of d, x = d − c:

    top0 = max b,      total0 = Σ e^(b−top0),    moved = Σ e^(b−top0) x,     bent = Σ e^(b−top0) (e^x − 1 − x),
    top = max b + x,   total = Σ e^(b+x−top),    energy = Σ e^(b+x−top) (b+x−top),    earlier = top of the v < y,

one tile at a time, rescaled on the way. With r = E_q~[e^x − 1] = (moved + bent) / total0 the log-sum-exps differ by
c + log(1 + r), and the target-masked KL is log(1 + r) − E_q~[x] = bent/total0 + (log(1 + r) − r): a sum of
second-order terms, so that a KL of 1e-8 keeps its digits and d = 0 gives exactly 0, which t − L0 + L does not (it ends
at 2e-6). Where logits moved beyond what exp holds, `bent` is infinite and the row takes its log-sum-exp from (top,
total) instead; no row asks the host. The gradient

    g_v = a (p~_v − q~_v) + k q~_v   (v ≠ y),      g_y = −k

has the numbers (a, k) of `closed_form`, whose `divergence_rows_` and `likelihood_rows_` are the twins of this module.
The functions are on tiles [rows, columns]; both kernels use them.
"""

import triton
import triton.language as tl
from holdfast.functional.triton.arithmetic import curve, curve_near_zero, log1p, log1p_less_x, sigmoid, softplus


@triton.jit
def empty_state(ROWS: tl.constexpr):
    """The state before the first tile: top0, total0, moved, bent, top, total, energy, earlier."""
    zero = tl.zeros([ROWS], tl.float32)
    low = zero - 1e30  # finite on purpose, as FLOOR in `divergence`: −inf − (−inf) is not a number
    return low, zero, zero, zero, low, zero, zero, low


@triton.jit
def observe(b, d, centre, live, before, state, COMPARE: tl.constexpr, STATISTICS: tl.constexpr):
    """Add a tile of logits to the state.

    `live` leaves out the target and what lies past the vocabulary; `before` marks tokens of smaller number than y.
    """
    top0, total0, moved, bent, top, total, energy, earlier = state
    b = tl.where(live, b, -1e30)
    high0 = tl.maximum(top0, tl.max(b, 1))
    shrink0 = tl.exp(top0 - high0)
    e0 = tl.exp(b - high0[:, None])
    total0 = total0 * shrink0 + tl.sum(e0, 1)
    if COMPARE:
        x = tl.where(live, d - centre[:, None], 0.0)
        moved = moved * shrink0 + tl.sum(e0 * x, 1)
        bent = bent * shrink0 + tl.sum(e0 * curve(x), 1)
        z = b + x
        high = tl.maximum(top, tl.max(z, 1))
        shrink = tl.exp(top - high)
        e = tl.exp(z - high[:, None])
        sum_e = tl.sum(e, 1)
    else:
        z, high, shrink, e, sum_e = b, high0, shrink0, e0, tl.sum(e0, 1)
    if STATISTICS:
        # −200: e is 0 there, and 0 · −inf is not
        energy = shrink * (energy + total * (top - high)) + tl.sum(e * tl.maximum(z - high[:, None], -200.0), 1)
        earlier = tl.maximum(earlier, tl.max(tl.where(live & before, z, -1e30), 1))
    return high0, total0, moved, bent, high, total * shrink + sum_e, energy, earlier


@triton.jit
def merge(one, other):
    """Join the states of two parts of the vocabulary."""
    top0, total0, moved, bent, top, total, energy, earlier = one
    top0_, total0_, moved_, bent_, top_, total_, energy_, earlier_ = other
    high0, high = tl.maximum(top0, top0_), tl.maximum(top, top_)
    by0, by0_ = tl.exp(top0 - high0), tl.exp(top0_ - high0)
    by, by_ = tl.exp(top - high), tl.exp(top_ - high)
    energy = by * (energy + total * (top - high)) + by_ * (energy_ + total_ * (top_ - high))
    total0, total = total0 * by0 + total0_ * by0_, total * by + total_ * by_
    moved, bent = moved * by0 + moved_ * by0_, bent * by0 + bent_ * by0_
    return high0, total0, moved, bent, high, total, energy, tl.maximum(earlier, earlier_)


@triton.jit
def shift_and_kl(top0, total0, moved, bent, top, total):
    """The change of the log-sum-exp beyond the centre, and the target-masked KL."""
    mean = moved / total0
    curved = bent / total0
    r = mean + curved
    held = (curved < 1e30) & (r > -0.75)  # false also for NaN, which 0 · infinity leaves
    shift = tl.where(held, log1p(r), top - top0 + tl.log(total / total0))
    kl = tl.where(held & (tl.abs(r) < 0.25), curved + log1p_less_x(r), shift - mean)
    return shift, tl.where(kl < 0, 0.0, kl)  # maximum(NaN, 0) would be 0


@triton.jit
def coin_kl(gap, turn):
    """The KL of two coins, the base's with log-odds `gap` and the student's with `gap + turn`."""
    yes, no = sigmoid(gap), sigmoid(-gap)
    near = log1p(yes * curve(no * turn) + no * curve(-yes * turn))
    far = yes * (softplus(-gap - turn) - softplus(-gap)) + no * (softplus(gap + turn) - softplus(gap))
    return tl.where(tl.abs(turn) < 20.0, near, far)


@triton.jit
def target_gain(gap, turn):
    """p_base(y) − p(y), from the log-odds of the first and their change: no difference of numbers near 1."""
    near = -sigmoid(-gap - turn) * sigmoid(gap) * (turn + curve_near_zero(turn))
    far = tl.where(gap > 0, sigmoid(-gap - turn) - sigmoid(-gap), sigmoid(gap) - sigmoid(gap + turn))
    return tl.where(tl.abs(turn) < 0.5, near, far)


@triton.jit
def close_rows(
    state, centre, b_y, d_y, gamma, log_exclusion, strength, cross_entropy, MASKED: tl.constexpr, COMPARE: tl.constexpr
):
    """Turn finished states into the numbers of the gradient (lse0, change, a, k) and the values of the rows.

    `lse0` is the log-sum-exp of b, `change` its change to z. Values: divergence, nll, kept, entropy, top1.
    """
    top0, total0, moved, bent, top, total, energy, earlier = state
    gap0 = b_y - top0 - tl.log(total0)  # log p_base(y) / (1 − p_base(y))
    gap, change, z_y = gap0, tl.zeros_like(gap0), b_y
    a, k, divergence, kept = change, change, change, gap0 == gap0
    if COMPARE:
        shift, kl = shift_and_kl(top0, total0, moved, bent, top, total)
        change, z_y = centre + shift, b_y + (d_y - centre)
        turn = d_y - change  # of the gap, from base to student
        gap = gap0 + turn
        log_miss0 = -softplus(gap0)
        kept = log_miss0 >= log_exclusion
        weight = tl.where(kept, tl.exp(gamma * log_miss0), 0.0)
        a = strength * weight
        if not MASKED:
            kl = sigmoid(-gap0) * kl + coin_kl(gap0, turn)
            k = a * target_gain(gap0, turn)
            a = a * sigmoid(-gap)
        divergence = weight * kl
    miss, nll = sigmoid(-gap), softplus(-gap)
    a, k = a + cross_entropy * miss, k + cross_entropy * miss
    # first which of (y, not y), then which of the others
    entropy = (1 - miss) * nll + miss * (softplus(gap) + tl.log(total) - energy / total)
    top1 = (z_y >= top) & (z_y > earlier)  # the first of equals, as argmax
    return (top0 + tl.log(total0), change, a, k), (divergence, nll, kept, entropy, top1)


@triton.jit
def gradient(b, d, numbers, live, hit, COMPARE: tl.constexpr):
    """The gradient on a tile of logits; `hit` marks the target, what is neither live nor hit gets 0."""
    lse0, change, a, k = numbers
    log_q = b - lse0[:, None]
    q = tl.exp(log_q)
    g = k[:, None] * q
    if COMPARE:
        u = d - change[:, None]  # log p~ − log q~
        p_less_q = tl.where(tl.abs(u) < 0.5, q * (u + curve_near_zero(u)), tl.exp(log_q + u) - q)
        g += a[:, None] * p_less_q
    return tl.where(live, g, tl.where(hit, -k[:, None], 0.0))


@triton.jit
def store_values(divergence, nll, kept, entropy, top1, at, values, counts, where, STATISTICS: tl.constexpr):
    """Write the values of the rows `at`, 0 for those that do not count."""
    divergence_, nll_, kept_, entropy_, top1_ = values
    tl.store(divergence + at, tl.where(counts, divergence_, 0.0), mask=where)
    tl.store(nll + at, tl.where(counts, nll_, 0.0), mask=where)
    tl.store(kept + at, (counts & kept_).to(tl.int32), mask=where)
    if STATISTICS:
        tl.store(entropy + at, tl.where(counts, entropy_, 0.0), mask=where)
        tl.store(top1 + at, (counts & top1_).to(tl.int32), mask=where)
