"""Launches of the kernels before a delta scan: what opens q, k and v, and what makes gates.

What opens a delta mixer, one pass over memory each: q, k and v out of the projection; decays and strengths of raw numbers.

q, k and v go through convolution, SiLU and unit length by head. A tile is some tokens of one head's channels, so a head's length
is a sum of the tile's row. The three tokens before a tile come as shifted tiles out of the cache, and backward makes each tile's
sums for the three tokens behind it once more, as the convolution's own kernels do. Offsets of tokens are 64 bits wide.

How strongly a head or a key channel forgets, g, has two forms: -e^A softplus(raw + bias), and floor sigmoid(e^A (raw + bias)),
which ends at a floor; how strongly a step writes, beta, is factor sigmoid(raw).
"""

# Triton reads a kernel's parameters from the call: they carry no types.
# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: ANN201, ANN202

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from amfm.kernels.causal_conv1d.triton_impl import add_taps, load_tap, reach
from amfm.kernels.common.inputs import stride_unit, token_stride
from amfm.kernels.common.silu import sigmoid, silu, silu_backward, softplus
from amfm.kernels.common.tiles import load_values, sum_first, sum_parts
from amfm.kernels.runtime.backend import INTERPRETED
from amfm.kernels.runtime.interpreter import count_programs

EPSILON = tl.constexpr(1e-6)


@triton.jit
def _columns(head, lane, C, SIZE: tl.constexpr, BLOCK_C: tl.constexpr):
    """Channels of a head; lanes beyond its size lie beyond all channels."""
    column = head * SIZE + lane
    if BLOCK_C != SIZE:
        column = tl.where(lane < SIZE, column, C)
    return column


@triton.jit
def _inputs(x, window, t, T, stride, stride_w, column, C, W: tl.constexpr, WINDOW: tl.constexpr):
    """x at tokens t, [BLOCK_T, BLOCK_C] float32; before the row the inputs of its window, or zeros."""
    values = load_values(x, t, T, stride, column, C)
    if WINDOW:
        values += load_values(window, t + (W - 1), W - 1, stride_w, column, C)
    return values


@triton.jit
def open_forward_kernel(
    x, weight, starts, window, y, scale, T, C, stride_x, stride_w,
    W: tl.constexpr, SIZE: tl.constexpr, STEPS: tl.constexpr, DOCUMENTS: tl.constexpr, WINDOW: tl.constexpr,
    LENGTH: tl.constexpr, UNIT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y [B, T, STEPS, C / SIZE / STEPS, SIZE]; one program per block of tokens and head, whose steps are neighbours in x.

    Tokens of x are `stride_x` * UNIT apart over all rows, and `starts` [B, T] says where their documents begin; `window`: the
    W - 1 inputs before each row, `stride_w` apart. With LENGTH heads have the length `scale`. Grid (B * token blocks, heads).
    """
    blocks = tl.cdiv(T, BLOCK_T)
    batch, head = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(1)
    t = tl.program_id(0) % blocks * BLOCK_T + tl.arange(0, BLOCK_T)
    lane = tl.arange(0, BLOCK_C)
    column = _columns(head, lane, C, SIZE, BLOCK_C)
    stride_x = stride_x * UNIT
    x_row, starts_row, before = x + batch * T * stride_x, starts, window
    if DOCUMENTS:
        starts_row = starts + batch * T
    if WINDOW:
        before = window + batch * (W - 1) * stride_w
    w0, w1 = load_tap(weight, 0, column, C, W), load_tap(weight, 1, column, C, W)
    w2, w3 = load_tap(weight, 2, column, C, W), load_tap(weight, 3, column, C, W)
    x0 = load_values(x_row, t, T, stride_x, column, C)
    x1 = _inputs(x_row, before, t - 1, T, stride_x, stride_w, column, C, W, WINDOW)
    x2 = _inputs(x_row, before, t - 2, T, stride_x, stride_w, column, C, W, WINDOW)
    x3 = _inputs(x_row, before, t - 3, T, stride_x, stride_w, column, C, W, WINDOW)
    none = tl.zeros((BLOCK_C,), tl.float32)
    out = silu(add_taps(x0, x1, x2, x3, w0, w1, w2, w3, none, starts_row, t, T, DOCUMENTS))
    if LENGTH:
        out = out * (scale * tl.rsqrt(tl.sum(out * out, axis=1) + EPSILON))[:, None]
    groups = C // SIZE // STEPS
    place = (head % STEPS * groups + head // STEPS) * SIZE
    where = y + (batch * T + t.to(tl.int64))[:, None] * C + (place + lane)[None, :]
    tl.store(where, out.to(y.dtype.element_ty), mask=(t < T)[:, None] & (lane < SIZE)[None, :])


@triton.jit
def _before_silu(d, total, scale, LENGTH: tl.constexpr):
    """From the gradient of an opened tile to that of the sums before SiLU, [BLOCK_T, BLOCK_C] float32."""
    share = sigmoid(total)
    if LENGTH:
        y = total * share
        r = tl.rsqrt(tl.sum(y * y, axis=1) + EPSILON)[:, None]
        along = tl.sum(d * y, axis=1)[:, None]
        d = scale * r * (d - y * (r * r * along))
    return silu_backward(d, total, share)


@triton.jit
def _shares(d, t, T, C, place, distance, SHARES: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr):
    """Gradients at tokens t of all heads that share this one, added in order, [BLOCK_T, BLOCK_C] float32."""
    total = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    for share in tl.static_range(SHARES):
        total += load_values(d + share * distance, t, T, C, place, C)
    return total


@triton.jit
def open_backward_kernel(
    x, weight, starts, window, d_y, d_x, d_window, partial, scale, distance,
    T, C, stride_x, stride_w, stride_dx, blocks_per_strip, strips,
    W: tl.constexpr, SIZE: tl.constexpr, STEPS: tl.constexpr, SHARES: tl.constexpr, DOCUMENTS: tl.constexpr,
    WINDOW: tl.constexpr, LENGTH: tl.constexpr, UNIT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """d_x where it lies in the projection's gradient, and a part of the taps' gradient for each strip, [B, strips, C * W].

    d_y [SHARES, B, T, STEPS, groups, SIZE], shares `distance` numbers apart. With WINDOW d_window too, laid out as the window,
    in a block of places before the row. Grid (B * strips, heads).
    """
    batch, strip = (tl.program_id(0) // strips).to(tl.int64), tl.program_id(0) % strips
    head, lane = tl.program_id(1), tl.arange(0, BLOCK_C)
    column = _columns(head, lane, C, SIZE, BLOCK_C)
    groups = C // SIZE // STEPS
    place = _columns(head % STEPS * groups + head // STEPS, lane, C, SIZE, BLOCK_C)
    stride_x, stride_dx, distance = stride_x * UNIT, stride_dx * UNIT, tl.cast(distance, tl.int64)
    x_row, d_row, starts_row, before = x + batch * T * stride_x, d_y + batch * T * C, starts, window
    if DOCUMENTS:
        starts_row = starts + batch * T
    if WINDOW:
        before = window + batch * (W - 1) * stride_w
    none = tl.zeros((BLOCK_C,), tl.float32)
    w0, w1 = load_tap(weight, 0, column, C, W), load_tap(weight, 1, column, C, W)
    w2, w3 = load_tap(weight, 2, column, C, W), load_tap(weight, 3, column, C, W)
    d_w0, d_w1 = tl.zeros((BLOCK_C,), tl.float32), tl.zeros((BLOCK_C,), tl.float32)
    d_w2, d_w3 = tl.zeros((BLOCK_C,), tl.float32), tl.zeros((BLOCK_C,), tl.float32)
    first = strip * blocks_per_strip
    end = tl.minimum(first + blocks_per_strip, tl.cdiv(T, BLOCK_T))
    if WINDOW:
        first = tl.where(strip == 0, -1, first)
    for block in range(first, end):
        t = block * BLOCK_T + tl.arange(0, BLOCK_T)
        back3 = _inputs(x_row, before, t - 3, T, stride_x, stride_w, column, C, W, WINDOW)
        back2 = _inputs(x_row, before, t - 2, T, stride_x, stride_w, column, C, W, WINDOW)
        back1 = _inputs(x_row, before, t - 1, T, stride_x, stride_w, column, C, W, WINDOW)
        here = _inputs(x_row, before, t, T, stride_x, stride_w, column, C, W, WINDOW)
        next1 = _inputs(x_row, before, t + 1, T, stride_x, stride_w, column, C, W, WINDOW)
        next2 = _inputs(x_row, before, t + 2, T, stride_x, stride_w, column, C, W, WINDOW)
        next3 = load_values(x_row, t + 3, T, stride_x, column, C)

        total = add_taps(here, back1, back2, back3, w0, w1, w2, w3, none, starts_row, t, T, DOCUMENTS)
        e = _before_silu(_shares(d_row, t, T, C, place, distance, SHARES, BLOCK_T, BLOCK_C), total, scale, LENGTH)
        dx = e * w0[None, :]
        d_w0 += tl.sum(e * here, axis=0)
        d_w1 += tl.sum(e * back1 * reach(starts_row, t, t - 1, T, DOCUMENTS), axis=0)
        d_w2 += tl.sum(e * back2 * reach(starts_row, t, t - 2, T, DOCUMENTS), axis=0)
        d_w3 += tl.sum(e * back3 * reach(starts_row, t, t - 3, T, DOCUMENTS), axis=0)
        total = add_taps(next1, here, back1, back2, w0, w1, w2, w3, none, starts_row, t + 1, T, DOCUMENTS)
        e = _before_silu(_shares(d_row, t + 1, T, C, place, distance, SHARES, BLOCK_T, BLOCK_C), total, scale, LENGTH)
        dx += e * w1[None, :] * reach(starts_row, t + 1, t, T, DOCUMENTS)
        total = add_taps(next2, next1, here, back1, w0, w1, w2, w3, none, starts_row, t + 2, T, DOCUMENTS)
        e = _before_silu(_shares(d_row, t + 2, T, C, place, distance, SHARES, BLOCK_T, BLOCK_C), total, scale, LENGTH)
        dx += e * w2[None, :] * reach(starts_row, t + 2, t, T, DOCUMENTS)
        total = add_taps(next3, next2, next1, here, w0, w1, w2, w3, none, starts_row, t + 3, T, DOCUMENTS)
        e = _before_silu(_shares(d_row, t + 3, T, C, place, distance, SHARES, BLOCK_T, BLOCK_C), total, scale, LENGTH)
        dx += e * w3[None, :] * reach(starts_row, t + 3, t, T, DOCUMENTS)
        where = d_x + (batch * T + t.to(tl.int64))[:, None] * stride_dx + column[None, :]
        tl.store(where, dx.to(d_x.dtype.element_ty), mask=((t >= 0) & (t < T))[:, None] & (column < C)[None, :])
        if WINDOW:
            at = t + (W - 1)
            where = d_window + (batch * (W - 1) + at)[:, None] * stride_w + column[None, :]
            inside = ((t < 0) & (at >= 0))[:, None] & (column < C)[None, :]
            tl.store(where, dx.to(d_window.dtype.element_ty), mask=inside)
    taps = partial + (batch * strips + strip) * W * C + column * W + (W - 1)
    tl.store(taps, d_w0, mask=column < C)
    tl.store(taps - 1, d_w1, mask=column < C)
    if W > 2:
        tl.store(taps - 2, d_w2, mask=column < C)
    if W > 3:
        tl.store(taps - 3, d_w3, mask=column < C)


@triton.jit
def _place(column, columns, SIZE: tl.constexpr, TURNED: tl.constexpr):
    """Where a channel's gate lies in its row: as in the projection, or TURNED the SIZE steps of a head outside the heads."""
    if TURNED:
        column = column % SIZE * (columns // SIZE) + column // SIZE
    return column


@triton.jit
def _load_gate(x, A_log, bias, row, column, inside, rows, columns, stride, FORM: tl.constexpr, SIZE: tl.constexpr):
    """Raw numbers with their bias, [BLOCK_R, BLOCK_C], and rates, [1, BLOCK_C]."""
    raw = tl.load(x + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    rate = tl.full((1, 1), 1.0, tl.float32)
    if FORM != "strength":
        raw += tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)
        rate = tl.exp(tl.load(A_log + column // SIZE, mask=column < columns, other=0.0).to(tl.float32))
    return raw, rate


@triton.jit
def gates_forward_kernel(
    x, A_log, bias, y, factor, rows, columns, stride_x,
    FORM: tl.constexpr, SIZE: tl.constexpr, TURNED: tl.constexpr, UNIT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y [rows, columns] float32 of x [rows, columns], whose rows are `stride_x` * UNIT apart; grid (row blocks, column blocks).

    A_log [columns / SIZE] and bias [columns] belong to the two forms of decays; `factor` is that of a strength, or the floor.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    inside = (row < rows) & (column < columns)
    raw, rate = _load_gate(x, A_log, bias, row, column, inside, rows, columns, stride_x * UNIT, FORM, SIZE)
    gate = -rate * softplus(raw) if FORM == "softplus" else factor * sigmoid(rate * raw)
    tl.store(y + row * columns + _place(column, columns, SIZE, TURNED), gate, mask=inside)


@triton.jit
def gates_backward_kernel(
    x, A_log, bias, d_y, d_x, partial, factor, rows, columns, stride_x, stride_dx,
    FORM: tl.constexpr, SIZE: tl.constexpr, TURNED: tl.constexpr, UNIT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """d_x where it lies in the projection's gradient, and of decays a part of d_bias and of what A_log has of each channel.

    Parts are [programs, 2, columns] float32. Grid (programs, column blocks); each program walks blocks of rows.
    """
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    of_bias, of_rate = tl.zeros((1, BLOCK_C), tl.float32), tl.zeros((1, BLOCK_C), tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(rows, BLOCK_R), tl.num_programs(0)):
        row = tl.cast(block, tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
        inside = (row < rows) & (column < columns)
        raw, rate = _load_gate(x, A_log, bias, row, column, inside, rows, columns, stride_x * UNIT, FORM, SIZE)
        where = d_y + row * columns + _place(column, columns, SIZE, TURNED)
        d = tl.load(where, mask=inside, other=0.0).to(tl.float32)
        if FORM == "softplus":
            of_rate += tl.sum(d * -rate * softplus(raw), axis=0)[None, :]
            d = d * -rate * sigmoid(raw)
        else:
            share = sigmoid(rate * raw)
            d = d * (factor * share * (1.0 - share)) * rate
            of_rate += tl.sum(d * raw, axis=0)[None, :]
        of_bias += tl.sum(d, axis=0)[None, :]
        tl.store(d_x + row * (stride_dx * UNIT) + column, d.to(d_x.dtype.element_ty), mask=inside)
    if FORM != "strength":
        part = partial + tl.program_id(0).to(tl.int64) * 2 * columns
        tl.store(part + column, of_bias, mask=column < columns)
        tl.store(part + columns + column, of_rate, mask=column < columns)


# Numbers of a tile and warps: 16 tokens of 128 channels forward; backward, with seven shifted tiles of inputs and four of
# gradients, 8, and twice the warps, or registers spill on sm_90.
OPEN, OPEN_BACK = ((4096, 4), (4096, 8)) if INTERPRETED else ((2048, 4), (1024, 8))


def _tile(size: int, numbers: int, warps: int) -> dict[str, int]:
    """Columns that hold `size`, a power of two, and as many tokens as a tile of `numbers` has then: 4, a window, at least."""
    columns = max(2, triton.next_power_of_2(size))
    return {"BLOCK_C": columns, "BLOCK_T": max(4, min(32, numbers // columns)), "num_warps": warps, "num_stages": 1}


def open_rows(
    x: Tensor, weight: Tensor, starts: Tensor | None, window: Tensor | None, size: int, steps: int, scale: float | None
) -> Tensor:
    """silu(conv(x)) of a slice x [B, T, C] of the projection -> [B, T, steps, C / size / steps, size].

    Weight [C, W], packed; window [B, W - 1, C], a slice of the windows of all parts; `scale`: the length of a head's vector, None
    for vectors as they are.
    """
    B, T, C = x.shape
    y = x.new_empty(B, T, steps, C // size // steps, size)
    stride = token_stride(x)
    unit, tile = stride_unit(stride), _tile(size, *OPEN)
    open_forward_kernel[(B * triton.cdiv(T, tile["BLOCK_T"]), C // size)](
        x, weight, starts, window, y, 1.0 if scale is None else scale, T, C, stride // unit, 0 if window is None else window.stride(1),
        W=weight.shape[1], SIZE=size, STEPS=steps, DOCUMENTS=starts is not None, WINDOW=window is not None,
        LENGTH=scale is not None, UNIT=unit, **tile,
    )  # fmt: skip
    return y


def open_rows_backward(
    d_y: Tensor, x: Tensor, weight: Tensor, starts: Tensor | None, window: Tensor | None, d_x: Tensor, d_weight: Tensor,
    d_window: Tensor | None, size: int, scale: float | None,
) -> None:  # fmt: skip
    """Write the gradients of `open_rows`, d_y [shares, B, T, steps, groups, size], packed, into slices as x, weight and window are."""
    (B, T, C), (shares, steps, W) = x.shape, (d_y.shape[0], d_y.shape[3], weight.shape[1])
    strides = token_stride(x), token_stride(d_x)
    unit, tile = stride_unit(*strides), _tile(size, *OPEN_BACK)
    blocks, heads = triton.cdiv(T, tile["BLOCK_T"]), C // size
    # Enough strips for four programs a multiprocessor, and no more: each writes a part.
    strips = max(1, min(blocks, triton.cdiv(count_programs(x.device, 4), B * heads)))
    per_strip = triton.cdiv(blocks, strips)
    strips = triton.cdiv(blocks, per_strip)
    partial = x.new_empty(B * strips, 1, W * C, dtype=torch.float32)
    open_backward_kernel[(B * strips, heads)](
        x, weight, starts, window, d_y, d_x, d_window, partial, 1.0 if scale is None else scale, d_y.stride(0), T, C,
        strides[0] // unit, 0 if window is None else window.stride(1), strides[1] // unit, per_strip, strips,
        W=W, SIZE=size, STEPS=steps, SHARES=shares, DOCUMENTS=starts is not None, WINDOW=window is not None,
        LENGTH=scale is not None, UNIT=unit, **tile,
    )  # fmt: skip
    sum_parts(partial, d_weight.view(1, -1))


def open_gates(
    x: Tensor, form: str, A_log: Tensor | None, bias: Tensor | None, factor: float, steps: int = 1
) -> Tensor:
    """Gates float32 [B, T, C] of a slice x [B, T, C] of a projection; those of `steps` steps per head [B, T, steps, heads]."""
    B, T, C = x.shape
    shape = (B, T, C) if steps == 1 else (B, T, steps, C // steps)
    y = x.new_empty(shape, dtype=torch.float32)
    stride, tile = token_stride(x), _gate_tile(C)
    unit = stride_unit(stride)
    gates_forward_kernel[(triton.cdiv(B * T, tile["BLOCK_R"]), triton.cdiv(C, tile["BLOCK_C"]))](
        x, A_log, bias, y, factor, B * T, C, stride // unit,
        FORM=form, SIZE=steps if A_log is None else C // len(A_log), TURNED=steps > 1, UNIT=unit, **tile,
    )  # fmt: skip
    return y


def open_gates_backward(
    d_y: Tensor,
    x: Tensor,
    form: str,
    A_log: Tensor | None,
    bias: Tensor | None,
    factor: float,
    d_x: Tensor,
    steps: int = 1,
) -> Tensor:
    """Write d_x, a slice as x is; returns [2, C] float32, gradients of the bias and what A_log has of each channel, if there are."""
    B, T, C = x.shape
    strides, tile = (token_stride(x), token_stride(d_x)), _gate_tile(C)
    unit, blocks = stride_unit(*strides), triton.cdiv(C, tile["BLOCK_C"])
    programs = max(1, min(triton.cdiv(B * T, tile["BLOCK_R"]), count_programs(x.device) // blocks))
    partial = None if A_log is None else d_y.new_empty(programs, 2, C)
    gates_backward_kernel[(programs, blocks)](
        x, A_log, bias, d_y, d_x, partial, factor, B * T, C, strides[0] // unit, strides[1] // unit,
        FORM=form, SIZE=steps if A_log is None else C // len(A_log), TURNED=steps > 1, UNIT=unit, **tile,
    )  # fmt: skip
    return d_y.new_empty(0) if partial is None else sum_first(partial, torch.float32)


def split_gates(sums: Tensor, A_log: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of A_log and of the bias, out of `open_gates_backward`'s result; None for each where there is no decay."""
    if A_log is None or bias is None:
        return None, None
    of_bias, of_rate = sums
    by_head = of_rate if len(of_rate) == len(A_log) else of_rate.view(len(A_log), -1).sum(1)
    return by_head.to(A_log.dtype), of_bias.to(bias.dtype)


def _gate_tile(columns: int) -> dict[str, int]:
    """A tile of 16 rows of up to 128 channels: 32 spill on sm_90."""
    return {"BLOCK_C": min(128, max(2, triton.next_power_of_2(columns))), "BLOCK_R": 16, "num_warps": 4}
