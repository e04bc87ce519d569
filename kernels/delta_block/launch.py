"""Launches of the kernels before a delta scan: what opens q, k and v, and what makes gates."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from amfm.kernels.common.inputs import stride_unit, token_stride
from amfm.kernels.common.tiles import sum_first, sum_parts
from amfm.kernels.delta_block.triton_open import (
    gates_backward_kernel,
    gates_forward_kernel,
    open_backward_kernel,
    open_forward_kernel,
)
from amfm.kernels.runtime.backend import INTERPRETED
from amfm.kernels.runtime.interpreter import count_programs

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
