"""The scan with a gate of each key channel: a tile's own part, then one walk over tiles, in Triton. Formulas: README.md here."""

# Triton reads a kernel's parameters from the call: they carry no types.
# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: ANN201, SIM300

from __future__ import annotations

import triton
import triton.language as tl

from kernels.decay_scan.triton_forward import load_tile


@triton.jit
def tile_masks(firsts, row, start, T, Q: tl.constexpr, DOCUMENTS: tl.constexpr):
    """Of one tile: reach[i, j] for j <= i in one document, first and last [Q, 1], and keep (a float)."""
    lane = tl.arange(0, Q)
    t = start + lane
    reach = lane[None, :] <= lane[:, None]
    first = (t >= start)[:, None]
    last = first
    keep = 1.0
    if DOCUMENTS:
        begin = tl.load(firsts + row + tl.minimum(t, T - 1))
        end_begin = tl.load(firsts + row + tl.minimum(start + Q - 1, T - 1))
        before = tl.maximum(start - 1, 0)
        reach = reach & (lane[None, :] >= (begin - start)[:, None])
        first = (begin <= before)[:, None]
        last = (t >= end_begin)[:, None]
        keep = tl.where(end_begin <= before, 1.0, 0.0)
    return reach, first, last, keep


@triton.jit
def sum_where(mask, x, DOT: tl.constexpr):
    """The sum of the rows of x that each row of a mask selects, as products that keep the digits of float32.

    Three times the 8 bits of bfloat16 are the 24 of float32; of float32 operands the second and third are zero.
    """
    HALF: tl.constexpr = tl.float32 if DOT == tl.float32 else tl.bfloat16
    weights = tl.where(mask, 1.0, 0.0).to(HALF)
    high = x.to(HALF)
    rest = x - high.to(tl.float32)
    middle = rest.to(HALF)
    low = (rest - middle.to(tl.float32)).to(HALF)
    total = tl.dot(weights, low, input_precision="ieee")
    total = tl.dot(weights, middle, total, input_precision="ieee")
    return tl.dot(weights, high, total, input_precision="ieee")


@triton.jit
def sum_gates(g_base, start, T, stride, size, reach, last, Q: tl.constexpr, PART: tl.constexpr, DOT: tl.constexpr):
    """b [Q, PART], the gates summed over a tile from each document's start, and b_end [1, PART].

    A product with a mask, so that the sum of one document never holds another's rounding; three products of halves of
    the digits keep those of float32.
    """
    gate = load_tile(g_base, start, T, stride, size, Q, PART, tl.float32)
    b = sum_where(reach, gate, DOT)
    return b, tl.sum(tl.where(last, gate, 0.0), axis=0)[None, :]


@triton.jit
def power_to_middle(b, half, Q: tl.constexpr, PART: tl.constexpr):
    """e to the sum of gates between each token and the middle of its block of 2 half tokens, on either side of it."""
    lane = tl.arange(0, Q)[:, None]
    middle = tl.gather(b, tl.broadcast_to(lane // (2 * half) * (2 * half) + half, (Q, PART)), axis=0)
    return tl.exp(tl.minimum(tl.where((lane & half) != 0, b - middle, middle - b), 0.0))


@triton.jit
def prepare_kernel(
    q, k, g, firsts, q_start, k_end, scores, decay, T, H, K, stride_qb, stride_qt, stride_kb, stride_kt,
    Q: tl.constexpr, LEVELS: tl.constexpr, PART: tl.constexpr, DOT: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """What a tile of Q = 2^LEVELS tokens needs of q, k and g, so that the walks only multiply; one program a tile and head.

    q_start = first e^b q and k_end = last e^(b_end - b) k, both [B, T, H, K]; scores [B, T, H, Q], the weights of the
    tile's own tokens; decay [B, tiles, H, K] = keep e^(b_end). PART channels at a time.

    Two tokens part at the middle of the smallest aligned block of 2^n tokens that holds both: there the later one's query
    and the earlier one's key are scaled to, a product a level.
    """
    tiles = tl.cdiv(T, Q)
    batch, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    h = tl.program_id(1)
    row, start = batch * T, tile * Q
    reach, first, last, keep = tile_masks(firsts, row, start, T, Q, DOCUMENTS)
    lane, column = tl.arange(0, Q)[:, None], tl.arange(0, PART)[None, :]
    parted = lane ^ tl.arange(0, Q)[None, :]
    total = tl.zeros((Q, Q), tl.float32)
    here = (row + start) * (H * K) + h * K
    for part in tl.range(0, K, PART, disable_licm=True):
        width = K - part
        b, b_end = sum_gates(g + row * (H * K) + h * K + part, start, T, H * K, width, reach, last, Q, PART, DOT)
        q_tile = load_tile(q + batch * stride_qb + h * K + part, start, T, stride_qt, width, Q, PART, DOT).to(
            tl.float32
        )
        k_tile = load_tile(k + batch * stride_kb + h * K + part, start, T, stride_kt, width, Q, PART, DOT).to(
            tl.float32
        )
        where = here + part + (lane * (H * K) + column)
        inside = (lane < T - start) & (column < width)
        from_start = tl.where(first, q_tile * tl.exp(b), 0.0)
        to_end = tl.where(last, k_tile * tl.exp(tl.minimum(b_end - b, 0.0)), 0.0)
        tl.store(q_start + where, from_start.to(q_start.dtype.element_ty), mask=inside)
        tl.store(k_end + where, to_end.to(k_end.dtype.element_ty), mask=inside)
        place = ((batch * tiles + tile) * H + h) * K + part + column
        tl.store(decay + place, keep * tl.exp(b_end), mask=column < width)
        total += tl.where(parted == 0, tl.sum(q_tile * k_tile, axis=1)[:, None], 0.0)
        for level in tl.range(0, LEVELS, disable_licm=True):
            half = 1 << level
            power = power_to_middle(b, half, Q, PART)
            product = tl.dot((q_tile * power).to(DOT), tl.trans((k_tile * power).to(DOT)), input_precision="ieee")
            total += tl.where(parted // half == 1, product, 0.0)
    total = tl.where(reach, total, 0.0)
    token = tl.arange(0, Q)[None, :]
    where = ((row + start) * H + h) * Q + (lane * (H * Q) + token)
    tl.store(scores + where, total.to(scores.dtype.element_ty), mask=lane < T - start)


@triton.jit
def load_decay(decay, batch, tiles, tile, h, H, K, BLOCK_K: tl.constexpr):
    """What a tile leaves of each row of the state, [BLOCK_K, 1]."""
    k_lane = tl.arange(0, BLOCK_K)[:, None]
    return tl.load(decay + ((batch * tiles + tile) * H + h) * K + k_lane, mask=k_lane < K, other=0.0)


@triton.jit
def vector_walk_kernel(
    q_start, k_end, v, scores, decay, initial, o, entering, final, total,
    T, H, K, V, tiles, segments, segment_tiles, stride_vb, stride_vt,
    Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, DOT: tl.constexpr,
    INITIAL: tl.constexpr, OUTPUT: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    """One program walks one segment of a row for one head and one block of V; the state never leaves the chip.

    initial and final are [B, segments, H, K, V], total [B, segments, H, K]; o is made with OUTPUT, and with SAVE entering
    [B, tiles, H, K, V], the states that enter the tiles.
    """
    v_blocks = tl.cdiv(V, BLOCK_V)
    v_first = tl.program_id(0) % v_blocks * BLOCK_V
    head = tl.program_id(0) // v_blocks
    batch, h = (head // H).to(tl.int64), head % H
    segment = tl.program_id(1)
    row = batch * T
    qk_base = row * (H * K) + h * K
    v_base = v + batch * stride_vb + h * V + v_first
    k_lane, v_lane = tl.arange(0, BLOCK_K)[:, None], tl.arange(0, BLOCK_V)[None, :]
    in_state = (k_lane < K) & (v_first + v_lane < V)
    state_base = ((batch * segments + segment) * H + h) * K * V + v_first
    place = k_lane * V + v_lane
    state = tl.zeros((BLOCK_K, BLOCK_V), tl.float32)
    if INITIAL:
        state = tl.load(initial + state_base + place, mask=in_state, other=0.0).to(tl.float32)
    left = tl.full((BLOCK_K, 1), 1.0, tl.float32)
    begin = segment * segment_tiles
    for tile in tl.range(begin, tl.minimum(begin + segment_tiles, tiles), disable_licm=True):
        start = tile * Q
        if SAVE:
            at = ((batch * tiles + tile) * H + h) * K * V + v_first
            tl.store(entering + at + place, state.to(entering.dtype.element_ty), mask=in_state)
        k_tile = load_tile(k_end + qk_base, start, T, H * K, K, Q, BLOCK_K, DOT)
        v_tile = load_tile(v_base, start, T, stride_vt, V - v_first, Q, BLOCK_V, DOT)
        if OUTPUT:
            q_tile = load_tile(q_start + qk_base, start, T, H * K, K, Q, BLOCK_K, DOT)
            own = load_tile(scores + (row * H + h) * Q, start, T, H * Q, Q, Q, Q, DOT)
            out = tl.dot(q_tile, state.to(DOT), input_precision="ieee")
            out = tl.dot(own, v_tile, out, input_precision="ieee")
            lane = tl.arange(0, Q)[:, None]
            where = o + (row + start) * (H * V) + h * V + v_first + (lane * (H * V) + v_lane)
            tl.store(where, out.to(o.dtype.element_ty), mask=(lane < T - start) & (v_first + v_lane < V))
        leaves = load_decay(decay, batch, tiles, tile, h, H, K, BLOCK_K)
        state = tl.dot(tl.trans(k_tile), v_tile, state * leaves, input_precision="ieee")
        left = left * leaves
    tl.store(final + state_base + place, state, mask=in_state)
    if v_first == 0:
        tl.store(total + ((batch * segments + segment) * H + h) * K + k_lane, left, mask=k_lane < K)
