"""e4m3 in blocks of 128 in Triton: one pass that quantises rows and columns, one that quantises weights, and both products.

Rows of activations and gradients come in tiles of 128 that never span two experts (`moe/counting_sort.list_tiles`); without
experts they are one. Of a tile and 128 columns one program makes the codes along rows, for a product that sums over the width,
and those along columns, for one that sums over the tokens. Tensor cores take 8-bit operands packed along the sum, so the latter are
stored transposed, tile by tile [tiles, width, 128]: each tile begins aligned, however many rows the experts before it have.

Rounding is by integers: Triton 3.9's interpreter casts to e4m3 wrongly (ties upwards, carries lost). Tensor cores of Hopper keep
about 14 bits of a sum of 8-bit products (DeepSeek-V3, arXiv 2412.19437, section 3.3.2), so each 128 of a sum go to float32 on
their own, times the scales of both operands.
"""

# Triton reads a kernel's parameters from the call: they carry no types.
# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: ANN201

from __future__ import annotations

import triton
import triton.language as tl

from amfm.kernels.common.silu import limit_gate, plain_unit, steep_silu
from amfm.kernels.common.tiles import add_tile

RUN = tl.constexpr(128)


@triton.jit
def power_of_two_scale(largest):
    """`formats.power_of_two_scales`: the scale and its reciprocal."""
    exponent = tl.maximum(((largest.to(tl.int32, bitcast=True) + 0x1FFFFF) >> 23) - 8, 1)
    return (exponent << 23).to(tl.float32, bitcast=True), ((254 - exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def is_number(value):
    """Whether it is not a NaN, by its bits: of a comparison, compilers and NumPy make different things."""
    return (value.to(tl.int32, bitcast=True) & 0x7FFFFFFF) <= 0x7F800000


@triton.jit
def to_e4m3(value):
    """`formats.to_e4m3`, as uint8."""
    number = tl.where(is_number(value), value, 0.0)
    bits = tl.minimum(tl.maximum(number, -448.0), 448.0).to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - 960
    small = (size.to(tl.float32, bitcast=True) * 512.0 + 8388608.0).to(tl.int32, bitcast=True) & 0xFF
    codes = tl.where(size < 0x3C800000, small, normal) | ((bits >> 24) & 0x80)
    return tl.where(is_number(value), codes, 0x7F).to(tl.uint8)


@triton.jit
def from_e4m3(code):
    """The number of a code without a sign that is not NaN."""
    normal = ((code + 960) << 20).to(tl.float32, bitcast=True)
    return tl.where(code < 8, code.to(tl.float32) * 0.001953125, normal)


@triton.jit
def from_codes(code, scale):
    """The numbers of codes, int32, times their scales."""
    value = from_e4m3(code & 0x7F) * scale
    return tl.where((code & 0x7F) == 0x7F, float("nan"), tl.where(code >= 0x80, -value, value))


@triton.jit
def size_of(value):
    """Absolute numbers; a NaN counts for no scale."""
    return tl.where(is_number(value), tl.abs(value), 0.0)


@triton.jit
def tile_of(tiles, tile, rows, TILED: tl.constexpr):
    """Expert, first row, and the row after the last, of a tile; of rows that are all one expert's without tiles."""
    if TILED:
        return tl.load(tiles + tile * 3), tl.load(tiles + tile * 3 + 1).to(tl.int64), tl.load(tiles + tile * 3 + 2)
    return 0, tile.to(tl.int64) * 128, rows


@triton.jit
def activate(value, up, SWIGLU: tl.constexpr, ALPHA: tl.constexpr, SHIFT: tl.constexpr, LIMIT: tl.constexpr):
    """A gated unit of gate and up, else a plain one of the first; float32."""
    if SWIGLU:
        gate, up = limit_gate(value, up, SHIFT, LIMIT)
        value = steep_silu(gate, ALPHA) * up
    else:
        value = plain_unit(value, ALPHA)
    return value


@triton.jit
def store_row_codes(value, codes, scales, begin, lane, block, rows, width, is_row, inside):
    """Codes along rows of some rows `lane` of a tile and a block of 128 columns, and their scales. `begin`: the tile's first row."""
    scale, factor = power_of_two_scale(tl.max(size_of(value), 1))
    # A wide scalar and narrow offsets: a tile of 64-bit addresses would spill registers.
    place = lane[:, None] * width + (block * RUN + tl.arange(0, RUN))[None, :]
    tl.store(codes + begin * width + place, to_e4m3(value * factor[:, None]), mask=inside)
    tl.store(scales + block.to(tl.int64) * rows + begin + lane, scale, mask=is_row)


@triton.jit
def store_column_codes(value, codes, scales, tile, column, width, is_column):
    """Codes along some columns of a tile, transposed, and their scales."""
    scale, factor = power_of_two_scale(tl.max(size_of(value), 0))
    first = tile.to(tl.int64) * width
    place = column[:, None] * RUN + tl.arange(0, RUN)[None, :]
    tl.store(codes + first * RUN + place, tl.trans(to_e4m3(value * factor[None, :])), mask=is_column[:, None])
    tl.store(scales + first + column, scale, mask=is_column)


@triton.jit
def load_values(
    x, weights, pairs, sources, row, column, is_row, is_column, width,
    ACTIVATED: tl.constexpr, SWIGLU: tl.constexpr, ALPHA: tl.constexpr, SHIFT: tl.constexpr, LIMIT: tl.constexpr,
    WEIGHTED: tl.constexpr, GATHER: tl.constexpr,
):  # fmt: skip
    """The numbers of rows and columns that are quantised, float32, zeros outside; flags as `quantize_tiles_kernel` has them."""
    inside = is_row[:, None] & is_column[None, :]
    source = tl.load(sources + row, mask=is_row, other=0).to(tl.int64) if GATHER else row
    features = width * 2 if SWIGLU else width
    place = source[:, None] * features + column[None, :]
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    if SWIGLU:
        value = activate(
            value, tl.load(x + width + place, mask=inside, other=0.0).to(tl.float32), True, ALPHA, SHIFT, LIMIT
        )
        if SHIFT != 0.0:  # also of lanes without an owner
            value = tl.where(inside, value, 0.0)
    elif ACTIVATED:
        value = activate(value, value, False, ALPHA, SHIFT, LIMIT)
    if WEIGHTED:
        pair = tl.load(pairs + row, mask=is_row, other=0)
        value = value * tl.load(weights + pair, mask=is_row, other=0.0).to(tl.float32)[:, None]
    return value


@triton.jit(do_not_specialize=["rows"])
def quantize_tiles_kernel(
    x, weights, pairs, sources, tiles, row_codes, row_scales, column_codes, column_scales, experts, rows, width,
    ACTIVATED: tl.constexpr, SWIGLU: tl.constexpr, ALPHA: tl.constexpr, SHIFT: tl.constexpr, LIMIT: tl.constexpr,
    WEIGHTED: tl.constexpr, GATHER: tl.constexpr, TILED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Codes along rows [S, width] with scales [blocks, S], and along columns [tiles, width, 128] with scales [tiles, width].

    ACTIVATED: the numbers are activations of x, with SWIGLU a gated unit of [., 2 width], else a plain one. WEIGHTED: they are
    times the weight of their row's pair. GATHER: rows of x come from `sources`. Lanes after an expert's last row are zeros.
    Grid: tiles times blocks of 128 columns, these innermost.
    """
    blocks = tl.cdiv(width, RUN)
    tile, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    expert, begin, end = tile_of(tiles, tile, rows, TILED)
    if expert < experts:
        lane = tl.arange(0, RUN)
        row, column = begin + lane, block * RUN + lane
        is_row, is_column = row < end, column < width
        inside = is_row[:, None] & is_column[None, :]
        value = load_values(
            x, weights, pairs, sources, row, column, is_row, is_column, width,
            ACTIVATED, SWIGLU, ALPHA, SHIFT, LIMIT, WEIGHTED, GATHER,
        )  # fmt: skip
        if ROWS:
            store_row_codes(value, row_codes, row_scales, begin, lane, block, rows, width, is_row, inside)
        if COLUMNS:
            store_column_codes(value, column_codes, column_scales, tile, column, width, is_column)


@triton.jit(do_not_specialize=["rows"])
def pack_rows_kernel(x, packed, rows, width, bytes_a_row, BLOCK_M: tl.constexpr):
    """Rows [S, width] as codes and the e8m0 byte of each 128, [S, bytes_a_row] (packed_rows.py). Grid: (row blocks, runs)."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * RUN + tl.arange(0, RUN)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    first = row.to(tl.int64) * bytes_a_row
    value = tl.load(x + row.to(tl.int64)[:, None] * width + column[None, :], mask=inside, other=0.0).to(tl.float32)
    exponent = tl.maximum(((tl.max(size_of(value), 1).to(tl.int32, bitcast=True) + 0x1FFFFF) >> 23) - 8, 1)
    factor = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    tl.store(packed + first[:, None] + column[None, :], to_e4m3(value * factor[:, None]), mask=inside)
    tl.store(packed + first + width + tl.program_id(1), exponent.to(tl.uint8), mask=row < rows)


@triton.jit(do_not_specialize=["rows"])
def unpack_rows_kernel(packed, x, rows, width, bytes_a_row, BLOCK_M: tl.constexpr):
    """The numbers of packed sequences. Grid: (row blocks, runs)."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * RUN + tl.arange(0, RUN)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    first = row.to(tl.int64) * bytes_a_row
    code = tl.load(packed + first[:, None] + column[None, :], mask=inside, other=0).to(tl.int32)
    exponent = tl.load(packed + first + width + tl.program_id(1), mask=row < rows, other=1).to(tl.int32)
    value = from_codes(code, (exponent << 23).to(tl.float32, bitcast=True)[:, None])
    place = row.to(tl.int64)[:, None] * width + column[None, :]
    tl.store(x + place, value.to(x.dtype.element_ty), mask=inside)


@triton.jit
def quantize_weight_kernel(
    weight, codes, transposed, scales, transposed_scales, rows, columns, PLAIN: tl.constexpr, TRANSPOSED: tl.constexpr
):  # fmt: skip
    """Codes [E, rows, columns] of 128 x 128 blocks with scales [E, blocks, blocks], and the transposes of both.

    Grid: (blocks of rows, blocks of columns, E).
    """
    expert = tl.program_id(2).to(tl.int64)
    lane = tl.arange(0, RUN)
    row, column = tl.program_id(0) * RUN + lane, tl.program_id(1) * RUN + lane
    inside = (row[:, None] < rows) & (column[None, :] < columns)
    first = expert * rows * columns
    place = row[:, None] * columns + column[None, :]
    value = tl.load(weight + first + place, mask=inside, other=0.0).to(tl.float32)
    scale, factor = power_of_two_scale(tl.max(tl.max(size_of(value), 1), 0))
    code = to_e4m3(value * factor)
    down, across = tl.num_programs(0), tl.num_programs(1)
    if PLAIN:
        tl.store(codes + first + place, code, mask=inside)
        tl.store(scales + (expert * down + tl.program_id(0)) * across + tl.program_id(1), scale)
    if TRANSPOSED:
        place = column[:, None] * rows + row[None, :]
        tl.store(transposed + first + place, tl.trans(code), mask=tl.trans(inside))
        tl.store(transposed_scales + (expert * across + tl.program_id(1)) * down + tl.program_id(0), scale)


@triton.jit
def multiply_codes(
    left, left_scales, right, right_scales, row, is_row, column, is_column, rows, inner, BLOCK_N: tl.constexpr
):  # fmt: skip
    """Rows of codes times the transpose of columns' codes, [128, BLOCK_N] float32. The columns are in one block of scales."""
    lane = tl.arange(0, RUN)
    left_place = row[:, None] * inner + lane[None, :]
    right_place = column[None, :] * inner + lane[:, None]
    total = tl.zeros((RUN, BLOCK_N), tl.float32)
    for run in range(0, tl.cdiv(inner, RUN)):
        is_inner = lane < inner - run * RUN
        a = tl.load(left + left_place, mask=is_row[:, None] & is_inner[None, :], other=0.0)
        b = tl.load(right + right_place, mask=is_column[None, :] & is_inner[:, None], other=0.0)
        scale = tl.load(left_scales + tl.cast(run, tl.int64) * rows + row, mask=is_row, other=0.0)
        scale = scale * tl.load(right_scales + run)
        total += tl.dot(a, b, input_precision="tf32x3") * scale[:, None]
        left_place += RUN
        right_place += RUN
    return total


@triton.jit(do_not_specialize=["rows"])
def fp8_product_kernel(
    left, left_scales, right, right_scales, y, sources, tiles, experts, rows, columns, inner,
    TILED: tl.constexpr, SCATTER: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y [S, columns] = rows of codes [S, inner] times the transpose of their expert's codes [columns, inner].

    Scales as the two kernels above write them. SCATTER: results go to the rows that `sources` names. BLOCK_N divides 128, so that
    a program has one scale of the weight at a time. Grid: tiles times column blocks, column blocks innermost.
    """
    blocks = tl.cdiv(columns, BLOCK_N)
    expert, begin, end = tile_of(tiles, tl.program_id(0) // blocks, rows, TILED)
    if expert < experts:
        row = begin + tl.arange(0, RUN)
        is_row = row < end
        first = tl.program_id(0) % blocks * BLOCK_N
        column = first + tl.arange(0, BLOCK_N)
        matrix = tl.cast(expert, tl.int64)
        right += matrix * columns * inner
        right_scales += (matrix * tl.cdiv(columns, RUN) + first // RUN) * tl.cdiv(inner, RUN)
        total = multiply_codes(
            left, left_scales, right, right_scales, row, is_row, column, column < columns, rows, inner, BLOCK_N
        )
        target = tl.load(sources + row, mask=is_row, other=0).to(tl.int64) if SCATTER else row
        place = target[:, None] * columns + column[None, :]
        tl.store(y + place, total.to(y.dtype.element_ty), mask=is_row[:, None] & (column[None, :] < columns))


@triton.jit
def expert_tiles(offsets, expert, experts, rows, EXPERTS: tl.constexpr, TILED: tl.constexpr):
    """The first of an expert's tiles and the one after its last: those of the experts before it precede them."""
    if TILED:
        each = tl.arange(0, EXPERTS)
        ends = tl.load(offsets + each, mask=each < experts, other=0)
        begins = tl.load(offsets + each - 1, mask=(each > 0) & (each < experts), other=0)
        needed = tl.where(each < experts, (ends - begins + RUN - 1) // RUN, 0)
        first = tl.sum(tl.where(each < expert, needed, 0), 0)
        return first, first + tl.sum(tl.where(each == expert, needed, 0), 0)
    else:  # the compiler would read on behind the return
        return 0, tl.cdiv(rows, RUN)


@triton.jit(do_not_specialize=["rows"])
def fp8_outer_kernel(
    left, left_scales, right, right_scales, result, offsets, experts, rows, lefts, rights,
    EXPERTS: tl.constexpr, TILED: tl.constexpr, ADD: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """result [E, lefts, rights] = left^T right over each expert's rows, zeros for an expert without rows; += with ADD.

    Both come as codes along columns, [tiles, lefts or rights, 128]; an expert's tiles follow those of the experts before it.
    Grid: (left blocks of 128, right blocks of BLOCK_N, E).
    """
    expert = tl.program_id(2).to(tl.int64)
    first, last = expert_tiles(offsets, expert, experts, rows, EXPERTS, TILED)
    lane = tl.arange(0, RUN)
    row, column = tl.program_id(0) * RUN + lane, tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    left_place = row[:, None] * RUN + lane[None, :]
    right_place = column[None, :] * RUN + lane[:, None]
    total = tl.zeros((RUN, BLOCK_N), tl.float32)
    for tile in range(first, last):
        at = tl.cast(tile, tl.int64)
        a = tl.load(left + at * lefts * RUN + left_place, mask=row[:, None] < lefts, other=0.0)
        b = tl.load(right + at * rights * RUN + right_place, mask=column[None, :] < rights, other=0.0)
        left_scale = tl.load(left_scales + at * lefts + row, mask=row < lefts, other=0.0)
        right_scale = tl.load(right_scales + at * rights + column, mask=column < rights, other=0.0)
        total += tl.dot(a, b, input_precision="tf32x3") * left_scale[:, None] * right_scale[None, :]
    if ADD:
        # A wide scalar and narrow offsets: a tile of 64-bit addresses would take twice the registers.
        corner = (expert * lefts + tl.program_id(0) * RUN) * rights + tl.program_id(1) * BLOCK_N
        left_over = lefts - tl.program_id(0) * RUN
        add_tile(result + corner, total, left_over, rights - tl.program_id(1) * BLOCK_N, rights, RUN, BLOCK_N)
    else:
        place = (expert * lefts + row[:, None]) * rights + column[None, :]
        mask = (row[:, None] < lefts) & (column[None, :] < rights)
        tl.store(result + place, total.to(result.dtype.element_ty), mask=mask)
