"""The Triton convolution as an operation that autograd, torch.compile and meta tensors know.

Backward cuts a row's tokens into strips, each walked by one program that keeps the gradients of taps and bias
in registers and writes one part; parts are added up in a fixed order. More strips fill the GPU, fewer write
less. The sum before SiLU is computed again instead of kept: three multiply-adds a value cost less
than reading it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from amfm.kernels.causal_conv1d.triton_kernels import convolution_backward_kernel, convolution_forward_kernel
from amfm.kernels.common.custom_op import differentiate, fake_of
from amfm.kernels.common.inputs import pack, stride_unit, token_stride
from amfm.kernels.common.tiles import sum_first
from amfm.kernels.runtime.backend import INTERPRETED
from amfm.kernels.runtime.interpreter import count_programs, dot_dtype
from amfm.kernels.runtime.tuning import Config, config_for


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
