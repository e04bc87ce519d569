"""mxfp8 and nvfp4 in Triton: the pass that quantises, and the products of experts, by block scales in Blackwell's tensor cores.

As for fp8_block (triton_kernels.py), a program takes a tile of 128 rows that spans no two experts, and makes codes along rows and along
columns. What differs is where scales are: a byte for each run of 32 or 16 numbers, in the order in which tensor cores take them and
torch's `scaled_mm` wants them. 128 rows times four runs are 512 bytes: that of row m and run s is number (m % 32) 16 + (m / 32) 4 + s, and
such pieces are along the sum first (NVIDIA's cuBLAS documentation, "1D block scaling factors layout"). Codes along columns are
one matrix [width, 128 tiles], so an expert's part of it begins at a whole piece, wherever its rows begin. Two e2m1 codes share a byte.

nvfp4 needs what a tile does not show: the largest number of an expert's matrix, as it is and turned by Hadamard matrices along the
tokens, and a sum of its bits, from which random rounding is drawn. A pass before finds these by atomic additions and maxima of
integers, whose order changes nothing.
"""

# Triton reads a kernel's parameters from the call: they carry no types.
# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: ANN201, ANN202

from __future__ import annotations

import triton
import triton.language as tl

from amfm.kernels.low_precision.triton_kernels import (
    from_e4m3,
    is_number,
    load_values,
    size_of,
    tile_of,
    to_e4m3,
)

TILE = tl.constexpr(128)
PIECE = tl.constexpr(512)  # bytes of scales of 128 rows and four runs
LARGEST = tl.constexpr(2688.0)  # 448 * 6, what two scales and a code of nvfp4 reach
SMALLEST = tl.constexpr(2.0**-126)
# What measure_kernel finds of each expert, in rows of E words.
WHOLE, TURNED_WHOLE, SALT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _mix(word):
    """`formats._mix` of unsigned 32 bits."""
    word = (word ^ (word >> 16)) * 0x85EBCA6B
    word = (word ^ (word >> 13)) * 0xC2B2AE35
    return word ^ (word >> 16)


@triton.jit
def _sums_and_differences(value, DISTANCE: tl.constexpr, BLOCK: tl.constexpr):
    """Sums and differences of rows that are DISTANCE apart, in their places."""
    pairs = tl.permute(tl.reshape(value, (TILE // (2 * DISTANCE), 2, DISTANCE * BLOCK)), (0, 2, 1))
    first, second = tl.split(pairs)
    return tl.reshape(tl.permute(tl.join(first + second, first - second), (0, 2, 1)), (TILE, BLOCK))


@triton.jit
def _turn(value, seed, BLOCK: tl.constexpr):
    """`formats.turn` of each 16 rows of a tile."""
    lane = tl.arange(0, TILE)
    odd = _mix((lane % 16).to(tl.uint32) + seed.to(tl.uint32)) & 1
    value = tl.where((odd == 1)[:, None], value, -value)
    value = _sums_and_differences(value, 1, BLOCK)
    value = _sums_and_differences(value, 2, BLOCK)
    value = _sums_and_differences(value, 4, BLOCK)
    return _sums_and_differences(value, 8, BLOCK) * 0.25


@triton.jit
def _largest_finite(value):
    """The bits of the largest size of a tile, of what is finite."""
    bits = value.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.max(tl.max(tl.where(bits < 0x7F800000, bits, 0), 1), 0)


@triton.jit
def whole_scale(measured, index):
    """The factor of a whole matrix, from the bits of its largest number."""
    return tl.maximum(tl.div_rn(tl.load(measured + index).to(tl.float32, bitcast=True), LARGEST), SMALLEST)


@triton.jit
def _words(row, column, width):
    """The place of each number in its matrix, modulo 2^32."""
    return row.to(tl.uint32)[:, None] * width.to(tl.uint32) + column.to(tl.uint32)[None, :]


@triton.jit
def _first_row(offsets, expert, TILED: tl.constexpr):
    """Where an expert's rows begin."""
    if TILED:
        return tl.load(offsets + expert - 1, mask=expert > 0, other=0)
    return 0


@triton.jit(do_not_specialize=["rows", "seed"])
def measure_kernel(
    x, weights, pairs, sources, tiles, offsets, measured, experts, rows, width, seed,
    ACTIVATED: tl.constexpr, SWIGLU: tl.constexpr, ALPHA: tl.constexpr, SHIFT: tl.constexpr, LIMIT: tl.constexpr,
    WEIGHTED: tl.constexpr, GATHER: tl.constexpr, TILED: tl.constexpr, TURN: tl.constexpr, RANDOM: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """measured [3, E] int32, zeros before: bits of the largest number, of the largest turned one, and the sum of mixed bits.

    Flags as `quantize_scaled_kernel` has them. Grid: (tiles times blocks of columns, matrices without tiles).
    """
    blocks = tl.cdiv(width, BLOCK)
    expert, begin, end = tile_of(tiles, tl.program_id(0) // blocks, rows, TILED)
    if not TILED:
        expert = tl.program_id(1)
    if expert < experts:
        lane = tl.arange(0, TILE)
        row, column = begin + lane, tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
        if not TILED:
            x += expert.to(tl.int64) * rows * width
        value = load_values(
            x, weights, pairs, sources, row, column, row < end, column < width, width,
            ACTIVATED, SWIGLU, ALPHA, SHIFT, LIMIT, WEIGHTED, GATHER,
        )  # fmt: skip
        tl.atomic_max(measured + WHOLE * experts + expert, _largest_finite(value))
        if RANDOM:
            bits = value.to(tl.uint32, bitcast=True)
            words = _mix(
                bits ^ _mix(_words(row - _first_row(offsets, expert, TILED), column, width) + seed.to(tl.uint32))
            )
            words = tl.where((bits & 0x7FFFFFFF) != 0, words, 0).to(tl.int32, bitcast=True)
            tl.atomic_add(measured + SALT * experts + expert, tl.sum(tl.sum(words, 1), 0))
        if TURN:
            tl.atomic_max(measured + TURNED_WHOLE * experts + expert, _largest_finite(_turn(value, seed, BLOCK)))


@triton.jit
def _to_e2m1(value, noise, RANDOM: tl.constexpr):
    """`formats.to_e2m1`, as int32."""
    size = tl.minimum(tl.where(is_number(value), tl.abs(value), 6.0), 6.0)
    steps = size * tl.where(size < 4.0, tl.where(size < 2.0, 2.0, 1.0), 0.5)
    step = (steps + noise).to(tl.int32) if RANDOM else (steps + 8388608.0).to(tl.int32, bitcast=True) & 0xFF
    step += tl.where(size >= 2.0, 2, 0) + tl.where(size >= 4.0, 2, 0)
    return step | ((value.to(tl.int32, bitcast=True) >> 28) & 8)


@triton.jit
def _scales_fp8(largest):
    """The e8m0 byte of a block as int32, and what its numbers are multiplied with."""
    exponent = tl.maximum(((largest.to(tl.int32, bitcast=True) + 0x1FFFFF) >> 23) - 8, 1)
    return exponent, ((254 - exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _scales_fp4(largest, whole, RANDOM: tl.constexpr):
    """The e4m3 byte of a block as int32, and what its numbers are divided by."""
    is_finite = largest < float("inf")
    wanted = tl.div_rn(tl.div_rn(tl.where(is_finite, largest, 0.0), 6.0), whole)
    code = to_e4m3(wanted).to(tl.int32)
    if RANDOM:
        code = tl.where(from_e4m3(code) < wanted, tl.minimum(code, 125) + 1, code)
    return code, from_e4m3(code) * whole


@triton.jit
def _spread(numbers, RUN: tl.constexpr, AXIS: tl.constexpr):
    """A number for each run, for all numbers of the run along an axis."""
    first: tl.constexpr = numbers.shape[0]
    second: tl.constexpr = numbers.shape[1]
    if AXIS == 0:
        return tl.reshape(tl.broadcast_to(numbers[:, None, :], (first, RUN, second)), (first * RUN, second))
    else:  # the compiler would read on behind the return
        return tl.reshape(tl.broadcast_to(numbers[:, :, None], (first, second, RUN)), (first, second * RUN))


@triton.jit
def _runs(value, RUN: tl.constexpr, AXIS: tl.constexpr):
    """The largest number of each run along an axis."""
    first: tl.constexpr = value.shape[0]
    second: tl.constexpr = value.shape[1]
    if AXIS == 0:
        return tl.max(tl.reshape(value, (first // RUN, RUN, second)), 1)
    else:  # the compiler would read on behind the return
        return tl.max(tl.reshape(value, (first, second // RUN, RUN)), 2)


@triton.jit
def _scales_place(row, run, row_block, pieces):
    """Where the scales of rows of one block of 128 and of runs are."""
    inner = (row % 32) * 16 + (row % 128) // 32 * 4
    outer = (row_block * pieces + run // 4) * PIECE + run % 4
    return inner, outer


@triton.jit
def _quantize(
    value,
    whole,
    noise,
    RUN: tl.constexpr,
    AXIS: tl.constexpr,
    FP4: tl.constexpr,
    SQUARE: tl.constexpr,
    RANDOM: tl.constexpr,
):
    """Codes of a tile along an axis, int32, a nibble each with FP4, and scales, a byte for each run, uint8."""
    size = size_of(value)
    largest = _runs(size, RUN, AXIS)
    if SQUARE:
        largest = _spread(_runs(largest, RUN, 1 - AXIS), RUN, 1 - AXIS)
    if FP4:
        scale, divisor = _scales_fp4(largest, whole, RANDOM)
        # A whole block's scale is NaN where one of its numbers is not finite: e2m1 has no code for it.
        faults = tl.where((value.to(tl.int32, bitcast=True) & 0x7F800000) == 0x7F800000, 1, 0)
        faults = _runs(faults, RUN, AXIS)
        if SQUARE:
            faults = _spread(_runs(faults, RUN, 1 - AXIS), RUN, 1 - AXIS)
        scale = tl.where(faults > 0, 0x7F, scale)
        divisor = _spread(divisor, RUN, AXIS)
        number = tl.where(divisor > 0.0, tl.div_rn(value, tl.where(divisor > 0.0, divisor, 1.0)), 0.0)
        return _to_e2m1(number, noise, RANDOM), scale.to(tl.uint8)
    else:  # the compiler would read on behind the return
        scale, factor = _scales_fp8(largest)
        return to_e4m3(value * _spread(factor, RUN, AXIS)).to(tl.int32), scale.to(tl.uint8)


@triton.jit
def _pack(codes):
    """Pairs of nibbles along columns as bytes, the first one low."""
    rows: tl.constexpr = codes.shape[0]
    columns: tl.constexpr = codes.shape[1]
    low, high = tl.split(tl.reshape(codes, (rows, columns // 2, 2)))
    return low | (high << 4)


@triton.jit(do_not_specialize=["rows", "seed", "column_stride", "column_pieces"])
def quantize_scaled_kernel(
    x, weights, pairs, sources, tiles, offsets, measured, row_codes, row_scales, column_codes, column_scales,
    experts, rows, width, column_stride, column_pieces, seed,
    ACTIVATED: tl.constexpr, SWIGLU: tl.constexpr, ALPHA: tl.constexpr, SHIFT: tl.constexpr, LIMIT: tl.constexpr,
    WEIGHTED: tl.constexpr, GATHER: tl.constexpr, TILED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RUN: tl.constexpr, FP4: tl.constexpr, SQUARE: tl.constexpr,
    RANDOM: tl.constexpr, TURN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Codes along rows [S, width], of FP4 two a byte, and along columns [width, column_stride], with scales as above.

    ACTIVATED to GATHER: as `quantize_tiles_kernel`. SQUARE: a scale for each RUN x RUN, and both directions keep what a tile holds.
    RANDOM: round at random. TURN: turn columns. Without tiles the second axis of the grid counts matrices [rows, width].
    BLOCK divides 4 RUN. Grid: (tiles times blocks of columns, matrices).
    """
    blocks = tl.cdiv(width, 4 * RUN) * (4 * RUN // BLOCK)  # whole pieces of scales
    tile, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    expert, begin, end = tile_of(tiles, tile, rows, TILED)
    matrix = tl.program_id(1).to(tl.int64)
    if not TILED:
        expert = tl.program_id(1)
    if expert < experts:
        lane = tl.arange(0, TILE)
        row, column = begin + lane, block * BLOCK + tl.arange(0, BLOCK)
        is_row, is_column = row < end, column < width
        x += matrix * rows * width
        value = load_values(
            x, weights, pairs, sources, row, column, is_row, is_column, width,
            ACTIVATED, SWIGLU, ALPHA, SHIFT, LIMIT, WEIGHTED, GATHER,
        )  # fmt: skip
        PACKED: tl.constexpr = 2 if FP4 else 1
        noise = 0.0
        whole = 1.0
        words = tl.zeros((1, 1), tl.uint32)
        if RANDOM:
            words = _words(row - _first_row(offsets, expert, TILED), column, width)
            salt = tl.load(measured + SALT * experts + expert).to(tl.uint32, bitcast=True) + seed.to(tl.uint32)
            words = _mix(words ^ salt) + seed.to(tl.uint32)
        if ROWS:
            if FP4:
                whole = whole_scale(measured, WHOLE * experts + expert)
            if RANDOM:
                noise = (_mix(words + 1) >> 12).to(tl.float32) * 9.5367431640625e-07
            codes, scales = _quantize(value, whole, noise, RUN, 1, FP4, SQUARE, RANDOM)
            if FP4:
                codes = _pack(codes)
            # A wide scalar and narrow offsets: a tile of 64-bit addresses would spill registers.
            byte = block * (BLOCK // PACKED) + tl.arange(0, BLOCK // PACKED)
            place = lane[:, None] * (width // PACKED) + byte[None, :]
            first = (matrix * rows + begin) * (width // PACKED)
            tl.store(
                row_codes + first + place, codes.to(tl.uint8), mask=is_row[:, None] & (byte < width // PACKED)[None, :]
            )
            pieces = tl.cdiv(width, RUN * 4)
            run = block * (BLOCK // RUN) + tl.arange(0, BLOCK // RUN)
            inner, outer = _scales_place(lane, run, 0, pieces)
            first = (matrix * tl.cdiv(rows, TILE) + tile) * pieces * PIECE
            tl.store(row_scales + first + inner[:, None] + outer[None, :], scales, mask=(run < pieces * 4)[None, :])
        if COLUMNS:
            if FP4:
                whole = whole_scale(measured, (TURNED_WHOLE if TURN else WHOLE) * experts + expert)
            if RANDOM:
                noise = (_mix(words + 2) >> 12).to(tl.float32) * 9.5367431640625e-07
            if TURN:
                value = _turn(value, seed, BLOCK)
            codes, scales = _quantize(value, whole, noise, RUN, 0, FP4, SQUARE, RANDOM)
            codes = tl.trans(codes)
            if FP4:
                codes = _pack(codes)
            byte = tile * (TILE // PACKED) + tl.arange(0, TILE // PACKED)
            place = column.to(tl.int64)[:, None] * column_stride + byte[None, :]
            mask = is_column[:, None] & (byte < column_stride)[None, :]
            tl.store(column_codes + matrix * width * column_stride + place, codes.to(tl.uint8), mask=mask)
            run = tile * (TILE // RUN) + tl.arange(0, TILE // RUN)
            first = matrix * tl.cdiv(width, TILE) * column_pieces * PIECE
            inner, outer = _scales_place(column, run, block * BLOCK // TILE, column_pieces)
            place = first + inner[None, :] + outer.to(tl.int64)[:, None]
            tl.store(column_scales + place, scales, mask=(run < column_pieces * 4)[:, None])
