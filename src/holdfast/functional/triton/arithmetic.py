"""Elementary functions that keep their digits near zero, from exp and log alone, for Triton kernels.

    curve(x) = e^x − 1 − x,     log1p(x),     log1p(x) − x,     σ(x),     softplus(x),     tanh(x)

The interpreter has no libdevice and a GPU's fast log is off by 1e-7 around 1, so what a small KL is made of is summed
as a short series. All in float32. Read `row_state` next, which is made of these.
"""

import triton
import triton.language as tl


@triton.jit
def curve_near_zero(x):
    """e^x − 1 − x by its series: relative error below 1e-7 for |x| <= 0.5."""
    tail = 1 + x * (1.0 / 5) * (1 + x * (1.0 / 6) * (1 + x * (1.0 / 7) * (1 + x * (1.0 / 8))))
    return 0.5 * x * x * (1 + x * (1.0 / 3) * (1 + x * 0.25 * tail))


@triton.jit
def curve(x):
    """e^x − 1 − x, and infinity where |x| > 40: the caller then takes another form (see `row_state.close_rows`)."""
    far = tl.where(tl.abs(x) <= 40.0, tl.exp(tl.minimum(x, 40.0)) - 1.0 - x, float("inf"))
    return tl.where(tl.abs(x) <= 0.5, curve_near_zero(x), far)


@triton.jit
def log1p_series(x):
    """The sum after the first term of log(1 + x) = 2 (s + s³/3 + s⁵/5 + ...), s = x / (2 + x)."""
    s = x / (2 + x)
    s2 = s * s
    return 2 * s * s2 * (1.0 / 3 + s2 * (1.0 / 5 + s2 * (1.0 / 7 + s2 * (1.0 / 9))))


@triton.jit
def log1p(x):
    """log(1 + x) for x > −1."""
    return tl.where(tl.abs(x) < 0.25, 2 * x / (2 + x) + log1p_series(x), tl.log(1 + x))


@triton.jit
def log1p_less_x(x):
    """log(1 + x) − x for |x| < 0.25, where it is about −x²/2: no difference of near numbers."""
    return log1p_series(x) - x * x / (2 + x)


@triton.jit
def sigmoid(x):
    """1 / (1 + e^−x), with relative accuracy in the lower tail too."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, e) / (1 + e)


@triton.jit
def softplus(x):
    """log(1 + e^x), with relative accuracy in the lower tail too."""
    return tl.maximum(x, 0.0) + log1p(tl.exp(-tl.abs(x)))


@triton.jit
def tanh(x):
    """tanh, relative accuracy near zero too."""
    y = -2 * tl.abs(x)
    m = y + tl.where(y >= -0.5, curve_near_zero(y), tl.exp(y) - 1.0 - y)
    return tl.where(x < 0, m, -m) / (2 + m)


@triton.jit
def cap_both(b, d, soft_cap):
    """Cap b and b + d by c·tanh(·/c); return both, the second as a change, and the second's derivative.

    tanh(x + δ) − tanh(x) = tanh(δ) (1 − tanh(x) tanh(x + δ)) keeps the digits of a small change.
    """
    t0, t1 = tanh(b / soft_cap), tanh((b + d) / soft_cap)
    e = tl.exp(-2 * tl.abs((b + d) / soft_cap))
    return soft_cap * t0, soft_cap * tanh(d / soft_cap) * (1 - t0 * t1), 4 * e / ((1 + e) * (1 + e))
