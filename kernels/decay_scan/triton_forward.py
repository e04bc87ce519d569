"""The scan as one walk over a row's tiles with the state on chip, in Triton. Names and formulas: README.md here.

How: a program owns one head and one block of V columns and carries that slice of the state, [BLOCK_K, BLOCK_V]
float32, in registers from tile to tile, so that the state never passes through memory. Tiles are at most 64
tokens, which keeps scores and state in registers together; V is cut so that rows and heads of a small batch
still fill a GPU. Masks are recomputed from the first token of each document: a mask in memory would be [Q, Q]
a tile.
"""

# Triton reads a kernel's parameters from the call: they carry no types.
# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: ANN201, SIM108

from __future__ import annotations

import triton
import triton.language as tl

from amfm.kernels.common.silu import softplus
from amfm.kernels.common.tiles import load_operand


@triton.jit
def tile_gates(
    g, scale, A_log, bias, firsts, batch, start, T, h, H, stride_gb, stride_gt,
    Q: tl.constexpr, DOCUMENTS: tl.constexpr, SCALE: tl.constexpr, RAW: tl.constexpr,
):  # fmt: skip
    """Of one tile and head: b, b_end, u, and the masks reach[i, j], first, last (floats) and keep (a float).

    Sums over a mask instead of a running sum: the sum of one document never holds another's rounding.

    g and scale [B, T, H] float32, packed: strides that are known spare registers. With RAW g is Mamba2's dt before its
    softplus with strides of rows and tokens, u = softplus(dt + bias), and the gate -u e^(A_log). firsts [B, T] int32, the place of the first token of each token's
    document.
    reach [Q, Q] tells whether i reads j; first, whether the entering state reaches token i; last, whether token
    j is of the document that owns the leaving state; keep, whether these two documents are one. Tokens beyond
    the row have gates of 0 and change nothing.
    """
    lane = tl.arange(0, Q)
    t = start + lane
    if RAW:
        place = batch * stride_gb + tl.cast(t, tl.int64) * stride_gt + h
    else:
        place = (batch * T + t) * H + h
    gate = tl.load(g + place, mask=t < T, other=0.0).to(tl.float32)
    if RAW:
        u = tl.where(t < T, softplus(gate + tl.load(bias + h).to(tl.float32)), 0.0)
        gate = -u * tl.exp(tl.load(A_log + h).to(tl.float32))
    elif SCALE:
        u = tl.load(scale + place, mask=t < T, other=0.0)
    else:
        u = tl.full((Q,), 1.0, tl.float32)
    reach = lane[None, :] <= lane[:, None]
    first = tl.full((Q,), 1.0, tl.float32)
    last = tl.full((Q,), 1.0, tl.float32)
    keep = 1.0
    if DOCUMENTS:
        begin = tl.load(firsts + batch * T + tl.minimum(t, T - 1))
        end_begin = tl.load(firsts + batch * T + tl.minimum(start + Q - 1, T - 1))
        before = tl.maximum(start - 1, 0)
        reach = reach & (lane[None, :] >= (begin - start)[:, None])
        first = tl.where(begin <= before, 1.0, 0.0)
        last = tl.where(t >= end_begin, 1.0, 0.0)
        keep = tl.where(end_begin <= before, 1.0, 0.0)
    b = tl.sum(tl.where(reach, gate[None, :], 0.0), axis=1)
    b_end = tl.sum(gate * last, axis=0)
    return b, b_end, u, reach, first, last, keep


@triton.jit
def state_step(state, k_tile, v_tile, b, b_end, u, last, keep, DOT: tl.constexpr):
    """The state after a tile: keep e^(b_end) S + k^T (last e^(b_end - b) u v).

    All exponents are at most 0. `minimum` guards lanes that the mask zeroes: their exponents are differences
    between documents, without a bound.
    """
    to_end = last * tl.exp(tl.minimum(b_end - b, 0.0)) * u
    weighted = (v_tile.to(tl.float32) * to_end[:, None]).to(DOT)
    scaled = state * (keep * tl.exp(b_end))
    return tl.dot(tl.trans(k_tile), weighted, scaled, input_precision="tf32x3")


@triton.jit
def chunk_state_kernel(
    q, k, v, g, scale, A_log, bias, skip, firsts, initial, y, entering, final, decay,
    T, H, R, K, V, chunks, segments, segment_chunks,
    stride_qb, stride_qt, stride_kb, stride_kt, stride_vb, stride_vt, stride_gb, stride_gt,
    Q: tl.constexpr, TILES: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, DOT: tl.constexpr,
    DOCUMENTS: tl.constexpr, SCALE: tl.constexpr, RAW: tl.constexpr, SKIP: tl.constexpr,
    INITIAL: tl.constexpr, OUTPUT: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    """One program walks one segment of a row for one head and one block of V; the state never leaves the chip.

    A step is a tile of Q tokens, a chunk TILES of them. initial and final are [B, segments, H, K, V], decay [B, segments,
    H]; y is made with OUTPUT, and with SAVE entering [B, chunks, H, K, V], the states that enter the chunks.

    Grid: (B * H * blocks of V, segments). q and k [B, T, G, K] and v [B, T, H, V] are packed in their last two
    dimensions, with strides of rows and tokens, as g [B, T, H] has (`tile_gates`); y [B, T, H, V] is contiguous. entering has the
    dtype of v, final and decay are float32. Products take operands of DOT and add up in float32.
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
    k_lane, v_lane = tl.arange(0, BLOCK_K)[:, None], tl.arange(0, BLOCK_V)[None, :]
    in_state = (k_lane < K) & (v_first + v_lane < V)
    state_base = ((batch * segments + segment) * H + h) * K * V + v_first
    place = k_lane * V + v_lane
    state = tl.zeros((BLOCK_K, BLOCK_V), tl.float32)
    if INITIAL:
        state = tl.load(initial + state_base + place, mask=in_state, other=0.0).to(tl.float32)
    total = 1.0
    if SKIP:
        through = tl.load(skip + h).to(tl.float32)
    begin = segment * segment_chunks * TILES
    # What does not change stays in the loop: in registers it would spill.
    for tile in tl.range(begin, tl.minimum(begin + segment_chunks * TILES, tl.cdiv(T, Q)), disable_licm=True):
        start = tile * Q
        if SAVE:
            # A mask, since a branch takes the registers that a walk from a state lacks.
            at = ((batch * chunks + tile // TILES) * H + h) * K * V + v_first
            tl.store(entering + at + place, state.to(entering.dtype.element_ty), mask=in_state & (tile % TILES == 0))
        b, b_end, u, reach, first, last, keep = tile_gates(
            g, scale, A_log, bias, firsts, batch, start, T, h, H, stride_gb, stride_gt, Q, DOCUMENTS, SCALE, RAW
        )
        k_tile = load_operand(k_base, start, T, stride_kt, K, Q, BLOCK_K, DOT)
        v_tile = load_operand(v_base, start, T, stride_vt, V - v_first, Q, BLOCK_V, DOT)
        if OUTPUT:
            q_tile = load_operand(q_base, start, T, stride_qt, K, Q, BLOCK_K, DOT)
            scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="tf32x3")
            inside = tl.where(reach, tl.exp(tl.minimum(b[:, None] - b[None, :], 0.0)), 0.0) * u[None, :]
            across = tl.dot(q_tile, state.to(DOT), input_precision="tf32x3") * (first * tl.exp(b))[:, None]
            out = tl.dot((scores * inside).to(DOT), v_tile, across, input_precision="tf32x3")
            if SKIP:
                out = out + v_tile.to(tl.float32) * through
            lane = tl.arange(0, Q)[:, None]
            where = y + (row + start) * (H * V) + h * V + v_first + (lane * (H * V) + v_lane)
            tl.store(where, out.to(y.dtype.element_ty), mask=(lane < T - start) & (v_first + v_lane < V))
        state = state_step(state, k_tile, v_tile, b, b_end, u, last, keep, DOT)
        # What this segment leaves of a state: 0 once a document has ended in it.
        total = total * keep * tl.exp(b_end)
    tl.store(final + state_base + place, state, mask=in_state)
    # Programs of one head differ in V only and have the same decay; one of them writes it.
    if v_first == 0:
        tl.store(decay + (batch * segments + segment) * H + h, total)
