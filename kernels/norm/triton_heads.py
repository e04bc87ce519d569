"""The norm of each head's output and its gate, one pass over memory each way: o r w act(gate).

A tile is some rows, of a token and a head each, of all channels of a head, so a norm is a sum of the tile's row. Backward makes r
again from o, writes the gate's gradient where it lies in the projection's, and where asked the result, which need not be kept.
"""

# Triton reads a kernel's parameters from the call: they carry no types.
# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: ANN201, ANN202

from __future__ import annotations

import triton
import triton.language as tl

from amfm.kernels.common.silu import sigmoid, silu_backward


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
