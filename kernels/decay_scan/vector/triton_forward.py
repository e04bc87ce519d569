"""The scan with a gate of each key channel: a tile's own part, then one walk over tiles, in Triton. Formulas: README.md here.

How: `prepare_kernel` does the halving once a tile and head, which needs every channel of a head but no state;
the walk, which is sequential, is left with three products per tile. Done in one kernel the powers would be taken
again by each program of a block of V. Tiles are at most 64 tokens: 6 levels.
"""

# Triton reads a kernel's parameters from the call: they carry no types.
# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: ANN201

from __future__ import annotations

import triton
import triton.language as tl

from amfm.kernels.common.tiles import load_operand


@triton.jit
def load_gates(
    g_base, firsts, row, start, T, stride, size, Q: tl.constexpr, PART: tl.constexpr, DOCUMENTS: tl.constexpr
):
    """Gates of a tile [Q, PART], -inf at tokens that begin a document but the row's first: nothing before reaches past.

    Gates are float32, [B, T, H, K] contiguous; tokens beyond the row get 0.
    """
    gate = load_operand(g_base, start, T, stride, size, Q, PART, tl.float32)
    if DOCUMENTS:
        t = start + tl.arange(0, Q)
        begin = tl.load(firsts + row + tl.minimum(t, T - 1))
        gate = tl.where(((begin == t) & (t > 0))[:, None], -float("inf"), gate)
    return gate


@triton.jit
def power_inside(starts, ends, half, Q: tl.constexpr):
    """What decays a query in a second half from the middle of its block, and a key in a first half to there.

    [Q, PART], each at most 1; `half` is the size of a half, a power of two, so a bit of the token's place tells
    its half.
    """
    lane = tl.arange(0, Q)[:, None]
    return tl.exp(tl.where((lane & half) != 0, starts, ends))


@triton.jit
def join_halves(starts, ends, half, Q: tl.constexpr, PART: tl.constexpr):
    """Sums of gates in blocks of 2 half tokens, from those in their halves: up to each token, and after it to the end.

    `starts` of the last token of a half is the half's whole sum: the second half's `starts` grow by that of the
    first, the first half's `ends` by that of the second. Nothing is subtracted, so -inf stays -inf. `gather`
    fetches that one row.
    """
    lane = tl.arange(0, Q)[:, None]
    last_of_other = (lane ^ half) | (half - 1)
    other = tl.gather(starts, tl.broadcast_to(last_of_other, (Q, PART)), axis=0)
    is_second = (lane & half) != 0
    return starts + tl.where(is_second, other, 0.0), ends + tl.where(is_second, 0.0, other)


@triton.jit
def last_row(x, Q: tl.constexpr):
    """The last row of a tile, [1, columns].

    A masked sum: a tile in registers cannot be indexed by row.
    """
    return tl.sum(tl.where(tl.arange(0, Q)[:, None] == Q - 1, x, 0.0), axis=0)[None, :]


@triton.jit
def prepare_kernel(
    q, k, g, firsts, q_start, k_end, scores, decay, T, H, K, stride_qb, stride_qt, stride_kb, stride_kt,
    Q: tl.constexpr, LEVELS: tl.constexpr, PART: tl.constexpr, DOT: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """What a tile of Q = 2^LEVELS tokens needs of q, k and g, so that the walks only multiply; one program per tile and
    head.

    With the gates summed up to each token (starts) and after it (ends): q_start = e^starts q and k_end = e^ends k, both
    [B, T, H, K]; decay [B, tiles, H, K], e to the sum over the tile; scores [B, T, H, Q], the weights of its own tokens.
    PART channels at a time.

    Two tokens part at the middle of the smallest aligned block of 2^n tokens that holds both: the later one's query and the
    earlier one's key are decayed to there, a product a level.

    Grid: (B * tiles, H). Operands of products are rounded to DOT after the powers, which are float32.
    """
    tiles = tl.cdiv(T, Q)
    batch, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    h = tl.program_id(1)
    row, start = batch * T, tile * Q
    lane, column, token = tl.arange(0, Q)[:, None], tl.arange(0, PART)[None, :], tl.arange(0, Q)[None, :]
    total = tl.zeros((Q, Q), tl.float32)
    here = (row + start) * (H * K) + h * K
    for part in tl.range(0, K, PART, disable_licm=True):
        width = K - part
        q_base, k_base = q + batch * stride_qb + h * K + part, k + batch * stride_kb + h * K + part
        q_tile = load_operand(q_base, start, T, stride_qt, width, Q, PART, DOT).to(tl.float32)
        k_tile = load_operand(k_base, start, T, stride_kt, width, Q, PART, DOT).to(tl.float32)
        total += tl.where(lane == token, tl.sum(q_tile * k_tile, axis=1)[:, None], 0.0)
        g_base = g + row * (H * K) + h * K + part
        starts = load_gates(g_base, firsts, row, start, T, H * K, width, Q, PART, DOCUMENTS)
        ends = tl.zeros((Q, PART), tl.float32)
        for level in tl.range(0, LEVELS, disable_licm=True):
            half = 1 << level
            power = power_inside(starts, ends, half, Q)
            product = tl.dot((q_tile * power).to(DOT), tl.trans((k_tile * power).to(DOT)), input_precision="tf32x3")
            # Pairs of this level: their places agree above the half's bit and differ in it. Above the diagonal
            # such pairs exist too; they are cleared at the end.
            total += tl.where((lane ^ token) // half == 1, product, 0.0)
            starts, ends = join_halves(starts, ends, half, Q, PART)
        where = here + part + (lane * (H * K) + column)
        inside = (lane < T - start) & (column < width)
        tl.store(q_start + where, (q_tile * tl.exp(starts)).to(q_start.dtype.element_ty), mask=inside)
        tl.store(k_end + where, (k_tile * tl.exp(ends)).to(k_end.dtype.element_ty), mask=inside)
        place = ((batch * tiles + tile) * H + h) * K + part + column
        tl.store(decay + place, tl.exp(last_row(starts, Q)), mask=column < width)
    total = tl.where(token <= lane, total, 0.0)
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

    Grid: (B * H * blocks of V, segments). q_start and k_end hold their decay already, so the state's update is
    one product and one factor for each row of the state.
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
        k_tile = load_operand(k_end + qk_base, start, T, H * K, K, Q, BLOCK_K, DOT)
        v_tile = load_operand(v_base, start, T, stride_vt, V - v_first, Q, BLOCK_V, DOT)
        if OUTPUT:
            q_tile = load_operand(q_start + qk_base, start, T, H * K, K, Q, BLOCK_K, DOT)
            own = load_operand(scores + (row * H + h) * Q, start, T, H * Q, Q, Q, Q, DOT)
            out = tl.dot(q_tile, state.to(DOT), input_precision="tf32x3")
            out = tl.dot(own, v_tile, out, input_precision="tf32x3")
            lane = tl.arange(0, Q)[:, None]
            where = o + (row + start) * (H * V) + h * V + v_first + (lane * (H * V) + v_lane)
            tl.store(where, out.to(o.dtype.element_ty), mask=(lane < T - start) & (v_first + v_lane < V))
        leaves = load_decay(decay, batch, tiles, tile, h, H, K, BLOCK_K)
        state = tl.dot(tl.trans(k_tile), v_tile, state * leaves, input_precision="tf32x3")
        left = left * leaves
    tl.store(final + state_base + place, state, mask=in_state)
    if v_first == 0:
        tl.store(total + ((batch * segments + segment) * H + h) * K + k_lane, left, mask=k_lane < K)
