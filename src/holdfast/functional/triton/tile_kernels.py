"""Both sides' logits in one visit of the head, tile by tile in registers: statistics, and the gradient of a chunk.

    for each tile of tokens:  b += h0[:, k] W[tile, k]ᵀ,   d += δ[:, k] W[tile, k]ᵀ   (k by k)   ->  observe(b, d)

δ = h − h0. Each piece of W is loaded once and multiplies h0 and δ, as if their rows were interleaved in one factor of
twice the height; two accumulators do it rather than one of interleaved rows, for then b and d of a logit lie in the
same thread and the epilogue moves nothing. They stay in float32 and never reach memory, so nothing of them is rounded.

`tile_statistics` gives each program a part of the vocabulary, `tile_combine` joins the parts, `tile_gradient`
computes a tile once more and writes its g for the product g W (see `tiles` for why). Programs that run side by side
take the same tile of W for different rows, so that W is read from the cache. Row tiles whose rows are all ignored
end at once. The mathematics, and what its twins are, is in `row_state`.
"""

import triton
import triton.language as tl
from holdfast.functional.triton.arithmetic import cap_both
from holdfast.functional.triton.row_state import close_rows, empty_state, gradient, merge, observe, store_values


@triton.jit
def as_factor(x, WIDEN: tl.constexpr):
    """Widen a factor to float32 where asked: the interpreter would multiply the bits of bfloat16 as whole numbers."""
    if WIDEN:
        x = x.to(tl.float32)
    return x


@triton.jit
def tile_logits(
    base, moved, weight, bias, row, column, counts, inside, hidden, scale, soft_cap,
    BIAS: tl.constexpr, CAP: tl.constexpr, COMPARE: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    WIDEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Multiply a tile of b and of d [ROWS, COLUMNS] and finish them as the head does; third, the cap's derivative."""
    b, d = tl.zeros([ROWS, COLUMNS], tl.float32), tl.zeros([ROWS, COLUMNS], tl.float32)
    step = tl.arange(0, DEPTH)
    rows_at = row.to(tl.int64)[:, None] * hidden + step[None, :]
    weight_at = weight + column.to(tl.int64)[:, None] * hidden + step[None, :]
    for k in range(0, hidden, DEPTH):
        row_mask, column_mask = counts[:, None], inside[:, None]
        if not EVEN:
            row_mask = row_mask & (k + step[None, :] < hidden)
            column_mask = column_mask & (k + step[None, :] < hidden)
        w = as_factor(tl.load(weight_at + k, mask=column_mask, other=0.0), WIDEN)
        h0 = as_factor(tl.load(base + rows_at + k, mask=row_mask, other=0.0), WIDEN)
        b = tl.dot(h0, tl.trans(w), b, input_precision=PRECISION)
        if COMPARE:
            change = as_factor(tl.load(moved + rows_at + k, mask=row_mask, other=0.0), WIDEN)
            d = tl.dot(change, tl.trans(w), d, input_precision=PRECISION)
    if BIAS:
        b += scale * tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    if CAP:
        b, d, slope = cap_both(b, d, soft_cap)
    else:
        slope = b
    return b, d, slope


@triton.jit
def tile_statistics(
    base, moved, weight, bias, targets, centres, states,
    rows, vocab, hidden, parts, ignore_index, scale, soft_cap,
    BIAS: tl.constexpr, CAP: tl.constexpr, COMPARE: tl.constexpr, STATISTICS: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Write each row's state over one part of the vocabulary: `states` `[10, parts, rows]`, the last two b_y, d_y."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(1)
    y = tl.load(targets + row, mask=row < rows, other=ignore_index)
    counts = y != ignore_index
    centre = tl.load(centres + row, mask=counts, other=0.0)
    state = empty_state(ROWS)
    b_y, d_y = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    tiles = tl.cdiv(vocab, COLUMNS)
    share = tl.cdiv(tiles, parts)
    if tl.max(counts.to(tl.int32), 0) > 0:
        for tile in range(part * share, tl.minimum(part * share + share, tiles)):
            column = tile * COLUMNS + tl.arange(0, COLUMNS)
            inside = column < vocab
            b, d, _ = tile_logits(
                base, moved, weight, bias, row, column, counts, inside, hidden, scale, soft_cap,
                BIAS, CAP, COMPARE, EVEN, PRECISION, WIDEN, ROWS, COLUMNS, DEPTH,
            )  # fmt: skip
            hit, before = column[None, :] == y[:, None], column[None, :] < y[:, None]
            b_y += tl.sum(tl.where(hit, b, 0.0), 1)
            d_y += tl.sum(tl.where(hit, d, 0.0), 1)
            live = inside[None, :] & (column[None, :] != y[:, None])
            state = observe(b, d, centre, live, before, state, COMPARE, STATISTICS)
    at, field = states + part * rows + row, parts * rows
    for number in tl.static_range(8):
        tl.store(at + number * field, state[number], mask=counts)
    tl.store(at + 8 * field, b_y, mask=counts)
    tl.store(at + 9 * field, d_y, mask=counts)


@triton.jit
def load_state(at, field, mask):
    """Read a state as `tile_statistics` leaves it; where masked, a state of zeros, with sums of 1 to divide by."""
    return (
        tl.load(at, mask=mask, other=0.0),
        tl.load(at + field, mask=mask, other=1.0),
        tl.load(at + 2 * field, mask=mask, other=0.0),
        tl.load(at + 3 * field, mask=mask, other=0.0),
        tl.load(at + 4 * field, mask=mask, other=0.0),
        tl.load(at + 5 * field, mask=mask, other=1.0),
        tl.load(at + 6 * field, mask=mask, other=0.0),
        tl.load(at + 7 * field, mask=mask, other=0.0),
    )


@triton.jit
def tile_combine(
    states, targets, centres, numbers, divergence, nll, kept, entropy, top1,
    rows, parts, ignore_index, gamma, log_exclusion, strength, cross_entropy,
    COMPARE: tl.constexpr, MASKED: tl.constexpr, STATISTICS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Join the parts; write the values `[rows]` and what the gradient needs: `numbers` `[4, rows]`, 0 where ignored."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exists = row < rows
    counts = tl.load(targets + row, mask=exists, other=ignore_index) != ignore_index
    state = empty_state(ROWS)
    b_y, d_y = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    field = parts * rows
    for part in range(0, parts):
        at = states + part * rows + row
        b_y += tl.load(at + 8 * field, mask=counts, other=0.0)
        d_y += tl.load(at + 9 * field, mask=counts, other=0.0)
        state = merge(state, load_state(at, field, counts))
    centre = tl.load(centres + row, mask=counts, other=0.0)
    found, values = close_rows(state, centre, b_y, d_y, gamma, log_exclusion, strength, cross_entropy, MASKED, COMPARE)
    store_values(divergence, nll, kept, entropy, top1, row, values, counts, exists, STATISTICS)
    for number in tl.static_range(4):
        tl.store(numbers + number * rows + row, tl.where(counts, found[number], 0.0), mask=exists)


@triton.jit
def tile_gradient(
    base, moved, weight, bias, targets, numbers, out,
    rows, vocab, hidden, stride, field, ignore_index, scale, soft_cap,
    BIAS: tl.constexpr, CAP: tl.constexpr, COMPARE: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    WIDEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Compute one tile of both logits anew and write its gradient to `out` `[rows, vocab]`, rows `stride` apart."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    y = tl.load(targets + row, mask=row < rows, other=ignore_index)
    counts, inside = y != ignore_index, column < vocab
    at = out + row.to(tl.int64)[:, None] * stride + column[None, :]
    writable = (row < rows)[:, None] & (column < stride)[None, :]
    if tl.max(counts.to(tl.int32), 0) > 0:
        b, d, slope = tile_logits(
            base, moved, weight, bias, row, column, counts, inside, hidden, scale, soft_cap,
            BIAS, CAP, COMPARE, EVEN, PRECISION, WIDEN, ROWS, COLUMNS, DEPTH,
        )  # fmt: skip
        found = (
            tl.load(numbers + row, mask=counts, other=0.0),
            tl.load(numbers + field + row, mask=counts, other=0.0),
            tl.load(numbers + 2 * field + row, mask=counts, other=0.0),
            tl.load(numbers + 3 * field + row, mask=counts, other=0.0),
        )
        there = counts[:, None] & inside[None, :]
        hit = there & (column[None, :] == y[:, None])
        g = gradient(b, d, found, there & (column[None, :] != y[:, None]), hit, COMPARE)
        if CAP:
            g *= slope
        tl.store(at, g.to(out.dtype.element_ty), mask=writable)
    else:
        tl.store(at, tl.zeros([ROWS, COLUMNS], out.dtype.element_ty), mask=writable)
