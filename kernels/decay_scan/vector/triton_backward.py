"""The gradient of the scan with a gate of each key channel: a walk back, then one program per tile and block of
channels.

How: the walk back needs only what forward prepared; the gradients of q, k and g need the levels again, taken in
the same order. A gate's gradient comes as one sum over later tokens of q dq - k dk, split into three bfloat16
parts so that the GPU's fast products keep float32 digits.
"""

# Triton reads a kernel's parameters from the call: they carry no types.
# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: ANN201, SIM300

from __future__ import annotations

import triton
import triton.language as tl

from amfm.kernels.common.tiles import load_operand
from amfm.kernels.decay_scan.vector.triton_forward import join_halves, last_row, load_decay, load_gates, power_inside


@triton.jit
def vector_walk_back_kernel(
    q_start, k_end, scores, decay, d_o, d_final, leaving, d_v, d_initial, total,
    T, H, K, V, tiles, segments, segment_tiles,
    Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, DOT: tl.constexpr,
    D_FINAL: tl.constexpr, STORE: tl.constexpr,
):  # fmt: skip
    """Walk a segment backward, a tile a step, with the gradient of the state on chip.

    With STORE leaving [B, tiles, H, K, V], the gradients of the states that leave the tiles, and d_v are written.
    d_initial [B, segments, H, K, V] is made from d_final of the same shape; total [B, segments, H, K] is what the segment
    leaves of a state.

    Grid: (B * H * blocks of V, segments); d_o [B, T, H, V] contiguous. d_v is written with STORE only, because
    it needs the true gradient of the leaving state.
    """
    v_blocks = tl.cdiv(V, BLOCK_V)
    v_first = tl.program_id(0) % v_blocks * BLOCK_V
    head = tl.program_id(0) // v_blocks
    batch, h = (head // H).to(tl.int64), head % H
    segment = tl.program_id(1)
    row = batch * T
    qk_base = row * (H * K) + h * K
    o_base = row * (H * V) + h * V + v_first
    k_lane, v_lane = tl.arange(0, BLOCK_K)[:, None], tl.arange(0, BLOCK_V)[None, :]
    in_state = (k_lane < K) & (v_first + v_lane < V)
    place = k_lane * V + v_lane
    state_base = ((batch * segments + segment) * H + h) * K * V + v_first
    d_state = tl.zeros((BLOCK_K, BLOCK_V), tl.float32)
    if D_FINAL:
        d_state = tl.load(d_final + state_base + place, mask=in_state, other=0.0).to(tl.float32)
    left = tl.full((BLOCK_K, 1), 1.0, tl.float32)
    begin = segment * segment_tiles
    end = tl.minimum(begin + segment_tiles, tiles)
    for step in tl.range(begin, end, disable_licm=True):
        tile = begin + end - 1 - step
        start = tile * Q
        do_tile = load_operand(d_o + o_base, start, T, H * V, V - v_first, Q, BLOCK_V, DOT)
        if STORE:
            at = ((batch * tiles + tile) * H + h) * K * V + v_first
            tl.store(leaving + at + place, d_state.to(leaving.dtype.element_ty), mask=in_state)
            k_tile = load_operand(k_end + qk_base, start, T, H * K, K, Q, BLOCK_K, DOT)
            own = load_operand(scores + (row * H + h) * Q, start, T, H * Q, Q, Q, Q, DOT)
            dv_tile = tl.dot(k_tile, d_state.to(DOT), input_precision="tf32x3")
            dv_tile = tl.dot(tl.trans(own), do_tile, dv_tile, input_precision="tf32x3")
            lane = tl.arange(0, Q)[:, None]
            where = d_v + o_base + tl.cast(start, tl.int64) * (H * V) + (lane * (H * V) + v_lane)
            tl.store(where, dv_tile.to(d_v.dtype.element_ty), mask=(lane < T - start) & (v_first + v_lane < V))
        q_tile = load_operand(q_start + qk_base, start, T, H * K, K, Q, BLOCK_K, DOT)
        leaves = load_decay(decay, batch, tiles, tile, h, H, K, BLOCK_K)
        d_state = tl.dot(tl.trans(q_tile), do_tile, d_state * leaves, input_precision="tf32x3")
        left = left * leaves
    tl.store(d_initial + state_base + place, d_state, mask=in_state)
    if v_first == 0:
        tl.store(total + ((batch * segments + segment) * H + h) * K + k_lane, left, mask=k_lane < K)


@triton.jit
def score_gradients_kernel(
    v, d_o, d_scores, T, H, V, stride_vb, stride_vt, Q: tl.constexpr, BLOCK_V: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """d_scores [B, T, H, Q]: the gradients of the weights of a tile's own tokens, one program per tile and head.

    do v^T up to each token, in the dtype of the scores, whose memory it may take.
    """
    tiles = tl.cdiv(T, Q)
    batch, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    h = tl.program_id(1)
    row, start = batch * T, tile * Q
    total = tl.zeros((Q, Q), tl.float32)
    for v_first in tl.range(0, V, BLOCK_V):
        v_base, do_base = v + batch * stride_vb + h * V + v_first, d_o + row * (H * V) + h * V + v_first
        v_tile = load_operand(v_base, start, T, stride_vt, V - v_first, Q, BLOCK_V, DOT)
        do_tile = load_operand(do_base, start, T, H * V, V - v_first, Q, BLOCK_V, DOT)
        total = tl.dot(do_tile, tl.trans(v_tile), total, input_precision="tf32x3")
    lane, token = tl.arange(0, Q)[:, None], tl.arange(0, Q)[None, :]
    total = tl.where(token <= lane, total, 0.0)
    where = ((row + start) * H + h) * Q + (lane * (H * Q) + token)
    tl.store(d_scores + where, total.to(d_scores.dtype.element_ty), mask=lane < T - start)


@triton.jit
def add_own(
    d_tile, own_base, x_base, stride, g_base, stride_g, firsts, row, start, T, H, width,
    Q: tl.constexpr, LEVELS: tl.constexpr, PART: tl.constexpr, DOT: tl.constexpr, DOCUMENTS: tl.constexpr,
    OF_KEYS: tl.constexpr,
):  # fmt: skip
    """Add what a tile's own weights give the gradient of q (x is k) or of k (x is q), but for a token with itself.

    A loop for each of the two, and what it reads read again each time: more at once would spill.

    Returns d_tile [Q, PART] float32 with the pairs of all levels added.
    """
    lane, token = tl.arange(0, Q)[:, None], tl.arange(0, Q)[None, :]
    starts = load_gates(g_base, firsts, row, start, T, stride_g, width, Q, PART, DOCUMENTS)
    ends = tl.zeros((Q, PART), tl.float32)
    for level in tl.range(0, LEVELS, disable_licm=True):
        half = 1 << level
        power = power_inside(starts, ends, half, Q)
        x_tile = load_operand(x_base, start, T, stride, width, Q, PART, DOT).to(tl.float32)
        flow = load_operand(own_base, start, T, H * Q, Q, Q, Q, DOT)
        flow = tl.where((lane ^ token) // half == 1, flow, 0.0)
        if OF_KEYS:
            flow = tl.trans(flow)
        d_tile += tl.dot(flow, (x_tile * power).to(DOT), input_precision="tf32x3") * power
        starts, ends = join_halves(starts, ends, half, Q, PART)
    return d_tile


@triton.jit
def sum_later(d_b, d_end, firsts, row, start, T, Q: tl.constexpr, DOT: tl.constexpr, DOCUMENTS: tl.constexpr):
    """The gradient of a tile's gates: d_b summed over a token and those after it in its document, and d_end in the last.

    Products with a mask, so that the sum of one document never holds another's rounding. Three times the 8 bits of
    bfloat16 are the 24 of float32; of float32 operands the second and third are zero.

    d_b [Q, PART] float32, d_end [1, PART]; returns [Q, PART] float32.
    """
    lane, token = tl.arange(0, Q)[:, None], tl.arange(0, Q)
    later = lane <= token[None, :]
    last = lane >= 0
    if DOCUMENTS:
        begin = tl.load(firsts + row + tl.minimum(start + token, T - 1))
        later = later & (lane >= (begin - start)[None, :])
        last = lane >= tl.load(firsts + row + tl.minimum(start + Q - 1, T - 1)) - start
    HALF: tl.constexpr = tl.float32 if DOT == tl.float32 else tl.bfloat16
    weights = tl.where(later, 1.0, 0.0).to(HALF)
    high = d_b.to(HALF)
    rest = d_b - high.to(tl.float32)
    middle = rest.to(HALF)
    low = (rest - middle.to(tl.float32)).to(HALF)
    total = tl.dot(weights, low, input_precision="tf32x3")
    total = tl.dot(weights, middle, total, input_precision="tf32x3")
    return tl.dot(weights, high, total, input_precision="tf32x3") + tl.where(last, d_end, 0.0)


@triton.jit
def vector_gradients_kernel(
    q, k, v, g, firsts, d_o, d_scores, entering, leaving, d_q, d_k, d_g,
    T, H, K, V, stride_qb, stride_qt, stride_kb, stride_kt, stride_vb, stride_vt,
    Q: tl.constexpr, LEVELS: tl.constexpr, PART: tl.constexpr, BLOCK_V: tl.constexpr, DOT: tl.constexpr,
    DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """d_q, d_k and d_g of one tile and PART channels of one head, V walked BLOCK_V columns at a time.

    The gate's gradient is made of products q dq and k dk; those of a token with itself have no exponent and come last.

    Grid: (B * tiles, H * parts of K). entering and leaving [B, tiles, H, K, V]; d_g float32.
    """
    tiles, parts = tl.cdiv(T, Q), tl.cdiv(K, PART)
    batch, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    h, part = tl.program_id(1) // parts, tl.program_id(1) % parts * PART
    row, start, width = batch * T, tile * Q, K - part
    channel, v_lane = tl.arange(0, PART)[:, None], tl.arange(0, BLOCK_V)[None, :]
    dq_tile = tl.zeros((Q, PART), tl.float32)
    dk_tile = tl.zeros((Q, PART), tl.float32)
    carried = tl.zeros((PART,), tl.float32)
    state_at = (((batch * tiles + tile) * H + h) * K + part) * V
    for v_first in tl.range(0, V, BLOCK_V, disable_licm=True):
        v_base, do_base = v + batch * stride_vb + h * V + v_first, d_o + row * (H * V) + h * V + v_first
        v_tile = load_operand(v_base, start, T, stride_vt, V - v_first, Q, BLOCK_V, DOT)
        do_tile = load_operand(do_base, start, T, H * V, V - v_first, Q, BLOCK_V, DOT)
        place, in_state = channel * V + v_lane, (channel < width) & (v_lane < V - v_first)
        state = tl.load(entering + (state_at + v_first) + place, mask=in_state, other=0.0).to(DOT)
        d_state = tl.load(leaving + (state_at + v_first) + place, mask=in_state, other=0.0).to(DOT)
        dq_tile = tl.dot(do_tile, tl.trans(state), dq_tile, input_precision="tf32x3")
        dk_tile = tl.dot(v_tile, tl.trans(d_state), dk_tile, input_precision="tf32x3")
        carried += tl.sum(state.to(tl.float32) * d_state.to(tl.float32), axis=1)
    q_base, k_base = q + batch * stride_qb + h * K + part, k + batch * stride_kb + h * K + part
    g_base = g + row * (H * K) + h * K + part
    starts = load_gates(g_base, firsts, row, start, T, H * K, width, Q, PART, DOCUMENTS)
    ends = tl.zeros((Q, PART), tl.float32)
    for level in tl.range(0, LEVELS, disable_licm=True):
        starts, ends = join_halves(starts, ends, 1 << level, Q, PART)
    dq_tile = dq_tile * tl.exp(starts)
    dk_tile = dk_tile * tl.exp(ends)
    k_tile = load_operand(k_base, start, T, stride_kt, width, Q, PART, DOT).to(tl.float32)
    d_end = tl.sum(k_tile * dk_tile, axis=0)[None, :] + tl.exp(last_row(starts, Q)) * carried[None, :]
    own_base = d_scores + (row * H + h) * Q
    dq_tile = add_own(
        dq_tile, own_base, k_base, stride_kt, g_base, H * K, firsts, row, start, T, H, width,
        Q, LEVELS, PART, DOT, DOCUMENTS, False,
    )  # fmt: skip
    dk_tile = add_own(
        dk_tile, own_base, q_base, stride_qt, g_base, H * K, firsts, row, start, T, H, width,
        Q, LEVELS, PART, DOT, DOCUMENTS, True,
    )  # fmt: skip
    q_tile = load_operand(q_base, start, T, stride_qt, width, Q, PART, DOT).to(tl.float32)
    k_tile = load_operand(k_base, start, T, stride_kt, width, Q, PART, DOT).to(tl.float32)
    d_b = q_tile * dq_tile - k_tile * dk_tile
    d_gate = sum_later(d_b, d_end, firsts, row, start, T, Q, DOT, DOCUMENTS)
    lane, column = tl.arange(0, Q)[:, None], tl.arange(0, PART)[None, :]
    inside = lane < T - start
    diagonal = own_base + tl.cast(start, tl.int64) * (H * Q) + lane * (H * Q + 1)
    own = tl.load(diagonal, mask=inside, other=0.0).to(tl.float32)
    dq_tile += own * k_tile
    dk_tile += own * q_tile
    where = (row + start) * (H * K) + h * K + part + (lane * (H * K) + column)
    inside = inside & (column < width)
    tl.store(d_q + where, dq_tile.to(d_q.dtype.element_ty), mask=inside)
    tl.store(d_k + where, dk_tile.to(d_k.dtype.element_ty), mask=inside)
    tl.store(d_g + where, d_gate, mask=inside)
