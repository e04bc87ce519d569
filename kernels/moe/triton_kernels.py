"""Products of rows sorted by expert, with the activation and its gradient in their epilogues.

Tiles of rows never span two experts. How many tiles each expert has is only known on the device, so the grid has an
upper bound of them; which expert a tile has and where it begins is listed once per layer (`counting_sort.list_tiles`), and
programs beyond the last tile end immediately.

Weights of choices are applied to the activation, which is usually narrower than the output, and rows of x are
gathered while they are loaded. No sums by atomics: each token's rows are added by one program in the order of
its choices.
"""

# Triton reads a kernel's parameters from the call: they carry no types.
# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: ANN201, ANN202

from __future__ import annotations

import triton
import triton.language as tl

from amfm.kernels.common.silu import (
    limit_gate,
    pass_limit,
    plain_backward,
    plain_unit,
    sigmoid,
    silu_backward,
    steep_silu,
)
from amfm.kernels.common.tiles import add_tile, halves


@triton.jit
def load_tile(tiles, tile):
    """Expert of a tile (the number of experts beyond the last tile), its first row, and the row after the expert's last."""
    expert, begin = tl.load(tiles + tile * 3), tl.load(tiles + tile * 3 + 1)
    return expert.to(tl.int64), begin.to(tl.int64), tl.load(tiles + tile * 3 + 2)


@triton.jit
def source_rows(sources, row, inside, GATHER: tl.constexpr):
    """Row of the input after each sorted row: what `sources` says, or the row itself. [BLOCK_M]."""
    if GATHER:
        return tl.load(sources + row, mask=inside, other=0).to(tl.int64)
    return row


@triton.jit
def _multiply(
    x, source, inside, weight, column, columns, weight_row, weight_column, inner,
    DOT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """x[source, :] times weight[column, :], summed over `inner`, in float32.

    [BLOCK_M, BLOCK_N]. Columns of the weight may have any strides, so that its transpose needs no copy.
    """
    result = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for begin in range(0, inner, BLOCK_K):
        lane = begin + tl.arange(0, BLOCK_K)
        x_tile = tl.load(
            x + source[:, None] * inner + lane[None, :], mask=inside[:, None] & (lane[None, :] < inner), other=0.0
        )
        w_tile = tl.load(
            weight + column[None, :] * weight_row + lane[:, None] * weight_column,
            mask=(column[None, :] < columns) & (lane[:, None] < inner),
            other=0.0,
        )
        result = tl.dot(x_tile.to(DOT), w_tile.to(DOT), result, input_precision="tf32x3")
    return result


@triton.jit
def _multiply_twice(
    x, source, inside, gate, up, column, columns, inner,
    DOT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """x[source, :] times gate[column, :] and times up[column, :]: x is loaded once for both."""
    first = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    second = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for begin in range(0, inner, BLOCK_K):
        lane = begin + tl.arange(0, BLOCK_K)
        x_tile = tl.load(
            x + source[:, None] * inner + lane[None, :], mask=inside[:, None] & (lane[None, :] < inner), other=0.0
        ).to(DOT)
        exists = (column[None, :] < columns) & (lane[:, None] < inner)
        place = column[None, :] * inner + lane[:, None]
        first = tl.dot(x_tile, tl.load(gate + place, mask=exists, other=0.0).to(DOT), first, input_precision="tf32x3")
        second = tl.dot(x_tile, tl.load(up + place, mask=exists, other=0.0).to(DOT), second, input_precision="tf32x3")
    return first, second


@triton.jit
def grouped_product_kernel(
    x, weight, y, sources, tiles, experts, columns, inner, weight_expert, weight_row, weight_column,
    GATHER: tl.constexpr, SCATTER: tl.constexpr, DOT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y [S, columns] = x[sorted rows] times each expert's weight [columns, inner] (any strides).

    With SCATTER results go to the rows that `sources` names, as with GATHER inputs come from them.

    Grid: tiles (an upper bound) times column blocks, column blocks innermost.
    """
    blocks = tl.cdiv(columns, BLOCK_N)
    expert, begin, end = load_tile(tiles, tl.program_id(0) // blocks)
    if expert < experts:
        row = begin + tl.arange(0, BLOCK_M)
        inside = row < end
        source = source_rows(sources, row, inside, GATHER)
        column = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
        result = _multiply(
            x, source, inside, weight + expert * weight_expert, column, columns, weight_row, weight_column, inner,
            DOT, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        place = source_rows(sources, row, inside, SCATTER)[:, None] * columns + column[None, :]
        tl.store(y + place, result.to(y.dtype.element_ty), mask=inside[:, None] & (column[None, :] < columns))


@triton.jit
def row_weights(weights, pairs, row, inside, WEIGHTED: tl.constexpr, BLOCK_M: tl.constexpr):
    """The choice's weight of each sorted row, 1 without weights."""
    if WEIGHTED:
        pair = tl.load(pairs + row, mask=inside, other=0)
        return tl.load(weights + pair, mask=inside, other=0.0).to(tl.float32)
    return tl.full((BLOCK_M,), 1.0, tl.float32)


@triton.jit
def up_kernel(
    x, up, hidden, active, weights, pairs, sources, tiles, experts, width, inner,
    SWIGLU: tl.constexpr, ALPHA: tl.constexpr, SHIFT: tl.constexpr, LIMIT: tl.constexpr,
    GATHER: tl.constexpr, WEIGHTED: tl.constexpr, DOT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """hidden [S, F] = x[sorted rows] up^T before the activation, and active [S, width] = weight * activation(hidden).

    F is 2 * width for gated units (gate, then up), which are SwiGLU by their constants, else width.

    Grid as in `grouped_product_kernel`. The hidden rows are kept for backward, the weighted activation goes
    into the next product.
    """
    blocks = tl.cdiv(width, BLOCK_N)
    expert, begin, end = load_tile(tiles, tl.program_id(0) // blocks)
    if expert < experts:
        row = begin + tl.arange(0, BLOCK_M)
        inside = row < end
        source = source_rows(sources, row, inside, GATHER)
        weight = row_weights(weights, pairs, row, inside, WEIGHTED, BLOCK_M)
        column = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
        stored = inside[:, None] & (column[None, :] < width)
        features = width * 2 if SWIGLU else width
        matrix = up + expert * features * inner
        place = row[:, None] * features + column[None, :]
        if SWIGLU:
            first, second = _multiply_twice(
                x, source, inside, matrix, matrix + width * inner, column, width, inner, DOT, BLOCK_M, BLOCK_N, BLOCK_K
            )
            tl.store(hidden + place + width, second.to(hidden.dtype.element_ty), mask=stored)
            gate, second = limit_gate(first, second, SHIFT, LIMIT)
            result = steep_silu(gate, ALPHA) * second
        else:
            first = _multiply(x, source, inside, matrix, column, width, inner, 1, inner, DOT, BLOCK_M, BLOCK_N, BLOCK_K)
            result = plain_unit(first, ALPHA)
        tl.store(hidden + place, first.to(hidden.dtype.element_ty), mask=stored)
        result = result * weight[:, None]
        tl.store(active + row[:, None] * width + column[None, :], result.to(active.dtype.element_ty), mask=stored)


@triton.jit
def open_part(
    v, hidden, d_hidden, active, weight, lane, column, inside, width, features,
    SWIGLU: tl.constexpr, ALPHA: tl.constexpr, SHIFT: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """Store the gradient of the hidden rows and the weighted activation at some columns; returns row sums of v * activation."""
    stored = inside[:, None] & (column[None, :] < width)
    place, at = lane * features + column[None, :], lane * width + column[None, :]
    first = tl.load(hidden + place, mask=stored, other=0.0).to(tl.float32)
    # Each result is stored before the next is made: together they would spill registers.
    if SWIGLU:
        up = tl.load(hidden + width + place, mask=stored, other=0.0).to(tl.float32)
        gate, second = limit_gate(first, up, SHIFT, LIMIT)
        share = sigmoid(ALPHA * gate)
        activation = gate * share
        result = activation * second
        partial = tl.sum(v * result, 1)
        tl.store(active + at, (result * weight).to(active.dtype.element_ty), mask=stored)
        v = v * weight
        d_up = pass_limit(v * activation, up, LIMIT, True)
        tl.store(d_hidden + width + place, d_up.to(d_hidden.dtype.element_ty), mask=stored)
        d_first = pass_limit(silu_backward(v * second, ALPHA * gate, share), first, LIMIT, False)
    else:
        result = plain_unit(first, ALPHA)
        partial = tl.sum(v * result, 1)
        tl.store(active + at, (result * weight).to(active.dtype.element_ty), mask=stored)
        d_first = plain_backward(v * weight, first, ALPHA)
    tl.store(d_hidden + place, d_first.to(d_hidden.dtype.element_ty), mask=stored)
    return partial


@triton.jit(do_not_specialize=["rows"])
def down_backward_kernel(
    d_y, down, hidden, d_hidden, active, weights, d_weights, pairs, sources, tiles, experts, rows, width, model,
    SWIGLU: tl.constexpr, ALPHA: tl.constexpr, SHIFT: tl.constexpr, LIMIT: tl.constexpr,
    GATHER: tl.constexpr, WEIGHTED: tl.constexpr, BY_ROW: tl.constexpr, DOT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """d_hidden [S, F], the weighted activation [S, width] again, and one partial of d_weights [blocks, S] a column block.

    Partials are by pair, with BY_ROW by sorted row.

    With v = d_y[sorted rows] down: d_weight is the row sum of v * activation, and weight * v goes through its gradient. That is
    done half a tile after the other, so that two programs find room in a multiprocessor's registers.
    """
    blocks = tl.cdiv(width, BLOCK_N)
    expert, begin, end = load_tile(tiles, tl.program_id(0) // blocks)
    if expert < experts:
        block = tl.program_id(0) % blocks
        row = begin + tl.arange(0, BLOCK_M)
        inside = row < end
        source = source_rows(sources, row, inside, GATHER)
        column = block * BLOCK_N + tl.arange(0, BLOCK_N)
        matrix = down + expert * model * width
        v = _multiply(d_y, source, inside, matrix, column, width, 1, width, model, DOT, BLOCK_M, BLOCK_N, BLOCK_K)
        features = width * 2 if SWIGLU else width
        # Wide scalars and narrow offsets: tiles of 64-bit addresses would spill registers.
        hidden, d_hidden, active = hidden + begin * features, d_hidden + begin * features, active + begin * width
        lane = tl.arange(0, BLOCK_M)[:, None]
        weight = row_weights(weights, pairs, row, inside, WEIGHTED, BLOCK_M)[:, None]
        left, right = halves(v)
        column = block * BLOCK_N + tl.arange(0, BLOCK_N // 2)
        partial = open_part(
            left, hidden, d_hidden, active, weight, lane, column, inside, width, features, SWIGLU, ALPHA, SHIFT, LIMIT
        )
        partial += open_part(
            right, hidden, d_hidden, active, weight, lane, column + BLOCK_N // 2, inside, width, features,
            SWIGLU, ALPHA, SHIFT, LIMIT,
        )  # fmt: skip
        if WEIGHTED:
            place = row if BY_ROW else tl.load(pairs + row, mask=inside, other=0)
            tl.store(d_weights + block.to(tl.int64) * rows + place, partial, mask=inside)


@triton.jit
def grouped_outer_kernel(
    left, right, result, sources, offsets, lefts, rights,
    GATHER_LEFT: tl.constexpr, GATHER_RIGHT: tl.constexpr, ADD: tl.constexpr, DOT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """result [E, lefts, rights] = left^T right over each expert's rows, zeros for an expert without rows; += with ADD.

    Grid: (left blocks, right blocks, E). The sum over an expert's rows stays in one program, so that no two
    write one element. What is added to is read after the last product (`add_tile`).
    """
    expert = tl.program_id(2).to(tl.int64)
    begin = tl.load(offsets + expert - 1, mask=expert > 0, other=0)
    end = tl.load(offsets + expert)
    left_lane = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    right_lane = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(begin, end, BLOCK_K):
        row = tl.cast(start, tl.int64) + tl.arange(0, BLOCK_K)
        inside = row < end
        left_row = source_rows(sources, row, inside, GATHER_LEFT)
        right_row = source_rows(sources, row, inside, GATHER_RIGHT)
        left_tile = tl.load(
            left + left_row[None, :] * lefts + left_lane[:, None],
            mask=inside[None, :] & (left_lane[:, None] < lefts),
            other=0.0,
        )
        right_tile = tl.load(
            right + right_row[:, None] * rights + right_lane[None, :],
            mask=inside[:, None] & (right_lane[None, :] < rights),
            other=0.0,
        )
        total = tl.dot(left_tile.to(DOT), right_tile.to(DOT), total, input_precision="tf32x3")
    if ADD:
        # A wide scalar and narrow offsets: a tile of 64-bit addresses would take twice the registers.
        corner = (expert * lefts + tl.program_id(0) * BLOCK_M) * rights + tl.program_id(1) * BLOCK_N
        left_over = lefts - tl.program_id(0) * BLOCK_M
        right_over = rights - tl.program_id(1) * BLOCK_N
        add_tile(result + corner, total, left_over, right_over, rights, BLOCK_M, BLOCK_N)
    else:
        place = (expert * lefts + left_lane[:, None]) * rights + right_lane[None, :]
        mask = (left_lane[:, None] < lefts) & (right_lane[None, :] < rights)
        tl.store(result + place, total.to(result.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tokens", "rows"])
def sum_choices_kernel(
    rows_SD, places, weights, y, tokens, rows, model, choices,
    WEIGHTED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y [R, D]: each token's K sorted rows added up in float32, by weight if there are weights, always in the same order.

    A place from `rows` on is that of a choice without a row, which adds nothing.
    """
    token = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (token[:, None] < tokens) & (column[None, :] < model)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for choice in range(choices):
        row = tl.load(places + token * choices + choice, mask=token < tokens, other=0).to(tl.int64)
        given = inside & (row[:, None] < rows)
        value = tl.load(rows_SD + row[:, None] * model + column[None, :], mask=given, other=0.0).to(tl.float32)
        if WEIGHTED:
            value *= tl.load(weights + token * choices + choice, mask=token < tokens, other=0.0).to(tl.float32)[:, None]
        total += value
    tl.store(y + token[:, None] * model + column[None, :], total.to(y.dtype.element_ty), mask=inside)
