"""The gradient of the delta rule with a gate of each key channel: a walk back, then one program per chunk and block of
channels.

How: the walk back and the products with states are those of the scalar form; `vector_pairs_kernel` leaves the
gradients of both score matrices, which every part of K then reads. Each of the four sums over levels is a separate
loop, with gates summed again: registers, not operations, are what this kernel lacks.
"""

# Triton reads a kernel's parameters from the call: they carry no types.
# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: ANN201

from __future__ import annotations

import triton
import triton.language as tl

from amfm.kernels.common.tiles import load_operand
from amfm.kernels.decay_scan.vector.triton_backward import sum_later
from amfm.kernels.decay_scan.vector.triton_forward import join_halves, last_row, load_decay, load_gates, power_inside


@triton.jit
def vector_walk_back_kernel(
    q_start, k_start, k_end, inverse, scores, decay, d_o, d_final, leaving, d_v, d_initial, T, H, K, V, chunks,
    Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, DOT: tl.constexpr, D_FINAL: tl.constexpr,
):  # fmt: skip
    """Walk a row backward for one head and one block of V, with the state's gradient on chip.

    Writes d_v [B, T, H, V], leaving [B, chunks, H, K, V], the gradients of the states that leave the chunks, and
    d_initial [B, H, K, V].

    Grid: (B * H * blocks of V). Transposes are of loaded tiles only.
    """
    v_blocks = tl.cdiv(V, BLOCK_V)
    v_first = tl.program_id(0) % v_blocks * BLOCK_V
    head = tl.program_id(0) // v_blocks
    batch, h = (head // H).to(tl.int64), head % H
    row, width = batch * T, V - v_first
    qk_base, own_base = row * (H * K) + h * K, (row * H + h) * Q
    o_base = row * (H * V) + h * V + v_first
    lane, v_lane = tl.arange(0, Q)[:, None], tl.arange(0, BLOCK_V)[None, :]
    k_lane = tl.arange(0, BLOCK_K)[:, None]
    in_state = (k_lane < K) & (v_lane < width)
    place = k_lane * V + v_lane
    state_base = (batch * H + h) * K * V + v_first
    d_state = tl.zeros((BLOCK_K, BLOCK_V), tl.float32)
    if D_FINAL:
        d_state = tl.load(d_final + state_base + place, mask=in_state, other=0.0).to(tl.float32)
    for step in tl.range(0, chunks, disable_licm=True):
        c = chunks - 1 - step
        start = c * Q
        at = ((batch * chunks + c) * H + h) * K * V + v_first
        tl.store(leaving + at + place, d_state.to(leaving.dtype.element_ty), mask=in_state)
        k_tile = load_operand(k_end + qk_base, start, T, H * K, K, Q, BLOCK_K, DOT)
        do_tile = load_operand(d_o + o_base, start, T, H * V, width, Q, BLOCK_V, DOT)
        read = load_operand(scores + own_base, start, T, H * Q, Q, Q, Q, DOT)
        d_error = tl.dot(k_tile, d_state.to(DOT), input_precision="tf32x3")
        d_error = tl.dot(tl.trans(read), do_tile, d_error, input_precision="tf32x3")
        solved = load_operand(inverse + own_base, start, T, H * Q, Q, Q, Q, DOT)
        d_found = tl.dot(tl.trans(solved), d_error.to(DOT), input_precision="tf32x3")
        where = d_v + o_base + tl.cast(start, tl.int64) * (H * V) + (lane * (H * V) + v_lane)
        tl.store(where, d_found.to(d_v.dtype.element_ty), mask=(lane < T - start) & (v_lane < width))
        q_tile = load_operand(q_start + qk_base, start, T, H * K, K, Q, BLOCK_K, DOT)
        leaves = load_decay(decay, batch, chunks, c, h, H, K, BLOCK_K)
        d_state = tl.dot(tl.trans(q_tile), do_tile, d_state * leaves, input_precision="tf32x3")
        k_tile = load_operand(k_start + qk_base, start, T, H * K, K, Q, BLOCK_K, DOT)
        d_state = tl.dot(tl.trans(k_tile), (-d_found).to(DOT), d_state, input_precision="tf32x3")
    tl.store(d_initial + state_base + place, d_state, mask=in_state)


@triton.jit
def vector_pairs_kernel(
    d_o, d_v, errors, by_read, by_found, T, H, V, chunks,
    Q: tl.constexpr, BLOCK_V: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """by_read and by_found [B, T, H, Q]: do r^T up to each token and -(dv r^T) before it, one program per chunk and
    head.

    Grid: (B * chunks, H). Zero where a token does not read, so that later products need no mask.
    """
    batch, c = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks
    h = tl.program_id(1)
    row, start = batch * T, c * Q
    read = tl.zeros((Q, Q), tl.float32)
    found = tl.zeros((Q, Q), tl.float32)
    for v_first in tl.range(0, V, BLOCK_V, disable_licm=True):
        base, width = row * (H * V) + h * V + v_first, V - v_first
        error = load_operand(errors + base, start, T, H * V, width, Q, BLOCK_V, DOT)
        do_tile = load_operand(d_o + base, start, T, H * V, width, Q, BLOCK_V, DOT)
        read = tl.dot(do_tile, tl.trans(error), read, input_precision="tf32x3")
        dv_tile = load_operand(d_v + base, start, T, H * V, width, Q, BLOCK_V, DOT)
        found = tl.dot(dv_tile, tl.trans(error), found, input_precision="tf32x3")
    lane, token = tl.arange(0, Q)[:, None], tl.arange(0, Q)[None, :]
    where = ((row + start) * H + h) * Q + (lane * (H * Q) + token)
    read = tl.where(token <= lane, read, 0.0)
    tl.store(by_read + where, read.to(by_read.dtype.element_ty), mask=lane < T - start)
    found = tl.where(token < lane, -found, 0.0)
    tl.store(by_found + where, found.to(by_found.dtype.element_ty), mask=lane < T - start)


@triton.jit
def add_pairs(
    d_tile, flow_base, x_base, stride, beta_base, g_base, firsts, row, start, T, H, K, width,
    Q: tl.constexpr, LEVELS: tl.constexpr, PART: tl.constexpr, DOT: tl.constexpr, DOCUMENTS: tl.constexpr,
    OF_KEYS: tl.constexpr,
):  # fmt: skip
    """Add what pairs of tokens of the chunk give: to a reader from the keys x, weighed by beta, or OF_KEYS to a key from its readers x.

    A loop for each of the four, and what it reads read again each time: more at once would spill.

    Returns d_tile [Q, PART] float32.
    """
    lane, token = tl.arange(0, Q)[:, None], tl.arange(0, Q)[None, :]
    starts = load_gates(g_base, firsts, row, start, T, H * K, width, Q, PART, DOCUMENTS)
    ends = tl.zeros((Q, PART), tl.float32)
    for level in tl.range(0, LEVELS, disable_licm=True):
        half = 1 << level
        power = power_inside(starts, ends, half, Q)
        x_tile = load_operand(x_base, start, T, stride, width, Q, PART, DOT).to(tl.float32)
        flow = load_operand(flow_base, start, T, H * Q, Q, Q, Q, DOT)
        flow = tl.where((lane ^ token) // half == 1, flow, 0.0)
        if OF_KEYS:
            flow = tl.trans(flow)
        else:
            x_tile = x_tile * tl.load(beta_base + (start + lane) * H, mask=lane < T - start, other=0.0)
        d_tile += tl.dot(flow, (x_tile * power).to(DOT), input_precision="tf32x3") * power
        starts, ends = join_halves(starts, ends, half, Q, PART)
    return d_tile


@triton.jit
def states_products(
    d_o, d_v, errors, entering, leaving, base, start, T, H, V, width,
    Q: tl.constexpr, PART: tl.constexpr, BLOCK_V: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """do S^T, dv S^T and r dS^T for PART rows of the states, of which `width` exist, and the sums of S dS over V.

    Returns [Q, PART] three times and [PART], all float32.
    """
    channel, v_lane = tl.arange(0, PART)[:, None], tl.arange(0, BLOCK_V)[None, :]
    from_read = tl.zeros((Q, PART), tl.float32)
    from_found = tl.zeros((Q, PART), tl.float32)
    written = tl.zeros((Q, PART), tl.float32)
    carried = tl.zeros((PART,), tl.float32)
    for v_first in tl.range(0, V, BLOCK_V, disable_licm=True):
        place, in_state = channel * V + v_lane, (channel < width) & (v_lane < V - v_first)
        state = tl.load(entering + v_first + place, mask=in_state, other=0.0).to(DOT)
        d_state = tl.load(leaving + v_first + place, mask=in_state, other=0.0).to(DOT)
        carried += tl.sum(state.to(tl.float32) * d_state.to(tl.float32), axis=1)
        do_tile = load_operand(d_o + base + v_first, start, T, H * V, V - v_first, Q, BLOCK_V, DOT)
        from_read = tl.dot(do_tile, tl.trans(state), from_read, input_precision="tf32x3")
        dv_tile = load_operand(d_v + base + v_first, start, T, H * V, V - v_first, Q, BLOCK_V, DOT)
        from_found = tl.dot(dv_tile, tl.trans(state), from_found, input_precision="tf32x3")
        error = load_operand(errors + base + v_first, start, T, H * V, V - v_first, Q, BLOCK_V, DOT)
        written = tl.dot(error, tl.trans(d_state), written, input_precision="tf32x3")
    return from_read, from_found, written, carried


@triton.jit
def vector_gradients_kernel(
    q, k, beta, g, erase, firsts, d_o, d_v, errors, by_read, by_found, entering, leaving, d_q, d_k, d_beta, d_g, d_erase,
    T, H, K, V, chunks, stride_qb, stride_qt, stride_kb, stride_kt,
    Q: tl.constexpr, LEVELS: tl.constexpr, PART: tl.constexpr, BLOCK_V: tl.constexpr, DOT: tl.constexpr,
    DOCUMENTS: tl.constexpr, ERASE: tl.constexpr,
):  # fmt: skip
    """d_q, d_k, d_g and PART channels' share of d_beta [parts, B, T, H] of one chunk and head, V walked BLOCK_V columns at a time.

    With ERASE, what asks the state is apart from what writes to it, and so is its gradient d_erase.
    The gate's gradient is made of products of what reads and what is written with their gradients; those of a token with
    itself have no exponent and come last.

    Grid: (B * chunks, H * parts of K). d_beta needs a sum over all of K; each part writes its share and PyTorch
    adds them.
    """
    parts = tl.cdiv(K, PART)
    batch, c = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks
    h, number = tl.program_id(1) // parts, tl.program_id(1) % parts
    part = number * PART
    row, start, width = batch * T, c * Q, K - part
    state_at = (((batch * chunks + c) * H + h) * K + part) * V
    dq_tile, dk_tile, dw_tile, carried = states_products(
        d_o, d_v, errors, entering + state_at, leaving + state_at, row * (H * V) + h * V, start, T, H, V, width,
        Q, PART, BLOCK_V, DOT,
    )  # fmt: skip
    q_base, k_base = q + batch * stride_qb + h * K + part, k + batch * stride_kb + h * K + part
    g_base = g + row * (H * K) + h * K + part
    asked_base, asked_stride = k_base, stride_kt
    if ERASE:
        asked_base, asked_stride = erase + row * (H * K) + h * K + part, H * K
    beta_base = beta + row * H + h
    lane, column = tl.arange(0, Q)[:, None], tl.arange(0, PART)[None, :]
    starts = load_gates(g_base, firsts, row, start, T, H * K, width, Q, PART, DOCUMENTS)
    ends = tl.zeros((Q, PART), tl.float32)
    for level in tl.range(0, LEVELS, disable_licm=True):
        starts, ends = join_halves(starts, ends, 1 << level, Q, PART)
    dq_tile = dq_tile * tl.exp(starts)
    dk_tile = dk_tile * -tl.exp(starts)
    dw_tile = dw_tile * tl.exp(ends)
    write = tl.load(beta_base + (start + lane) * H, mask=lane < T - start, other=0.0)
    k_tile = load_operand(k_base, start, T, stride_kt, width, Q, PART, DOT).to(tl.float32)
    d_end = tl.sum(k_tile * dw_tile * write, axis=0)[None, :] + tl.exp(last_row(starts, Q)) * carried[None, :]
    own_base = (row * H + h) * Q
    dq_tile = add_pairs(
        dq_tile, by_read + own_base, k_base, stride_kt, beta_base, g_base, firsts, row, start, T, H, K, width,
        Q, LEVELS, PART, DOT, DOCUMENTS, False,
    )  # fmt: skip
    dk_tile = add_pairs(
        dk_tile, by_found + own_base, k_base, stride_kt, beta_base, g_base, firsts, row, start, T, H, K, width,
        Q, LEVELS, PART, DOT, DOCUMENTS, False,
    )  # fmt: skip
    dw_tile = add_pairs(
        dw_tile, by_read + own_base, q_base, stride_qt, beta_base, g_base, firsts, row, start, T, H, K, width,
        Q, LEVELS, PART, DOT, DOCUMENTS, True,
    )  # fmt: skip
    dw_tile = add_pairs(
        dw_tile, by_found + own_base, asked_base, asked_stride, beta_base, g_base, firsts, row, start, T, H, K, width,
        Q, LEVELS, PART, DOT, DOCUMENTS, True,
    )  # fmt: skip
    q_tile = load_operand(q_base, start, T, stride_qt, width, Q, PART, DOT).to(tl.float32)
    k_tile = load_operand(k_base, start, T, stride_kt, width, Q, PART, DOT).to(tl.float32)
    write = tl.load(beta_base + (start + lane) * H, mask=lane < T - start, other=0.0)
    if ERASE:
        asked = load_operand(asked_base, start, T, asked_stride, width, Q, PART, DOT).to(tl.float32)
        d_b = q_tile * dq_tile + asked * dk_tile - k_tile * (write * dw_tile)
    else:
        d_b = q_tile * dq_tile + k_tile * (dk_tile - write * dw_tile)
    d_gate = sum_later(d_b, d_end, firsts, row, start, T, Q, DOT, DOCUMENTS)
    inside = lane < T - start
    diagonal = by_read + own_base + tl.cast(start, tl.int64) * (H * Q) + lane * (H * Q + 1)
    own = tl.load(diagonal, mask=inside, other=0.0).to(tl.float32)
    dq_tile += own * write * k_tile
    dw_tile += own * q_tile
    where = (row + start) * (H * K) + h * K + part + (lane * (H * K) + column)
    at = (number.to(tl.int64) * (tl.num_programs(0) // chunks) * T + row + start + tl.arange(0, Q)) * H + h
    tl.store(d_beta + at, tl.sum(k_tile * dw_tile, axis=1), mask=tl.arange(0, Q) < T - start)
    inside = inside & (column < width)
    tl.store(d_q + where, dq_tile.to(d_q.dtype.element_ty), mask=inside)
    if ERASE:
        tl.store(d_erase + where, dk_tile.to(d_erase.dtype.element_ty), mask=inside)
        dk_tile = tl.zeros_like(dk_tile)
    tl.store(d_k + where, (dk_tile + write * dw_tile).to(d_k.dtype.element_ty), mask=inside)
    tl.store(d_g + where, d_gate, mask=inside)
