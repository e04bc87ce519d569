"""The delta rule with a gate of each key channel: what a chunk does on its own, then one walk over chunks, in Triton.

Formulas: README.md of delta_scan; gates as sums over halves of halves: kernels/decay_scan/README.md.

How: decays are applied to q and k once here, so that the walks are plain products with no factors of their own;
the inverse is that of the scalar form.
"""

# Triton reads a kernel's parameters from the call: they carry no types.
# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: ANN201

from __future__ import annotations

import triton
import triton.language as tl

from amfm.kernels.common.tiles import load_operand
from amfm.kernels.decay_scan.vector.triton_forward import join_halves, last_row, load_decay, load_gates, power_inside
from amfm.kernels.delta_scan.triton_forward import invert_unit_lower


@triton.jit
def vector_prepare_kernel(
    q, k, beta, g, erase, firsts, q_start, k_start, k_end, inverse, scores, decay,
    T, H, K, chunks, stride_qb, stride_qt, stride_kb, stride_kt,
    Q: tl.constexpr, LEVELS: tl.constexpr, PART: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    DOCUMENTS: tl.constexpr, ERASE: tl.constexpr,
):  # fmt: skip
    """What the walks take of a chunk of Q = 2^LEVELS tokens, so that they only multiply; one program per chunk and
    head.

    With the gates summed up to each token (starts) and after it (ends): q_start = e^starts q, k_start = e^starts k and
    k_end = beta e^ends k, all [B, T, H, K]; decay [B, chunks, H, K], e to the sum over the chunk; inverse and scores
    [B, T, H, Q], the rows of (I + A diag(beta))^-1 and P diag(beta). PART channels at a time. With ERASE its rows stand for k
    in k_start and as the first factor of A.

    Grid: (B * chunks, H). All results but the float32 decay are in the dtype of v; scores and inverse are
    summed over parts of K on chip.
    """
    batch, c = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks
    h = tl.program_id(1)
    row, start = batch * T, c * Q
    lane, column, token = tl.arange(0, Q)[:, None], tl.arange(0, PART)[None, :], tl.arange(0, Q)[None, :]
    read = tl.zeros((Q, Q), tl.float32)
    overlap = tl.zeros((Q, Q), tl.float32)
    here = (row + start) * (H * K) + h * K
    at = (row + start) * H + h
    write = tl.load(beta + at + lane * H, mask=lane < T - start, other=0.0)
    for part in tl.range(0, K, PART, disable_licm=True):
        width = K - part
        q_base, k_base = q + batch * stride_qb + h * K + part, k + batch * stride_kb + h * K + part
        q_tile = load_operand(q_base, start, T, stride_qt, width, Q, PART, DOT).to(tl.float32)
        k_tile = load_operand(k_base, start, T, stride_kt, width, Q, PART, DOT).to(tl.float32)
        asked = k_tile
        if ERASE:
            asked = load_operand(erase + row * (H * K) + h * K + part, start, T, H * K, width, Q, PART, DOT).to(
                tl.float32
            )
        read += tl.where(lane == token, tl.sum(q_tile * k_tile, axis=1)[:, None], 0.0)
        g_base = g + row * (H * K) + h * K + part
        starts = load_gates(g_base, firsts, row, start, T, H * K, width, Q, PART, DOCUMENTS)
        ends = tl.zeros((Q, PART), tl.float32)
        for level in tl.range(0, LEVELS, disable_licm=True):
            half = 1 << level
            power = power_inside(starts, ends, half, Q)
            # Pairs of this level: their places agree above the half's bit and differ in it.
            between = (lane ^ token) // half == 1
            keys = (k_tile * power).to(DOT)
            product = tl.dot((q_tile * power).to(DOT), tl.trans(keys), input_precision="tf32x3")
            read += tl.where(between, product, 0.0)
            rows = keys
            if ERASE:
                rows = (asked * power).to(DOT)
            product = tl.dot(rows, tl.trans(keys), input_precision="tf32x3")
            overlap += tl.where(between, product, 0.0)
            starts, ends = join_halves(starts, ends, half, Q, PART)
        where = here + part + (lane * (H * K) + column)
        inside = (lane < T - start) & (column < width)
        power = tl.exp(starts)
        tl.store(q_start + where, (q_tile * power).to(q_start.dtype.element_ty), mask=inside)
        tl.store(k_start + where, (asked * power).to(k_start.dtype.element_ty), mask=inside)
        tl.store(k_end + where, (k_tile * tl.exp(ends) * write).to(k_end.dtype.element_ty), mask=inside)
        place = ((batch * chunks + c) * H + h) * K + part + column
        tl.store(decay + place, tl.exp(last_row(starts, Q)), mask=column < width)
    write = tl.load(beta + at + token * H, mask=token < T - start, other=0.0)
    where = ((row + start) * H + h) * Q + (lane * (H * Q) + token)
    read = tl.where(token <= lane, read, 0.0) * write
    tl.store(scores + where, read.to(scores.dtype.element_ty), mask=lane < T - start)
    overlap = tl.where(token < lane, overlap, 0.0) * write
    solved = invert_unit_lower(overlap, Q, PRECISION)
    tl.store(inverse + where, solved.to(inverse.dtype.element_ty), mask=lane < T - start)


@triton.jit
def vector_walk_kernel(
    q_start, k_start, k_end, v, inverse, scores, decay, initial, o, entering, errors, final,
    T, H, K, V, chunks, stride_vb, stride_vt,
    Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, DOT: tl.constexpr,
    INITIAL: tl.constexpr, OUTPUT: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    """One program walks a row for one head and one block of V; the state never leaves the chip.

    o [B, T, H, V] is made with OUTPUT; with SAVE entering [B, chunks, H, K, V], the states that enter the
    chunks, and errors [B, T, H, V], v - S^T k of each token with the state before it.

    Grid: (B * H * blocks of V). State [BLOCK_K, BLOCK_V] float32.
    """
    v_blocks = tl.cdiv(V, BLOCK_V)
    v_first = tl.program_id(0) % v_blocks * BLOCK_V
    head = tl.program_id(0) // v_blocks
    batch, h = (head // H).to(tl.int64), head % H
    row, width = batch * T, V - v_first
    qk_base = row * (H * K) + h * K
    v_base = v + batch * stride_vb + h * V + v_first
    lane, v_lane = tl.arange(0, Q)[:, None], tl.arange(0, BLOCK_V)[None, :]
    k_lane = tl.arange(0, BLOCK_K)[:, None]
    in_state = (k_lane < K) & (v_lane < width)
    place = k_lane * V + v_lane
    state_base = (batch * H + h) * K * V + v_first
    state = tl.zeros((BLOCK_K, BLOCK_V), tl.float32)
    if INITIAL:
        state = tl.load(initial + state_base + place, mask=in_state, other=0.0).to(tl.float32)
    for c in tl.range(0, chunks, disable_licm=True):
        start = c * Q
        if SAVE:
            at = ((batch * chunks + c) * H + h) * K * V + v_first
            tl.store(entering + at + place, state.to(entering.dtype.element_ty), mask=in_state)
        k_tile = load_operand(k_start + qk_base, start, T, H * K, K, Q, BLOCK_K, DOT)
        v_tile = load_operand(v_base, start, T, stride_vt, width, Q, BLOCK_V, tl.float32)
        solved = load_operand(inverse + (row * H + h) * Q, start, T, H * Q, Q, Q, Q, DOT)
        held = state.to(DOT)
        found = v_tile - tl.dot(k_tile, held, input_precision="tf32x3")
        error = tl.dot(solved, found.to(DOT), input_precision="tf32x3")
        where = (row + start) * (H * V) + h * V + v_first + (lane * (H * V) + v_lane)
        inside = (lane < T - start) & (v_lane < width)
        if SAVE:
            tl.store(errors + where, error.to(errors.dtype.element_ty), mask=inside)
        if OUTPUT:
            q_tile = load_operand(q_start + qk_base, start, T, H * K, K, Q, BLOCK_K, DOT)
            read = load_operand(scores + (row * H + h) * Q, start, T, H * Q, Q, Q, Q, DOT)
            out = tl.dot(q_tile, held, input_precision="tf32x3")
            out = tl.dot(read, error.to(DOT), out, input_precision="tf32x3")
            tl.store(o + where, out.to(o.dtype.element_ty), mask=inside)
        k_tile = load_operand(k_end + qk_base, start, T, H * K, K, Q, BLOCK_K, DOT)
        leaves = load_decay(decay, batch, chunks, c, h, H, K, BLOCK_K)
        state = tl.dot(tl.trans(k_tile), error.to(DOT), state * leaves, input_precision="tf32x3")
    tl.store(final + state_base + place, state, mask=in_state)
