"""The norm of each head's output and its gate in Triton, one pass over memory each way: o r w act(gate).

A tile is some rows, of a token and a head each, of all channels of a head, so a norm is a sum of the tile's row. Backward makes r
again from o, writes the gate's gradient where it lies in the projection's, and where asked the result, which need not be kept.

It is an operation that autograd, torch.compile and meta tensors know, and launches that larger operations share.
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
from amfm.kernels.common.inputs import pack_tokens, stride_unit, token_stride
from amfm.kernels.common.silu import sigmoid, silu_backward
from amfm.kernels.common.tiles import sum_first
from amfm.kernels.runtime.interpreter import count_programs, dot_dtype

TILE_VALUES = 2048  # of a program, 16 a thread: with 32 forward spills on sm_100
LARGEST_HEAD = 4096


@triton.jit
def _load_rows(o, added, row, lane, inside, stride_o, ADDED: tl.constexpr, SIZE: tl.constexpr):
    """o, and what is added to it, [BLOCK_R, BLOCK_C] float32."""
    values = tl.load(o + row * stride_o + lane, mask=inside, other=0.0).to(tl.float32)
    if ADDED:
        values += tl.load(added + row * SIZE + lane, mask=inside, other=0.0).to(tl.float32)
    return values


@triton.jit
def head_norm_forward_kernel(
    o, added, gate, weight, out, rows, heads, stride_o, stride_gate, epsilon,
    ACT: tl.constexpr, ADDED: tl.constexpr, SIZE: tl.constexpr, UNIT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out [rows, SIZE] = o r w act(gate), a row for each token and head; grid (row blocks,).

    Rows of o are `stride_o` apart and those of `added` packed; gates of a token's heads are neighbours, tokens `stride_gate` *
    UNIT apart. ACT: silu, sigmoid or none.
    """
    lane = tl.arange(0, BLOCK_C)[None, :]
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    inside = (row < rows) & (lane < SIZE)
    a = _load_rows(o, added, row, lane, inside, stride_o, ADDED, SIZE)
    w = tl.load(weight + lane, mask=lane < SIZE, other=0.0).to(tl.float32)
    a = a * tl.rsqrt(tl.sum(a * a, axis=1) / SIZE + epsilon)[:, None] * w
    if ACT != "none":
        z = tl.load(gate + row // heads * (stride_gate * UNIT) + row % heads * SIZE + lane, mask=inside, other=0.0).to(
            tl.float32
        )
        share = sigmoid(z)
        if ACT == "silu":
            share = z * share
        a = a * share
    tl.store(out + row * SIZE + lane, a.to(out.dtype.element_ty), mask=inside)


@triton.jit
def head_norm_backward_kernel(
    o, added, gate, weight, d_out, d_o, d_gate, out, partial, rows, heads, stride_o, stride_gate, stride_dgate, epsilon,
    ACT: tl.constexpr, ADDED: tl.constexpr, OUT: tl.constexpr, SIZE: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """d_o [rows, SIZE], which is that of `added` too, d_gate, a part of d_weight a program, and with OUT the result itself.

    Grid (programs,); each walks blocks of rows.
    """
    lane = tl.arange(0, BLOCK_C)[None, :]
    w = tl.load(weight + lane, mask=lane < SIZE, other=0.0).to(tl.float32)
    d_w = tl.zeros((1, BLOCK_C), tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(rows, BLOCK_R), tl.num_programs(0)):
        row = tl.cast(block, tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
        inside, where = (row < rows) & (lane < SIZE), row * SIZE + lane
        a = _load_rows(o, added, row, lane, inside, stride_o, ADDED, SIZE)
        r = tl.rsqrt(tl.sum(a * a, axis=1) / SIZE + epsilon)[:, None]
        n = a * r
        d = tl.load(d_out + where, mask=inside, other=0.0).to(tl.float32)
        if ACT != "none":
            token, column = row // heads, row % heads * SIZE + lane
            z = tl.load(gate + token * (stride_gate * UNIT) + column, mask=inside, other=0.0).to(tl.float32)
            share = sigmoid(z)
            act, of_act = share, d * n * w
            if ACT == "silu":
                act, of_act = z * share, silu_backward(of_act, z, share)
            else:
                of_act = of_act * share * (1.0 - share)
            tl.store(d_gate + token * (stride_dgate * UNIT) + column, of_act.to(d_gate.dtype.element_ty), mask=inside)
            if OUT:
                tl.store(out + where, (n * w * act).to(out.dtype.element_ty), mask=inside)
            d = d * act
        elif OUT:
            tl.store(out + where, (n * w).to(out.dtype.element_ty), mask=inside)
        d_w += tl.sum(d * n, axis=0)[None, :]
        d = d * w
        d = r * (d - n * (tl.sum(d * n, axis=1) / SIZE)[:, None])
        tl.store(d_o + where, d.to(d_o.dtype.element_ty), mask=inside)
    tl.store(partial + tl.program_id(0) * SIZE + lane, d_w, mask=lane < SIZE)


def head_norm_triton(o_BTHV: Tensor, gate_BTI: Tensor | None, weight_V: Tensor, epsilon: float, act: str) -> Tensor:
    """As `op.head_norm`, for float32, bfloat16 and float16. Keeps its inputs only.

    Raises ValueError for heads wider than LARGEST_HEAD.
    """
    dot_dtype(o_BTHV.dtype)  # rejects float64
    if o_BTHV.shape[-1] > LARGEST_HEAD:
        raise ValueError(f'backend "triton" norms heads of up to {LARGEST_HEAD} values; got {o_BTHV.shape[-1]}')
    return _forward(o_BTHV.contiguous(), gate_BTI, weight_V, epsilon, act)


@torch.library.custom_op("amfm::head_norm_triton", mutates_args=())
def _forward(o: Tensor, gate: Tensor | None, weight: Tensor, epsilon: float, act: str) -> Tensor:
    """The normed and gated rows, [B, T, H V]."""
    return norm_heads(o, None, None if gate is None else pack_tokens(gate), weight, epsilon, act)


@fake_of(_forward)
def _(given: Any) -> Tensor:
    B, T, H, V = given.o.shape
    return given.o.new_empty(B, T, H * V)


@torch.library.custom_op("amfm::head_norm_triton_backward", mutates_args=())
def _backward(
    d_out: Tensor, o: Tensor, gate: Tensor | None, weight: Tensor, epsilon: float, act: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of o, of the gate (empty without) and of the weight."""
    gate = None if gate is None else pack_tokens(gate)
    d_gate = None if gate is None else torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    d_o, d_weight = norm_heads_backward(d_out.contiguous(), o, None, gate, weight, epsilon, act, d_gate, None)
    return d_o, o.new_empty(0) if d_gate is None else d_gate, d_weight


differentiate(_forward, _backward, outputs=("out",), gradients=("o", "gate", "weight"))


def _tile(size: int) -> dict[str, int]:
    """Columns that hold a head, a power of two, and as many rows as a tile has then."""
    columns = max(2, triton.next_power_of_2(size))
    return {"BLOCK_C": columns, "BLOCK_R": max(1, min(32, TILE_VALUES // columns)), "num_warps": 4}


def norm_heads(
    o: Tensor, added: Tensor | None, gate: Tensor | None, weight: Tensor, epsilon: float, act: str
) -> Tensor:
    """o r w act(gate), [B, T, H V], of o [B, T, H, V] whose heads are one distance apart; gate [B, T, H V], a slice."""
    B, T, H, V = o.shape
    out = o.new_empty(B, T, H * V)
    stride = 0 if gate is None else token_stride(gate)
    unit, tile = stride_unit(stride), _tile(V)
    head_norm_forward_kernel[(triton.cdiv(B * T * H, tile["BLOCK_R"]),)](
        o, added, gate, weight, out, B * T * H, H, o.stride(2), stride // unit, epsilon,
        ACT=act, ADDED=added is not None, SIZE=V, UNIT=unit, **tile,
    )  # fmt: skip
    return out


def norm_heads_backward(
    d_out: Tensor, o: Tensor, added: Tensor | None, gate: Tensor | None, weight: Tensor, epsilon: float, act: str,
    d_gate: Tensor | None, out: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of o (and of what was added), packed, and of the weight; writes d_gate, a slice, and where it is given out."""
    B, T, H, V = o.shape
    d_o = o.new_empty(B, T, H, V)
    strides = (0, 0) if gate is None or d_gate is None else (token_stride(gate), token_stride(d_gate))
    unit, tile = stride_unit(*strides), _tile(V)
    programs = max(1, min(triton.cdiv(B * T * H, tile["BLOCK_R"]), count_programs(o.device)))
    partial = o.new_empty(programs, V, dtype=torch.float32)
    head_norm_backward_kernel[(programs,)](
        o, added, gate, weight, d_out, d_o, d_gate, out, partial, B * T * H, H, o.stride(2), *(each // unit for each in strides),
        epsilon, ACT=act, ADDED=added is not None, OUT=out is not None, SIZE=V, UNIT=unit, **tile,
    )  # fmt: skip
    return d_o, sum_first(partial, weight.dtype)
