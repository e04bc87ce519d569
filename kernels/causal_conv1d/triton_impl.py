"""The Triton convolution as an operation that autograd, torch.compile and meta tensors know.

Backward cuts a row's tokens into strips, each walked by one program that keeps the gradients of taps and bias
in registers and writes one part; parts are added up in a fixed order. More strips fill the GPU, fewer write
less. The sum before SiLU is computed again instead of kept: three multiply-adds a value cost less
than reading it.

The short convolution as Triton kernels: every tile of x and dy is read once, taps and gradients stay on chip.

Widths below 4 run as width 4 with zero weights for the taps they lack.

Tiles are [tokens, channels] with channels along neighbouring threads, so that loads are packed. The three
tokens before a tile (and in backward after it) are loaded as shifted tiles, which the cache serves; sums are
float32.
"""

# Triton reads a kernel's parameters from the call: they carry no types.
# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: ANN201, ANN202

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from amfm.kernels.common.custom_op import differentiate, fake_of
from amfm.kernels.common.inputs import pack, stride_unit, token_stride
from amfm.kernels.common.silu import sigmoid, silu, silu_backward
from amfm.kernels.common.tiles import load_values, sum_first
from amfm.kernels.runtime.backend import INTERPRETED
from amfm.kernels.runtime.interpreter import count_programs, dot_dtype
from amfm.kernels.runtime.tuning import Config, config_for


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


def _candidates(*tiles: tuple[int, int]) -> tuple[Config, ...]:
    """Tiles of tokens and channels, the fixed one first; small ones in the interpreter."""
    tiles = ((16, 32), *tiles) if INTERPRETED else tiles
    return tuple({"BLOCK_T": tokens, "BLOCK_C": channels, "num_warps": 4} for tokens, channels in tiles)


FORWARD = _candidates((32, 128), (16, 128), (32, 64), (64, 64))
# Seven shifted tiles of inputs and four of gradients: of 32 x 128 they spill on every GPU.
BACKWARD = _candidates((16, 64), (8, 128), (16, 32), (32, 32))


def convolve_triton(
    x_BTC: Tensor,
    weight_CW: Tensor,
    bias_C: Tensor | None,
    document_ids_BT: Tensor | None,
    window_BWC: Tensor | None,
    silu: bool = True,
) -> Tensor:
    """As `torch_impl.convolve`, for float32, bfloat16 and float16, of rows after a window. Saves its inputs only."""
    dot_dtype(x_BTC.dtype)  # rejects float64
    return _forward(x_BTC, weight_CW, bias_C, document_ids_BT, window_BWC, silu)


def _rows(x: Tensor) -> Tensor:
    """Channels packed; rows and tokens may be apart, as slices of a wider projection do."""
    return x if x.stride(-1) == 1 else x.contiguous()


@torch.library.custom_op("amfm::causal_conv1d_triton", mutates_args=())
def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, documents: Tensor | None, window: Tensor | None, silu: bool
) -> Tensor:
    """y [B, T, C] of x [B, T, C], weight [C, W], bias [C], document ids [B, T] and window [B, W - 1, C], or None for these."""
    return convolve_rows(x, weight, bias, documents, window, silu=silu)


@fake_of(_forward)
def _(given: Any) -> Tensor:
    return given.x.new_empty(given.x.shape)


def convolve_rows(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    documents: Tensor | None,
    window: Tensor | None = None,
    *,
    silu: bool = True,
) -> Tensor:
    """Launch the forward kernel: y [B, T, C], packed."""
    x, weight, documents, window = _rows(x), weight.contiguous(), pack(documents), pack(window)
    B, T, C = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    unit = stride_unit(x.stride(0), x.stride(1))
    config = config_for("convolution_forward", (x.dtype, weight.shape[1]), FORWARD, x.device)
    grid = (B * triton.cdiv(T, config["BLOCK_T"]), triton.cdiv(C, config["BLOCK_C"]))
    convolution_forward_kernel[grid](
        x, weight, bias, documents, window, y, T, C, x.stride(0) // unit, x.stride(1) // unit,
        W=weight.shape[1], BIAS=bias is not None, DOCUMENTS=documents is not None, WINDOW=window is not None, UNIT=unit,
        SILU=silu, **config,
    )  # fmt: skip
    return y


@torch.library.custom_op("amfm::causal_conv1d_triton_backward", mutates_args=())
def _backward(
    d_y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    documents: Tensor | None,
    window: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, of weight and bias as one, [C * W + C], and of the window (empty without)."""
    d_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    d_taps, d_window = convolve_rows_backward(d_y, x, weight, bias, documents, d_x, window, silu=silu)
    return d_x, d_taps, x.new_empty(0) if d_window is None else d_window


def convolve_rows_backward(
    d_y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    documents: Tensor | None,
    d_x: Tensor,
    window: Tensor | None = None,
    *,
    silu: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Launch the backward kernel: write d_x [B, T, C], whose tokens may be apart at one distance over all rows.

    Returns the gradients of weight and bias, one after the other, [C * W + C] in the dtype of the weight, and that of the window.
    """
    x, weight, d_y, documents, window = _rows(x), weight.contiguous(), d_y.contiguous(), pack(documents), pack(window)
    d_window = None if window is None else torch.empty_like(window)
    B, T, C = x.shape
    W = weight.shape[1]
    strides = x.stride(0), x.stride(1), token_stride(d_x)
    unit = stride_unit(*strides)
    config = config_for("convolution_backward", (x.dtype, W), BACKWARD, x.device)
    blocks, columns = triton.cdiv(T, config["BLOCK_T"]), triton.cdiv(C, config["BLOCK_C"])
    # Enough strips for four programs a multiprocessor, and no more: each writes a partial.
    strips = max(1, min(blocks, triton.cdiv(count_programs(x.device, 4), B * columns)))
    blocks_per_strip = triton.cdiv(blocks, strips)
    strips = triton.cdiv(blocks, blocks_per_strip)
    partial = x.new_empty(B * strips, (W + 1) * C, dtype=torch.float32)
    convolution_backward_kernel[(B * strips, columns)](
        x, weight, bias, documents, window, d_y, d_x, d_window, partial,
        T, C, *(stride // unit for stride in strides), blocks_per_strip, strips,
        W=W, BIAS=bias is not None, DOCUMENTS=documents is not None, WINDOW=window is not None, UNIT=unit, SILU=silu,
        **config,
    )  # fmt: skip
    return sum_first(partial, weight.dtype), d_window


def split_taps(sums: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Gradients of weight [C, W] and of the bias, if there is one, out of `convolve_rows_backward`'s result."""
    taps = weight.numel()
    return sums[:taps].view(weight.shape), None if bias is None else sums[taps:].to(bias.dtype)


@fake_of(_backward)
def _(given: Any) -> tuple[Tensor, ...]:
    x, weight, window = given.x, given.weight, given.window
    d_window = x.new_empty(0) if window is None else window.new_empty(window.shape)
    return x.new_empty(x.shape), weight.new_empty(weight.numel() + len(weight)), d_window


def _unpack(results: tuple[Tensor, ...], kept: Any) -> dict[str, Tensor | None]:
    d_weight, d_bias = split_taps(results[1], kept.weight, kept.bias)
    d_window = None if kept.window is None else results[2]
    return {"x": results[0], "weight": d_weight, "bias": d_bias, "window": d_window}


differentiate(_forward, _backward, outputs=("y",), unpack=_unpack)
