"""Normalization and rotation of heads as one Triton kernel each way: the head is read once and written once.

A program takes a block of heads; a head is split into two rotated halves and what passes through, each padded
to a power of two, so that a rotation needs no exchange between threads. Without a rotation the split is
arbitrary and covers the head.
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
from amfm.kernels.runtime.backend import INTERPRETED
from amfm.kernels.runtime.interpreter import count_programs, dot_dtype

# Heads of a program at most, and values of its tile: more of wide heads would spill in backward, which holds four such tiles.
BLOCK_HEADS = 16 if INTERPRETED else 32
TILE_VALUES = 32 * 130


@triton.jit
def _load_parts(x, row, inside, size, half, HALF: tl.constexpr, REST: tl.constexpr):
    """A head as its first and second rotated halves and what passes through, in float32.

    Returns [BLOCK, HALF], [BLOCK, HALF] and [BLOCK, REST]; `half` counts rotated pairs.
    """
    lane, rest = tl.arange(0, HALF)[None, :], tl.arange(0, REST)[None, :]
    base = x + row * size
    first = tl.load(base + lane, mask=inside & (lane < half), other=0.0).to(tl.float32)
    second = tl.load(base + half + lane, mask=inside & (lane < half), other=0.0).to(tl.float32)
    passed = tl.load(base + 2 * half + rest, mask=inside & (rest < size - 2 * half), other=0.0).to(tl.float32)
    return first, second, passed


@triton.jit
def _store_parts(y, row, inside, size, half, first, second, passed, HALF: tl.constexpr, REST: tl.constexpr):
    """Write back what `_load_parts` split."""
    lane, rest = tl.arange(0, HALF)[None, :], tl.arange(0, REST)[None, :]
    base = y + row * size
    tl.store(base + lane, first.to(y.dtype.element_ty), mask=inside & (lane < half))
    tl.store(base + half + lane, second.to(y.dtype.element_ty), mask=inside & (lane < half))
    tl.store(base + 2 * half + rest, passed.to(y.dtype.element_ty), mask=inside & (rest < size - 2 * half))


@triton.jit
def norm_rope_forward_kernel(
    x, cosine, sine, weight, y, rows, heads, size, half, epsilon,
    NORM: tl.constexpr, ROTATE: tl.constexpr, BLOCK: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """y [rows, size]: rows are (token, head) pairs, cosine and sine [tokens, half].

    Grid: blocks of BLOCK rows. Mean square and rotation are float32; weight [size] or absent.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[:, None]
    inside = row < rows
    first, second, passed = _load_parts(x, row, inside, size, half, HALF, REST)
    if NORM:
        square = tl.sum(first * first, 1) + tl.sum(second * second, 1) + tl.sum(passed * passed, 1)
        scale = tl.rsqrt(square / size + epsilon)[:, None]
        # The weight is a matrix of one row, split as the heads are.
        one = tl.full((1, 1), 0, tl.int64)
        w_first, w_second, w_passed = _load_parts(weight, one, one == 0, size, half, HALF, REST)
        first, second, passed = first * scale * w_first, second * scale * w_second, passed * scale * w_passed
    if ROTATE:
        lane = tl.arange(0, HALF)[None, :]
        place, exists = row // heads * half + lane, inside & (lane < half)
        cos = tl.load(cosine + place, mask=exists, other=0.0)
        sin = tl.load(sine + place, mask=exists, other=0.0)
        turned = first * cos - second * sin
        second = second * cos + first * sin
        first = turned
    _store_parts(y, row, inside, size, half, first, second, passed, HALF, REST)


@triton.jit
def norm_rope_backward_kernel(
    d_y, x, cosine, sine, weight, d_x, d_weight, rows, heads, size, half, epsilon,
    NORM: tl.constexpr, ROTATE: tl.constexpr, BLOCK: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """d_x [rows, size] and one partial d_weight [programs, size] a program, each walking blocks of rows.

    The gradient is turned back first, then taken through the norm: dx = r (w d - n mean(w d n)) with n = x r.
    """
    sum_first = tl.zeros((1, HALF), tl.float32)
    sum_second = tl.zeros((1, HALF), tl.float32)
    sum_passed = tl.zeros((1, REST), tl.float32)
    one = tl.full((1, 1), 0, tl.int64)
    for block in range(tl.program_id(0), tl.cdiv(rows, BLOCK), tl.num_programs(0)):
        row = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)[:, None]
        inside = row < rows
        first, second, passed = _load_parts(d_y, row, inside, size, half, HALF, REST)
        if ROTATE:
            lane = tl.arange(0, HALF)[None, :]
            place, exists = row // heads * half + lane, inside & (lane < half)
            cos = tl.load(cosine + place, mask=exists, other=0.0)
            sin = tl.load(sine + place, mask=exists, other=0.0)
            turned = first * cos + second * sin
            second = second * cos - first * sin
            first = turned
        if NORM:
            x_first, x_second, x_passed = _load_parts(x, row, inside, size, half, HALF, REST)
            square = tl.sum(x_first * x_first, 1) + tl.sum(x_second * x_second, 1) + tl.sum(x_passed * x_passed, 1)
            scale = tl.rsqrt(square / size + epsilon)[:, None]
            x_first, x_second, x_passed = x_first * scale, x_second * scale, x_passed * scale
            sum_first += tl.sum(first * x_first, 0)[None, :]
            sum_second += tl.sum(second * x_second, 0)[None, :]
            sum_passed += tl.sum(passed * x_passed, 0)[None, :]
            w_first, w_second, w_passed = _load_parts(weight, one, one == 0, size, half, HALF, REST)
            first, second, passed = first * w_first, second * w_second, passed * w_passed
            slope = tl.sum(first * x_first, 1) + tl.sum(second * x_second, 1) + tl.sum(passed * x_passed, 1)
            slope = (slope / size)[:, None]
            first = (first - x_first * slope) * scale
            second = (second - x_second * slope) * scale
            passed = (passed - x_passed * slope) * scale
        _store_parts(d_x, row, inside, size, half, first, second, passed, HALF, REST)
    if NORM:
        mine = one + tl.program_id(0)
        _store_parts(d_weight, mine, mine >= 0, size, half, sum_first, sum_second, sum_passed, HALF, REST)


def _blocks(size: int, cosine: Tensor | None) -> tuple[int, dict[str, int]]:
    """Rotated pairs (any split in halves if nothing rotates), the padded widths of the parts, and heads of a program."""
    half = size // 2 if cosine is None else cosine.shape[-1]
    return half, tile_of(half, size - 2 * half)


def tile_of(half: int, rest: int) -> dict[str, int]:
    """Constants of both kernels for heads of `half` rotated pairs and `rest` channels that pass through."""
    parts = {"HALF": max(triton.next_power_of_2(half), 2), "REST": max(triton.next_power_of_2(max(rest, 1)), 2)}
    heads = max(1, TILE_VALUES // (2 * parts["HALF"] + parts["REST"]))
    return parts | {"BLOCK": min(BLOCK_HEADS, 1 << heads.bit_length() - 1)}


@torch.library.custom_op("amfm::norm_rope_triton", mutates_args=())
def _forward(
    x_BTHK: Tensor, cosine: Tensor | None, sine: Tensor | None, weight: Tensor | None, epsilon: float
) -> Tensor:
    """Normed and rotated heads [B, T, H, K]; cosine and sine [B, T, 1, d/2] float32 or absent."""
    x_BTHK = x_BTHK.contiguous()
    y_BTHK = torch.empty_like(x_BTHK)
    heads, size = x_BTHK.shape[2:]
    rows = x_BTHK.numel() // size
    half, blocks = _blocks(size, cosine)
    if rows:
        norm_rope_forward_kernel[(triton.cdiv(rows, blocks["BLOCK"]),)](
            x_BTHK, cosine, sine, weight, y_BTHK, rows, heads, size, half, epsilon,
            NORM=weight is not None, ROTATE=cosine is not None, **blocks,
        )  # fmt: skip
    return y_BTHK


@fake_of(_forward)
def _(given: Any) -> Tensor:
    return given.x_BTHK.new_empty(given.x_BTHK.shape)


@torch.library.custom_op("amfm::norm_rope_triton_backward", mutates_args=())
def _backward(
    d_y: Tensor, x_BTHK: Tensor, cosine: Tensor | None, sine: Tensor | None, weight: Tensor | None, epsilon: float
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the weight, empty if there is none."""
    d_y, x_BTHK = d_y.contiguous(), x_BTHK.contiguous()
    d_x = torch.empty_like(x_BTHK)
    heads, size = x_BTHK.shape[2:]
    rows = x_BTHK.numel() // size
    half, blocks = _blocks(size, cosine)
    programs = max(1, min(triton.cdiv(rows, blocks["BLOCK"]), count_programs(x_BTHK.device)))
    d_weight = x_BTHK.new_empty(programs if weight is not None else 0, size, dtype=torch.float32)
    norm_rope_backward_kernel[(programs,)](
        d_y, x_BTHK, cosine, sine, weight, d_x, d_weight, rows, heads, size, half, epsilon,
        NORM=weight is not None, ROTATE=cosine is not None, **blocks,
    )  # fmt: skip
    return d_x, x_BTHK.new_empty(0) if weight is None else d_weight.sum(0).to(weight.dtype)


differentiate(_forward, _backward, outputs=("y",), gradients=("x_BTHK", "weight"))


def norm_rope_triton(
    x_BTHK: Tensor, cosine: Tensor | None, sine: Tensor | None, weight_K: Tensor | None, epsilon: float
) -> Tensor:
    """As `norm_rope_reference`, given cosine and sine in float32, for float32, bfloat16 and float16."""
    dot_dtype(x_BTHK.dtype)  # rejects float64
    if weight_K is None and cosine is None:
        return x_BTHK
    return _forward(x_BTHK, cosine, sine, weight_K, epsilon)
