"""What a delta mixer takes of raw numbers of a projection, in float32 and in one pass: decays and strengths.

How strongly a head or a key channel forgets, g, has two forms: -e^A softplus(raw + bias), and floor sigmoid(e^A (raw + bias)),
which ends at a floor; how strongly a step writes, beta, is factor sigmoid(raw).
"""

# Triton reads a kernel's parameters from the call: they carry no types.
# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: ANN201, ANN202

from __future__ import annotations

import triton
import triton.language as tl

from amfm.kernels.common.silu import sigmoid, softplus


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
