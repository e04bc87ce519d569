"""The scan's gradient as two Triton kernels: a walk both ways for the states, then one program a chunk for the rest."""

# Triton reads a kernel's parameters from the call: they carry no types.
# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: ANN201

from __future__ import annotations

import triton
import triton.language as tl

from kernels.decay_scan.triton_forward import chunk_gates, load_tile, state_step


@triton.jit
def states_kernel(
    q, k, v, g, scale, ids, initial, d_y, d_final, entering, leaving, final, d_initial, decay,
    T, H, R, K, V, chunks, segments, segment_chunks,
    stride_qb, stride_qt, stride_kb, stride_kt, stride_vb, stride_vt,
    Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, DOT: tl.constexpr,
    DOCUMENTS: tl.constexpr, SCALE: tl.constexpr, INITIAL: tl.constexpr, D_FINAL: tl.constexpr, STORE: tl.constexpr,
):  # fmt: skip
    """Walk a segment forward for the states entering its chunks, and backward for the gradients of those leaving them.

    entering and leaving are [B, chunks, H, K, V] and written with STORE; else final [B, segments, H, K, V] and decay
    [B, segments, H] are what the segment makes of a zero state. d_initial [B, segments, H, K, V] always.
    """
    v_blocks = tl.cdiv(V, BLOCK_V)
    v_first = tl.program_id(0) % v_blocks * BLOCK_V
    head = tl.program_id(0) // v_blocks
    batch, h = (head // H).to(tl.int64), head % H
    segment = tl.program_id(1)
    row = batch * T
    group = h // R
    q_base = q + batch * stride_qb + group * K
    k_base = k + batch * stride_kb + group * K
    v_base = v + batch * stride_vb + h * V + v_first
    dy_base = d_y + row * H * V + h * V + v_first
    k_lane, v_lane = tl.arange(0, BLOCK_K)[:, None], tl.arange(0, BLOCK_V)[None, :]
    in_state = (k_lane < K) & (v_first + v_lane < V)
    tile = k_lane * V + v_lane
    state_base = ((batch * segments + segment) * H + h) * K * V + v_first
    begin = segment * segment_chunks
    end = tl.minimum(begin + segment_chunks, chunks)

    state = tl.zeros((BLOCK_K, BLOCK_V), tl.float32)
    if INITIAL:
        state = tl.load(initial + state_base + tile, mask=in_state, other=0.0).to(tl.float32)
    total = 1.0
    for c in range(begin, end):
        if STORE:
            at = ((batch * chunks + c) * H + h) * K * V + v_first
            tl.store(entering + at + tile, state.to(entering.dtype.element_ty), mask=in_state)
        b, b_end, u, _, first, last, keep = chunk_gates(g, scale, ids, row, c * Q, T, h, H, Q, DOCUMENTS, SCALE)
        k_tile = load_tile(k_base, c * Q, T, stride_kt, K, Q, BLOCK_K, DOT)
        v_tile = load_tile(v_base, c * Q, T, stride_vt, V - v_first, Q, BLOCK_V, DOT)
        state = state_step(state, k_tile, v_tile, b, b_end, u, last, keep, DOT)
        total = total * keep * tl.exp(b_end)
    if not STORE:
        tl.store(final + state_base + tile, state, mask=in_state)
        if v_first == 0:
            tl.store(decay + (batch * segments + segment) * H + h, total)

    d_state = tl.zeros((BLOCK_K, BLOCK_V), tl.float32)
    if D_FINAL:
        d_state = tl.load(d_final + state_base + tile, mask=in_state, other=0.0).to(tl.float32)
    for step in range(begin, end):
        c = begin + end - 1 - step
        if STORE:
            at = ((batch * chunks + c) * H + h) * K * V + v_first
            tl.store(leaving + at + tile, d_state.to(leaving.dtype.element_ty), mask=in_state)
        b, b_end, u, _, first, last, keep = chunk_gates(g, scale, ids, row, c * Q, T, h, H, Q, DOCUMENTS, SCALE)
        q_tile = load_tile(q_base, c * Q, T, stride_qt, K, Q, BLOCK_K, DOT)
        dy_tile = load_tile(dy_base, c * Q, T, H * V, V - v_first, Q, BLOCK_V, DOT)
        scaled = (dy_tile.to(tl.float32) * (first * tl.exp(b))[:, None]).to(DOT)
        d_state = d_state * (keep * tl.exp(b_end))
        d_state = tl.dot(tl.trans(q_tile), scaled, d_state, input_precision="ieee")
    tl.store(d_initial + state_base + tile, d_state, mask=in_state)


@triton.jit
def gradients_kernel(
    q, k, v, g, scale, skip, ids, d_y, entering, leaving, d_q, d_k, d_v, d_g, d_scale, d_skip,
    T, H, R, K, V, chunks, splits, stride_qb, stride_qt, stride_kb, stride_kt, stride_vb, stride_vt,
    Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, DOT: tl.constexpr,
    DOCUMENTS: tl.constexpr, SCALE: tl.constexpr, SKIP: tl.constexpr,
):  # fmt: skip
    """One program for a chunk of a row and a share of a group's heads: what the group shares is summed on chip.

    d_q and d_k are [splits, B, T, G, K] in float32, summed over the splits afterwards; d_skip is [B, chunks, H].
    """
    batch, c = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks
    group, split = tl.program_id(1) // splits, tl.program_id(1) % splits
    groups = tl.num_programs(1) // splits
    row, start = batch * T, c * Q
    q_tile = load_tile(q + batch * stride_qb + group * K, start, T, stride_qt, K, Q, BLOCK_K, DOT)
    k_tile = load_tile(k + batch * stride_kb + group * K, start, T, stride_kt, K, Q, BLOCK_K, DOT)
    scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
    d_scores = tl.zeros((Q, Q), tl.float32)
    dq_tile = tl.zeros((Q, BLOCK_K), tl.float32)
    dk_tile = tl.zeros((Q, BLOCK_K), tl.float32)
    lane = tl.arange(0, Q)
    t = start + lane
    k_lane, v_lane = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    in_state = (k_lane[:, None] < K) & (v_lane[None, :] < V)
    share = tl.cdiv(R, splits)
    for r in range(split * share, tl.minimum(split * share + share, R)):
        h = group * R + r
        b, b_end, u, reach, first, last, keep = chunk_gates(g, scale, ids, row, start, T, h, H, Q, DOCUMENTS, SCALE)
        v_tile = load_tile(v + batch * stride_vb + h * V, start, T, stride_vt, V, Q, BLOCK_V, DOT)
        dy_tile = load_tile(d_y + row * H * V + h * V, start, T, H * V, V, Q, BLOCK_V, DOT)
        # From the state that enters, and into the state that leaves. Loads stand where they are used, to spare registers.
        state_at = ((batch * chunks + c) * H + h) * K * V
        tile = k_lane[:, None] * V + v_lane[None, :]
        state = tl.load(entering + state_at + tile, mask=in_state, other=0.0).to(DOT)
        from_start = (dy_tile.to(tl.float32) * (first * tl.exp(b))[:, None]).to(DOT)
        dq_head = tl.dot(from_start, tl.trans(state), input_precision="ieee")
        dq_tile += dq_head
        d_b = tl.sum(q_tile.to(tl.float32) * dq_head, axis=1)
        d_state = tl.load(leaving + state_at + tile, mask=in_state, other=0.0).to(DOT)
        carried = tl.sum(tl.sum(state.to(tl.float32) * d_state.to(tl.float32), axis=1), axis=0)
        to_end = last * tl.exp(tl.minimum(b_end - b, 0.0))
        dv_tile = tl.dot(k_tile, d_state, input_precision="ieee") * (to_end * u)[:, None]
        dk_head = tl.dot(v_tile, tl.trans(d_state), input_precision="ieee") * to_end[:, None]
        dk_tile += dk_head * u[:, None]
        d_u = tl.sum(k_tile.to(tl.float32) * dk_head, axis=1)
        into = d_u * u
        d_b -= into
        d_end = tl.sum(into, axis=0) + keep * tl.exp(b_end) * carried

        # Inside the chunk. `fall` leaves u out, so that the gradient of u needs no division.
        fall = tl.where(reach, tl.exp(tl.minimum(b[:, None] - b[None, :], 0.0)), 0.0)
        mixed = (scores * fall * u[None, :]).to(DOT)
        dv_tile = tl.dot(tl.trans(mixed), dy_tile, dv_tile, input_precision="ieee")
        d_mixed = tl.dot(dy_tile, tl.trans(v_tile), input_precision="ieee") * fall
        d_scores += d_mixed * u[None, :]
        flow = d_mixed * scores
        d_u += tl.sum(flow, axis=0)
        # The diagonal has no exponent; leaving it out spares the difference below its largest terms.
        flow = tl.where(lane[:, None] == lane[None, :], 0.0, flow) * u[None, :]
        d_b += tl.sum(flow, axis=1) - tl.sum(flow, axis=0)

        if SKIP:
            through = tl.load(skip + h).to(tl.float32)
            tl.store(
                d_skip + (batch * chunks + c) * H + h,
                tl.sum(tl.sum(dy_tile.to(tl.float32) * v_tile.to(tl.float32), axis=1), axis=0),
            )
            dv_tile += dy_tile.to(tl.float32) * through
        place = (row + t) * H + h
        dg_tile = tl.sum(tl.where(reach, d_b[:, None], 0.0), axis=0) + last * d_end
        tl.store(d_g + place, dg_tile, mask=t < T)
        if SCALE:
            tl.store(d_scale + place, d_u, mask=t < T)
        where = d_v + (row + start) * (H * V) + h * V + (lane[:, None] * (H * V) + v_lane[None, :])
        tl.store(where, dv_tile.to(d_v.dtype.element_ty), mask=(t < T)[:, None] & (v_lane < V)[None, :])

    dq_tile = tl.dot(d_scores.to(DOT), k_tile, dq_tile, input_precision="ieee")
    dk_tile = tl.dot(tl.trans(d_scores).to(DOT), q_tile, dk_tile, input_precision="ieee")
    tokens = split * (tl.num_programs(0) // chunks).to(tl.int64) * T + row + start
    where = (tokens * groups + group) * K + (lane[:, None] * (groups * K) + k_lane[None, :])
    inside = (t < T)[:, None] & (k_lane < K)[None, :]
    tl.store(d_q + where, dq_tile, mask=inside)
    tl.store(d_k + where, dk_tile, mask=inside)
