"""q, k and v of a delta mixer out of the projection, one pass over memory: convolution, SiLU, and unit length by head.

A tile is some tokens of one head's channels, so a head's length is a sum of the tile's row. The three tokens before a tile come
as shifted tiles out of the cache, and backward makes each tile's sums for the three tokens behind it once more, as the
convolution's own kernels do. Offsets of tokens are 64 bits wide.
"""

# Triton reads a kernel's parameters from the call: they carry no types.
# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: ANN201, ANN202

from __future__ import annotations

import triton
import triton.language as tl

from amfm.kernels.causal_conv1d.triton_kernels import add_taps, load_tap, reach
from amfm.kernels.common.silu import sigmoid, silu, silu_backward
from amfm.kernels.common.tiles import load_values

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
