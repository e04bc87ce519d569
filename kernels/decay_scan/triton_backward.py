"""The scan's gradient as two Triton kernels: a walk back for the states' gradients, then one program per tile for the
rest.

No product here takes the transpose of another product's result: on Hopper, Triton 3.4 to 3.7.0 makes wrong numbers of
that. Scores and their gradients are therefore held as [j, i], the writing token first, and sums over states as [K, i].

How: the walk back mirrors forward and writes dS, the gradient of the state that leaves each chunk. After that
tiles are independent, so `gradients_kernel` runs one program per tile and group and sums over the group's heads
on chip, where separate programs would need atomics or a copy of dq and dk for each head. README.md lists what
it took to fit its registers.
"""

# Triton reads a kernel's parameters from the call: they carry no types.
# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: ANN201, SIM102

from __future__ import annotations

import triton
import triton.language as tl

from amfm.kernels.common.silu import sigmoid
from amfm.kernels.common.tiles import load_operand
from amfm.kernels.decay_scan.triton_forward import tile_gates


@triton.jit
def state_step_back(d_state, q_tile, dy_tile, b, b_end, first, keep, DOT: tl.constexpr):
    """The gradient of the state before a tile: keep e^(b_end) dS + q^T (first e^b dy).

    q_tile [Q, BLOCK_K], dy_tile [Q, BLOCK_V], d_state [BLOCK_K, BLOCK_V] float32.
    """
    scaled = (dy_tile.to(tl.float32) * (first * tl.exp(b))[:, None]).to(DOT)
    return tl.dot(tl.trans(q_tile), scaled, d_state * (keep * tl.exp(b_end)), input_precision="tf32x3")


@triton.jit
def walk_back_kernel(
    q, g, A_log, bias, firsts, d_y, d_final, leaving, d_initial, decay,
    T, H, R, K, V, chunks, segments, segment_chunks, stride_qb, stride_qt, stride_gb, stride_gt,
    Q: tl.constexpr, TILES: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, DOT: tl.constexpr,
    DOCUMENTS: tl.constexpr, RAW: tl.constexpr, D_FINAL: tl.constexpr, STORE: tl.constexpr,
):  # fmt: skip
    """Walk a segment backward, a tile of Q tokens per step, for the gradients of the states that leave its chunks.

    leaving is [B, chunks, H, K, V], written with STORE at the end of each chunk of TILES tiles. d_initial [B, segments, H,
    K, V] is made from d_final of the same shape; decay [B, segments, H] is what the segment leaves of a state.

    Grid: (B * H * blocks of V, segments). d_y [B, T, H, V] is contiguous. Without STORE it only finds what each
    segment hands on; a second walk then starts every segment from the right gradient.
    """
    v_blocks = tl.cdiv(V, BLOCK_V)
    v_first = tl.program_id(0) % v_blocks * BLOCK_V
    head = tl.program_id(0) // v_blocks
    batch, h = (head // H).to(tl.int64), head % H
    segment = tl.program_id(1)
    row = batch * T
    q_base = q + batch * stride_qb + h // R * K
    dy_base = d_y + row * H * V + h * V + v_first
    k_lane, v_lane = tl.arange(0, BLOCK_K)[:, None], tl.arange(0, BLOCK_V)[None, :]
    in_state = (k_lane < K) & (v_first + v_lane < V)
    tile = k_lane * V + v_lane
    state_base = ((batch * segments + segment) * H + h) * K * V + v_first
    begin = segment * segment_chunks
    end = tl.minimum(begin + segment_chunks, chunks)
    d_state = tl.zeros((BLOCK_K, BLOCK_V), tl.float32)
    if D_FINAL:
        d_state = tl.load(d_final + state_base + tile, mask=in_state, other=0.0).to(tl.float32)
    total = 1.0
    for step in range(begin * TILES, end * TILES):
        t = (begin + end) * TILES - 1 - step
        if STORE:
            if t % TILES == TILES - 1:
                at = ((batch * chunks + t // TILES) * H + h) * K * V + v_first
                tl.store(leaving + at + tile, d_state.to(leaving.dtype.element_ty), mask=in_state)
        b, b_end, _, _, first, _, keep = tile_gates(
            g, g, A_log, bias, firsts, batch, t * Q, T, h, H, stride_gb, stride_gt, Q, DOCUMENTS, False, RAW
        )
        q_tile = load_operand(q_base, t * Q, T, stride_qt, K, Q, BLOCK_K, DOT)
        dy_tile = load_operand(dy_base, t * Q, T, H * V, V - v_first, Q, BLOCK_V, DOT)
        d_state = state_step_back(d_state, q_tile, dy_tile, b, b_end, first, keep, DOT)
        total = total * keep * tl.exp(b_end)
    tl.store(d_initial + state_base + tile, d_state, mask=in_state)
    if v_first == 0:
        tl.store(decay + (batch * segments + segment) * H + h, total)


@triton.jit
def reading_tokens(firsts, row, start, T, Q: tl.constexpr, DOCUMENTS: tl.constexpr):
    """Mask [j, i] of the tokens i that read what token j wrote: the transpose of `reach` in `tile_gates`.

    Made as [j, i] from the start: transposing `reach` would move it between threads.
    """
    lane = tl.arange(0, Q)
    reads = lane[:, None] <= lane[None, :]
    if DOCUMENTS:
        begin = tl.load(firsts + row + tl.minimum(start + lane, T - 1))
        reads = reads & (lane[:, None] >= (begin - start)[None, :])
    return reads


@triton.jit
def tile_scores(
    q_base, k_base, start, T, stride_qt, stride_kt, K, Q: tl.constexpr, BLOCK_K: tl.constexpr, DOT: tl.constexpr
):
    """k q^T of a tile as an operand of products, [j, i], summed over columns in a loop.

    As one product the compiler would see it feed others, and lay out what they share twice.

    [Q, Q] in DOT.
    """
    PART: tl.constexpr = BLOCK_K if BLOCK_K < 64 else 64
    scores = tl.zeros((Q, Q), tl.float32)
    for column in range(0, K, PART):
        q_part = load_operand(q_base + column, start, T, stride_qt, K - column, Q, PART, DOT)
        k_part = load_operand(k_base + column, start, T, stride_kt, K - column, Q, PART, DOT)
        scores = tl.dot(k_part, tl.trans(q_part), scores, input_precision="tf32x3")
    return scores.to(DOT)


@triton.jit
def value_scores(
    v_base, dy_base, start, T, stride_v, stride_dy, V, Q: tl.constexpr, BLOCK_V: tl.constexpr, DOT: tl.constexpr
):
    """v dy^T of a tile, [j, i]. A separate loop reads v and dy twice, and spares the sum's registers in the other.

    [Q, Q] float32.
    """
    total = tl.zeros((Q, Q), tl.float32)
    for v_first in tl.range(0, V, BLOCK_V, disable_licm=True):
        v_tile = load_operand(v_base + v_first, start, T, stride_v, V - v_first, Q, BLOCK_V, DOT)
        dy_tile = load_operand(dy_base + v_first, start, T, stride_dy, V - v_first, Q, BLOCK_V, DOT)
        total = tl.dot(v_tile, tl.trans(dy_tile), total, input_precision="tf32x3")
    return total


@triton.jit
def gradients_kernel(
    q, k, v, g, scale, A_log, bias, skip, firsts, d_y, entering, leaving, d_q, d_k, d_v, d_g, d_scale, d_heads,
    T, H, R, K, V, chunks, splits,
    stride_qb, stride_qt, stride_kb, stride_kt, stride_vb, stride_vt, stride_gb, stride_gt, stride_dq, stride_dv, stride_dg,
    Q: tl.constexpr, TILES: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, DOT: tl.constexpr,
    DOCUMENTS: tl.constexpr, SCALE: tl.constexpr, RAW: tl.constexpr, SKIP: tl.constexpr,
):  # fmt: skip
    """One program for a tile of Q tokens and a share of a group's heads: what the group shares is summed on chip.

    A chunk of two tiles has its states at its ends only: its first tile derives the gradient of the state in the middle,
    its second the state itself. Heads are walked BLOCK_V columns at a time, and nothing that does not change is moved out
    of the loops: it would stay in registers. d_q and d_k are [splits, B, T, G, K], to be summed over the splits. Gradients
    may be slices of wider tensors, with strides of their tokens: stride_dq of d_q and d_k, stride_dv, stride_dg.

    Grid: (B * tiles of a row, G * splits). entering and leaving [B, chunks, H, K, V] are the states that enter
    chunks and the gradients of those that leave them, in the dtype of v; d_g and d_scale [B, T, H] are those of gate and
    scale, or d_g that of dt with RAW. d_heads: parts of the sums over tokens, [B * tiles of a row, 1, H] for skip, or with
    RAW [B * tiles of a row, 3, H] for A_log, bias and skip.
    """
    tiles = tl.cdiv(T, Q)
    batch, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    group, split = tl.program_id(1) // splits, tl.program_id(1) % splits
    if not RAW:
        # Gradients of their own are packed: strides that are known spare registers.
        stride_dq, stride_dv, stride_dg = tl.num_programs(1) // splits * K, H * V, H
    row, start, c = batch * T, tile * Q, tile // TILES
    q_base, k_base = q + batch * stride_qb + group * K, k + batch * stride_kb + group * K
    q_tile = load_operand(q_base, start, T, stride_qt, K, Q, BLOCK_K, DOT)
    k_tile = load_operand(k_base, start, T, stride_kt, K, Q, BLOCK_K, DOT)
    scores = tile_scores(q_base, k_base, start, T, stride_qt, stride_kt, K, Q, BLOCK_K, DOT)
    d_scores = tl.zeros((Q, Q), tl.float32)
    dq_tile = tl.zeros((BLOCK_K, Q), tl.float32)
    dk_tile = tl.zeros((BLOCK_K, Q), tl.float32)
    lane = tl.arange(0, Q)
    t = start + lane
    k_lane, v_lane = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    leads = tile % 2 == 0
    other = tl.where(leads, start + Q, start - Q)
    share = tl.cdiv(R, splits)
    for r in tl.range(split * share, tl.minimum(split * share + share, R), disable_licm=True):
        h = group * R + r
        b, b_end, u, _, first, last, keep = tile_gates(
            g, scale, A_log, bias, firsts, batch, start, T, h, H, stride_gb, stride_gt, Q, DOCUMENTS, SCALE, RAW
        )
        reads = reading_tokens(firsts, row, start, T, Q, DOCUMENTS)
        # u stays out of `fall`, so that the gradient of u needs no division.
        fall = tl.where(reads, tl.exp(tl.minimum(b[None, :] - b[:, None], 0.0)), 0.0)
        mixed = (scores * fall).to(DOT)
        d_b = tl.zeros((Q,), tl.float32)
        d_u = tl.zeros((Q,), tl.float32)
        carried = 0.0
        if TILES == 2:
            b_o, b_end_o, u_o, _, first_o, last_o, keep_o = tile_gates(
                g, scale, A_log, bias, firsts, batch, other, T, h, H, stride_gb, stride_gt, Q, DOCUMENTS, SCALE, RAW
            )
            weight_o = tl.where(leads, first_o * tl.exp(b_o), last_o * tl.exp(tl.minimum(b_end_o - b_o, 0.0)) * u_o)
        state_at = ((batch * chunks + c) * H + h) * K * V
        to_end = last * tl.exp(tl.minimum(b_end - b, 0.0))
        for v_first in tl.range(0, V, BLOCK_V, disable_licm=True):
            v_base, dy_base = v + batch * stride_vb + h * V + v_first, d_y + row * H * V + h * V + v_first
            width = V - v_first
            v_tile = load_operand(v_base, start, T, stride_vt, width, Q, BLOCK_V, DOT)
            dy_tile = load_operand(dy_base, start, T, H * V, width, Q, BLOCK_V, DOT)
            place = k_lane[:, None] * V + v_lane[None, :]
            in_state = (k_lane < K)[:, None] & (v_lane < width)[None, :]
            state = tl.load(entering + (state_at + v_first) + place, mask=in_state, other=0.0).to(DOT)
            d_state = tl.load(leaving + (state_at + v_first) + place, mask=in_state, other=0.0).to(DOT)
            if TILES == 2:
                x_base, stride_x = tl.where(leads, q_base, k_base), tl.where(leads, stride_qt, stride_kt)
                z_base, stride_z = tl.where(leads, dy_base, v_base), tl.where(leads, H * V, stride_vt)
                x_tile = load_operand(x_base, other, T, stride_x, K, Q, BLOCK_K, DOT)
                z_tile = load_operand(z_base, other, T, stride_z, width, Q, BLOCK_V, DOT)
                z_tile = (z_tile.to(tl.float32) * weight_o[:, None]).to(DOT)
                # One step of the walk, over the other tile: backward from dS for the leading tile, forward from
                # S for the second.
                middle = tl.where(leads, d_state, state).to(tl.float32) * (keep_o * tl.exp(b_end_o))
                middle = tl.dot(tl.trans(x_tile), z_tile, middle, input_precision="tf32x3").to(DOT)
                state = tl.where(leads, state, middle)
                d_state = tl.where(leads, middle, d_state)
            carried += tl.sum(tl.sum(state.to(tl.float32) * d_state.to(tl.float32), axis=1), axis=0)
            # From the state that enters, and into the state that leaves.
            from_start = (dy_tile.to(tl.float32) * (first * tl.exp(b))[:, None]).to(DOT)
            d_b += tl.sum(tl.dot(q_tile, state, input_precision="tf32x3") * from_start.to(tl.float32), axis=1)
            dq_tile = tl.dot(state, tl.trans(from_start), dq_tile, input_precision="tf32x3")
            across = tl.dot(k_tile, d_state, input_precision="tf32x3") * to_end[:, None]
            d_u += tl.sum(v_tile.to(tl.float32) * across, axis=1)
            weighted = (v_tile.to(tl.float32) * (to_end * u)[:, None]).to(DOT)
            dk_tile = tl.dot(d_state, tl.trans(weighted), dk_tile, input_precision="tf32x3")
            # Scaled before they are added: a sum of bare products would become a chain, which holds a tile twice.
            dv_tile = across * u[:, None] + tl.dot(mixed, dy_tile, input_precision="tf32x3") * u[:, None]
            if SKIP:
                through = tl.load(skip + h).to(tl.float32)
                dv_tile += dy_tile.to(tl.float32) * through
            where = d_v + (row + start) * stride_dv + h * V + v_first + (lane[:, None] * stride_dv + v_lane[None, :])
            tl.store(where, dv_tile.to(d_v.dtype.element_ty), mask=(t < T)[:, None] & (v_lane < width)[None, :])

        into = d_u * u
        d_b -= into
        # b_end decays both the entering state and everything the tile writes into the leaving one.
        d_end = tl.sum(into, axis=0) + keep * tl.exp(b_end) * carried
        d_mixed = value_scores(
            v + batch * stride_vb + h * V, d_y + row * H * V + h * V, start, T, stride_vt, H * V, V, Q, BLOCK_V, DOT
        )
        if SKIP:
            # <v, dy> of each token is on the diagonal: summed in the loop above it would spill.
            d_through = tl.sum(tl.sum(tl.where(lane[:, None] == lane[None, :], d_mixed, 0.0), axis=1), axis=0)
        # The same mask and factor as of `fall`, made again: held through the loop above they would spill.
        reads = reading_tokens(firsts, row, start, T, Q, DOCUMENTS)
        d_mixed = tl.where(reads, d_mixed * tl.exp(tl.minimum(b[None, :] - b[:, None], 0.0)), 0.0)
        d_scores += d_mixed * u[:, None]
        flow = d_mixed * scores
        d_u += tl.sum(flow, axis=1)
        # The diagonal has no exponent; leaving it out spares the difference below its largest terms.
        flow = tl.where(lane[:, None] == lane[None, :], 0.0, flow) * u[:, None]
        d_b += tl.sum(flow, axis=0) - tl.sum(flow, axis=1)
        gate = (row + t) * stride_dg + h
        d_gate = tl.sum(tl.where(reads, d_b[None, :], 0.0), axis=1) + last * d_end
        KINDS: tl.constexpr = 3 if RAW else 1
        sums = d_heads + (batch * tiles + tile) * (KINDS * H) + h
        if RAW:
            # Of the gate -u e^A_log, and of u through the softplus; tokens beyond the row have u = 0.
            rate = tl.exp(tl.load(A_log + h).to(tl.float32))
            tl.store(sums, -rate * tl.sum(d_gate * u, axis=0))
            at = batch * stride_gb + tl.cast(t, tl.int64) * stride_gt + h
            dt = tl.load(g + at, mask=t < T, other=0.0).to(tl.float32)
            d_dt = (d_u - d_gate * rate) * sigmoid(dt + tl.load(bias + h).to(tl.float32))
            d_dt = tl.where(t < T, d_dt, 0.0)
            tl.store(sums + H, tl.sum(d_dt, axis=0))
            tl.store(d_g + gate, d_dt.to(d_g.dtype.element_ty), mask=t < T)
        else:
            tl.store(d_g + gate, d_gate, mask=t < T)
        if SCALE:
            tl.store(d_scale + gate, d_u, mask=t < T)
        if SKIP:
            tl.store(sums + (KINDS - 1) * H, d_through)

    tokens = split * (tl.num_programs(0) // tiles).to(tl.int64) * T + row + start
    base = tokens * stride_dq + group * K
    d_scores = d_scores.to(DOT)
    dq_tile = tl.dot(tl.trans(k_tile), d_scores, dq_tile, input_precision="tf32x3")
    where = base + (lane[None, :] * stride_dq + k_lane[:, None])
    tl.store(d_q + where, dq_tile.to(d_q.dtype.element_ty), mask=(t < T)[None, :] & (k_lane < K)[:, None])
    inside = (t < T)[:, None] & (k_lane < K)[None, :]
    # Masked before they are added: a sum of the bare product would feed it the transpose.
    own = tl.where(inside, tl.dot(d_scores, q_tile, input_precision="tf32x3"), 0.0)
    where = base + (lane[:, None] * stride_dq + k_lane[None, :])
    tl.store(d_k + where, (tl.trans(dk_tile) + own).to(d_k.dtype.element_ty), mask=inside)
