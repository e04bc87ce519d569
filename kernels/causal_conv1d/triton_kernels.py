"""The short convolution as Triton kernels: every tile of x and dy is read once, taps and gradients stay on chip.

Widths below 4 run as width 4 with zero weights for the taps they lack.

Tiles are [tokens, channels] with channels along neighbouring threads, so that loads are packed. The three
tokens before a tile (and in backward after it) are loaded as shifted tiles, which the cache serves; sums are
float32.
"""

# Triton reads a kernel's parameters from the call: they carry no types.
# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: ANN201, ANN202

from __future__ import annotations

import triton
import triton.language as tl

from amfm.kernels.common.silu import sigmoid, silu, silu_backward
from amfm.kernels.common.tiles import load_values


@triton.jit
def load_tap(weight, shift: tl.constexpr, column, C, W: tl.constexpr):
    """The weight that meets the input `shift` tokens back: column W - 1 - shift, zero if there is none.

    [BLOCK_C] float32.
    """
    return tl.load(weight + column * W + (W - 1 - shift), mask=(column < C) & (shift < W), other=0.0).to(tl.float32)


@triton.jit
def _load_inputs(x, window, t, T, stride, column, C, W: tl.constexpr, WINDOW: tl.constexpr):
    """x at tokens t, [BLOCK_T, BLOCK_C] float32; before the row the inputs of its window [W - 1, C], or zeros."""
    values = load_values(x, t, T, stride, column, C)
    if WINDOW:
        values += load_values(window, t + (W - 1), W - 1, C, column, C)
    return values


@triton.jit
def reach(ids, t, source, T, DOCUMENTS: tl.constexpr):
    """1 where tokens t and source are in one document, [BLOCK_T, 1].

    Places outside the row are clamped: a window belongs to the document of the row's first token, and all else reads as zero.
    """
    if DOCUMENTS:
        here = tl.load(ids + tl.minimum(tl.maximum(t, 0), T - 1))
        there = tl.load(ids + tl.minimum(tl.maximum(source, 0), T - 1))
        return tl.where(here == there, 1.0, 0.0)[:, None]
    else:
        return tl.full((1, 1), 1.0, tl.float32)


@triton.jit
def add_taps(x0, x1, x2, x3, w0, w1, w2, w3, bias, ids, t, T, DOCUMENTS: tl.constexpr):
    """The sum before SiLU at tokens t, given x at t, t - 1, t - 2 and t - 3.

    Tiles [BLOCK_T, BLOCK_C] and taps [BLOCK_C]; the token itself is always of its own document.
    """
    total = bias[None, :] + x0 * w0[None, :]
    total += x1 * w1[None, :] * reach(ids, t, t - 1, T, DOCUMENTS)
    total += x2 * w2[None, :] * reach(ids, t, t - 2, T, DOCUMENTS)
    return total + x3 * w3[None, :] * reach(ids, t, t - 3, T, DOCUMENTS)


@triton.jit
def _through_silu(dy, total, SILU: tl.constexpr):
    """Compute the gradient of the sum before SiLU from that of the output; the same without SiLU."""
    if SILU:
        return silu_backward(dy, total, sigmoid(total))
    else:
        return dy


@triton.jit
def convolution_forward_kernel(
    x, weight, bias, ids, window, y, T, C, stride_b, stride_t,
    W: tl.constexpr, BIAS: tl.constexpr, DOCUMENTS: tl.constexpr, WINDOW: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, SILU: tl.constexpr = True,
):  # fmt: skip
    """y [B, T, C]; one program per block of tokens and of channels.

    x [B, T, C] may have any strides of rows and tokens, given in multiples of UNIT, with channels packed; ids [B, T] are
    document ids, window [B, W - 1, C] the inputs before each row with WINDOW.
    Grid: (B * token blocks, channel blocks).
    """
    blocks = tl.cdiv(T, BLOCK_T)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    t = tl.program_id(0) % blocks * BLOCK_T + tl.arange(0, BLOCK_T)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    stride_t = stride_t * UNIT
    x_row, ids_row, before = x + batch * stride_b * UNIT, ids, window
    if DOCUMENTS:
        ids_row = ids + batch * T
    if WINDOW:
        before = window + batch * (W - 1) * C
    start = tl.zeros((BLOCK_C,), tl.float32)
    if BIAS:
        start = tl.load(bias + column, mask=column < C, other=0.0).to(tl.float32)
    w0, w1 = load_tap(weight, 0, column, C, W), load_tap(weight, 1, column, C, W)
    w2, w3 = load_tap(weight, 2, column, C, W), load_tap(weight, 3, column, C, W)
    x0 = load_values(x_row, t, T, stride_t, column, C)
    x1 = _load_inputs(x_row, before, t - 1, T, stride_t, column, C, W, WINDOW)
    x2 = _load_inputs(x_row, before, t - 2, T, stride_t, column, C, W, WINDOW)
    x3 = _load_inputs(x_row, before, t - 3, T, stride_t, column, C, W, WINDOW)
    total = add_taps(x0, x1, x2, x3, w0, w1, w2, w3, start, ids_row, t, T, DOCUMENTS)
    out = total
    if SILU:
        out = silu(total)
    where = y + (batch * T + t.to(tl.int64))[:, None] * C + column[None, :]
    tl.store(where, out.to(y.dtype.element_ty), mask=(t < T)[:, None] & (column < C)[None, :])


@triton.jit
def convolution_backward_kernel(
    x, weight, bias, ids, window, d_y, d_x, d_window, partial,
    T, C, stride_b, stride_t, stride_dx, blocks_per_strip, strips,
    W: tl.constexpr, BIAS: tl.constexpr, DOCUMENTS: tl.constexpr, WINDOW: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, SILU: tl.constexpr = True,
):  # fmt: skip
    """d_x [B, T, C], and a part of the gradients of weight and bias for each strip of tokens.

    Tokens of d_x are `stride_dx` apart over all rows; strides are in multiples of UNIT. Parts are [B, strips, C * W + C]: laid out as the weight, then the bias.
    With WINDOW d_window [B, W - 1, C] too, in a block of places before the row, which have inputs and no outputs.
    """
    batch, strip = (tl.program_id(0) // strips).to(tl.int64), tl.program_id(0) % strips
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    stride_t, stride_dx = stride_t * UNIT, stride_dx * UNIT
    x_row, dy_row, ids_row, before = x + batch * stride_b * UNIT, d_y + batch * T * C, ids, window
    if DOCUMENTS:
        ids_row = ids + batch * T
    if WINDOW:
        before = window + batch * (W - 1) * C
    start = tl.zeros((BLOCK_C,), tl.float32)
    if BIAS:
        start = tl.load(bias + column, mask=column < C, other=0.0).to(tl.float32)
    w0, w1 = load_tap(weight, 0, column, C, W), load_tap(weight, 1, column, C, W)
    w2, w3 = load_tap(weight, 2, column, C, W), load_tap(weight, 3, column, C, W)
    d_w0, d_w1 = tl.zeros((BLOCK_C,), tl.float32), tl.zeros((BLOCK_C,), tl.float32)
    d_w2, d_w3 = tl.zeros((BLOCK_C,), tl.float32), tl.zeros((BLOCK_C,), tl.float32)
    d_start = tl.zeros((BLOCK_C,), tl.float32)
    first = strip * blocks_per_strip
    end = tl.minimum(first + blocks_per_strip, tl.cdiv(T, BLOCK_T))
    if WINDOW:
        first = tl.where(strip == 0, -1, first)
    for block in range(first, end):
        t = block * BLOCK_T + tl.arange(0, BLOCK_T)
        back3 = _load_inputs(x_row, before, t - 3, T, stride_t, column, C, W, WINDOW)
        back2 = _load_inputs(x_row, before, t - 2, T, stride_t, column, C, W, WINDOW)
        back1 = _load_inputs(x_row, before, t - 1, T, stride_t, column, C, W, WINDOW)
        here = _load_inputs(x_row, before, t, T, stride_t, column, C, W, WINDOW)
        next1 = _load_inputs(x_row, before, t + 1, T, stride_t, column, C, W, WINDOW)
        next2 = _load_inputs(x_row, before, t + 2, T, stride_t, column, C, W, WINDOW)
        next3 = load_values(x_row, t + 3, T, stride_t, column, C)

        total = add_taps(here, back1, back2, back3, w0, w1, w2, w3, start, ids_row, t, T, DOCUMENTS)
        e = _through_silu(load_values(dy_row, t, T, C, column, C), total, SILU)
        dx = e * w0[None, :]
        d_start += tl.sum(e, axis=0)
        d_w0 += tl.sum(e * here, axis=0)
        d_w1 += tl.sum(e * back1 * reach(ids_row, t, t - 1, T, DOCUMENTS), axis=0)
        d_w2 += tl.sum(e * back2 * reach(ids_row, t, t - 2, T, DOCUMENTS), axis=0)
        d_w3 += tl.sum(e * back3 * reach(ids_row, t, t - 3, T, DOCUMENTS), axis=0)

        # x_t also entered the sums of the three tokens after it, each with its own tap and only inside the
        # document.
        total = add_taps(next1, here, back1, back2, w0, w1, w2, w3, start, ids_row, t + 1, T, DOCUMENTS)
        e = _through_silu(load_values(dy_row, t + 1, T, C, column, C), total, SILU)
        dx += e * w1[None, :] * reach(ids_row, t + 1, t, T, DOCUMENTS)
        total = add_taps(next2, next1, here, back1, w0, w1, w2, w3, start, ids_row, t + 2, T, DOCUMENTS)
        e = _through_silu(load_values(dy_row, t + 2, T, C, column, C), total, SILU)
        dx += e * w2[None, :] * reach(ids_row, t + 2, t, T, DOCUMENTS)
        total = add_taps(next3, next2, next1, here, w0, w1, w2, w3, start, ids_row, t + 3, T, DOCUMENTS)
        e = _through_silu(load_values(dy_row, t + 3, T, C, column, C), total, SILU)
        dx += e * w3[None, :] * reach(ids_row, t + 3, t, T, DOCUMENTS)
        where = d_x + (batch * T + t.to(tl.int64))[:, None] * stride_dx + column[None, :]
        tl.store(where, dx.to(d_x.dtype.element_ty), mask=((t >= 0) & (t < T))[:, None] & (column < C)[None, :])
        if WINDOW:
            place = t + (W - 1)
            where = d_window + (batch * (W - 1) + place)[:, None] * C + column[None, :]
            inside = ((t < 0) & (place >= 0))[:, None] & (column < C)[None, :]
            tl.store(where, dx.to(d_window.dtype.element_ty), mask=inside)
    mine = partial + (batch * strips + strip) * (W + 1) * C
    # A column of the weight meets the tokens W - 1 minus its number back.
    taps = mine + column * W + (W - 1)
    tl.store(taps, d_w0, mask=column < C)
    tl.store(taps - 1, d_w1, mask=column < C)
    if W > 2:
        tl.store(taps - 2, d_w2, mask=column < C)
    if W > 3:
        tl.store(taps - 3, d_w3, mask=column < C)
    tl.store(mine + W * C + column, d_start, mask=column < C)
