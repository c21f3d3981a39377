"""Values and logit gradient of whole rows whose logits lie in memory: two visits of each row, no round trip between.

    visit 1: (b, d) -> state of the row -> (values, a, k)          visit 2: (b, d) -> g over b, in place

10 bytes of traffic per bfloat16 logit: two reads of both sides, one write. A program owns a row, so its statistics
stay in registers and nothing returns to the host; an ignored row gets value 0 and gradient 0 here. The second visit
runs backwards: the end of the row is still in the cache. Its twins are `closed_form.divergence_rows_` and
`likelihood_rows_`; the mathematics is in `row_state`. Read `rows` next, the host's side.
"""

import triton
import triton.language as tl
from holdfast.functional.triton.arithmetic import cap_both
from holdfast.functional.triton.row_state import close_rows, empty_state, gradient, observe, store_values


@triton.jit
def load_logits(
    base, moved, bias, at, column, readable, inside, scale, soft_cap,
    BIAS: tl.constexpr, CAP: tl.constexpr, COMPARE: tl.constexpr,
):  # fmt: skip
    """Read b and d [rows, columns] in float32 as the head gives them, and the cap's derivative (b where uncapped)."""
    b = tl.load(base + at, mask=readable, other=0.0).to(tl.float32)
    if COMPARE:
        d = tl.load(moved + at, mask=readable, other=0.0).to(tl.float32)
    else:
        d = tl.zeros_like(b)
    if BIAS:
        b += scale * tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    if CAP:
        b, d, slope = cap_both(b, d, soft_cap)
    else:
        slope = b
    return b, d, slope


@triton.jit
def row_kernel(
    base, moved, bias, targets, centres, divergence, nll, kept, entropy, top1,
    vocab, stride, ignore_index, scale, soft_cap, gamma, log_exclusion, strength, cross_entropy,
    BIAS: tl.constexpr, CAP: tl.constexpr, COMPARE: tl.constexpr, MASKED: tl.constexpr,
    STATISTICS: tl.constexpr, GRADIENT: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write the values `[rows]` and, with GRADIENT, the gradient over `base` `[rows, vocab]`.

    `moved` holds d = z − b in the layout of `base`; without COMPARE it is not read, and `base` holds z. Rows lie
    `stride` apart, a multiple of 16 at least as large as `vocab`: whole vectors are read and written up to there
    whatever the vocabulary, and what lies past it counts for nothing.
    """
    row = tl.program_id(0) + tl.arange(0, 1)  # a tile of one row: `row_state` works on tiles
    offset = row.to(tl.int64)[:, None] * stride  # rows x vocabulary can pass 2^31
    tiles = tl.cdiv(vocab, COLUMNS)
    target = tl.load(targets + tl.program_id(0))
    state = empty_state(1)
    if target != ignore_index:
        y = target + tl.zeros([1, 1], tl.int64)
        centre = tl.load(centres + row)
        for tile in range(0, tiles):
            column = (tile * COLUMNS + tl.arange(0, COLUMNS))[None, :]
            inside = column < vocab
            b, d, _ = load_logits(
                base, moved, bias, offset + column, column, column < stride, inside, scale, soft_cap, BIAS, CAP, COMPARE
            )
            state = observe(b, d, centre, inside & (column != y), column < y, state, COMPARE, STATISTICS)

        b_y, d_y, _ = load_logits(base, moved, bias, offset + y, y, y >= 0, y >= 0, scale, soft_cap, BIAS, CAP, COMPARE)
        numbers, values = close_rows(
            state,
            centre,
            tl.sum(b_y, 1),
            tl.sum(d_y, 1),
            gamma,
            log_exclusion,
            strength,
            cross_entropy,
            MASKED,
            COMPARE,
        )
        there = row >= 0
        store_values(divergence, nll, kept, entropy, top1, row, values, there, there, STATISTICS)

        if GRADIENT:
            for back in range(0, tiles):
                column = ((tiles - 1 - back) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
                inside = column < vocab
                b, d, slope = load_logits(
                    base, moved, bias, offset + column, column, column < stride, inside, scale, soft_cap,
                    BIAS, CAP, COMPARE,
                )  # fmt: skip
                g = gradient(b, d, numbers, inside & (column != y), column == y, COMPARE)
                if CAP:
                    g *= slope
                tl.store(base + offset + column, g.to(base.dtype.element_ty), mask=column < stride)
    else:
        zero = tl.zeros([1], tl.float32)
        none, there = row < 0, row >= 0
        store_values(divergence, nll, kept, entropy, top1, row, (zero, zero, none, zero, none), none, there, STATISTICS)
        if GRADIENT:
            for tile in range(0, tiles):
                column = (tile * COLUMNS + tl.arange(0, COLUMNS))[None, :]
                tl.store(base + offset + column, tl.zeros([1, COLUMNS], base.dtype.element_ty), mask=column < stride)
