"""The gradient of the gated delta product as two Triton kernels: a walk back for states and values, then the rest by chunk.

No product here takes the transpose of another product's result: on Hopper, Triton 3.4 to 3.7.0 makes wrong numbers of
that.

How: the walk back mirrors the forward walk with transposed matrices, which it loads transposed, and leaves dv
and the gradients of the states that leave chunks. From then on chunks are independent. beta and the gates get
their gradients as row sums of products that exist anyway (README.md, "Gradients").
"""

# Triton reads a kernel's parameters from the call: they carry no types.
# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: ANN201

from __future__ import annotations

import triton
import triton.language as tl

from amfm.kernels.delta_scan.triton_forward import (
    chunk_gates,
    chunk_tokens,
    load_steps,
    load_tokens,
    read_reach,
    sum_gates,
)


@triton.jit
def load_transposed(base, start, rows, stride, Q: tl.constexpr, ROWS: tl.constexpr, DOT: tl.constexpr):
    """The transpose [Q, ROWS] of rows start.. of a matrix of Q columns, of which `rows` exist.

    The load turns the matrix around, so that it need not be transposed in registers.
    """
    lane, column = tl.arange(0, ROWS)[None, :], tl.arange(0, Q)[:, None]
    first = base + tl.cast(start, tl.int64) * stride
    return tl.load(first + (lane * stride + column), mask=(lane < rows) & (column < Q), other=0.0).to(DOT)


@triton.jit
def walk_back_kernel(
    q, k, inverse, scores, enter, leave, carry, d_o, d_final, leaving, d_v, d_initial,
    T, H, R, K, V, chunks, stride_qb, stride_qt, stride_kb, stride_kt, stride_kn,
    Q: tl.constexpr, QT: tl.constexpr, N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    DOT: tl.constexpr, D_FINAL: tl.constexpr,
):  # fmt: skip
    """Walk a row backward for one head and one block of V, with the state's gradient on chip.

    Writes d_v [B, T N, H, V], leaving [B, chunks, H, K, V], the gradients of the states that leave the chunks, and
    d_initial [B, H, K, V].

    Grid: (B * H * blocks of V). d_o [B, T, H, V] contiguous; leaving and d_v are in the dtype of d_o.
    """
    v_blocks = tl.cdiv(V, BLOCK_V)
    v_first = tl.program_id(0) % v_blocks * BLOCK_V
    head = tl.program_id(0) // v_blocks
    batch, h = (head // H).to(tl.int64), head % H
    row, width = batch * T, V - v_first
    q_base = q + batch * stride_qb + h // R * K
    k_base = k + batch * stride_kb + h // R * K
    do_base = d_o + row * (H * V) + h * V + v_first
    lane, token, v_lane = tl.arange(0, Q), tl.arange(0, QT), tl.arange(0, BLOCK_V)[None, :]
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
        at = (row * N + start + lane) * H + h
        inside = start + lane < T * N
        into = tl.load(enter + at, mask=inside, other=0.0)
        out_of = tl.load(leave + at, mask=inside, other=0.0)
        kept = tl.load(carry + (batch * chunks + c) * H + h)
        tokens = chunk_tokens(start, T, Q, N)
        at = ((row + start // N + token) * N + (N - 1)) * H + h
        at_read = tl.load(enter + at, mask=token < tokens, other=0.0)
        k_tile = load_steps(k_base, start, T, stride_kt, stride_kn, K, Q, N, BLOCK_K, DOT)
        do_tile = load_tokens(do_base, start, T, H * V, width, Q, QT, N, BLOCK_V, DOT)
        read = load_transposed(scores + row * (H * Q) + h * Q, start // N, tokens, H * Q, Q, QT, DOT)
        solved = load_transposed(inverse + row * N * (H * Q) + h * Q, start, T * N - start, H * Q, Q, Q, DOT)
        d_error = tl.dot(k_tile, d_state.to(DOT), input_precision="tf32x3") * out_of[:, None]
        d_error = tl.dot(read, do_tile, d_error, input_precision="tf32x3")
        # The transposed inverse times beta du (both terms above hold beta): the gradient of v.
        d_found = tl.dot(solved, d_error.to(DOT), input_precision="tf32x3")
        where = d_v + (row * N + start) * (H * V) + h * V + v_first + (lane[:, None] * (H * V) + v_lane)
        tl.store(where, d_found.to(d_v.dtype.element_ty), mask=inside[:, None] & (v_lane < width))
        q_tile = load_tokens(q_base, start, T, stride_qt, K, Q, QT, N, BLOCK_K, DOT)
        from_read = (do_tile.to(tl.float32) * at_read[:, None]).to(DOT)
        d_state = tl.dot(tl.trans(q_tile), from_read, d_state * kept, input_precision="tf32x3")
        from_found = (d_found * -into[:, None]).to(DOT)
        d_state = tl.dot(tl.trans(k_tile), from_found, d_state, input_precision="tf32x3")
    tl.store(d_initial + state_base + place, d_state, mask=in_state)


@triton.jit
def steps_products(
    do_base, dv_base, errors_base, start, T, H, V,
    Q: tl.constexpr, QT: tl.constexpr, N: tl.constexpr, BLOCK_V: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """do r^T and dv r^T of a chunk, with the errors r of its steps.

    Returns [QT, Q] and [Q, Q] float32, summed over V.
    """
    by_read = tl.zeros((QT, Q), tl.float32)
    by_found = tl.zeros((Q, Q), tl.float32)
    for v_first in tl.range(0, V, BLOCK_V, disable_licm=True):
        width = V - v_first
        do_tile = load_tokens(do_base + v_first, start, T, H * V, width, Q, QT, N, BLOCK_V, DOT)
        dv_tile = load_steps(dv_base + v_first, start, T, N * H * V, H * V, width, Q, N, BLOCK_V, DOT)
        error = load_steps(errors_base + v_first, start, T, N * H * V, H * V, width, Q, N, BLOCK_V, DOT)
        by_read = tl.dot(do_tile, tl.trans(error), by_read, input_precision="tf32x3")
        by_found = tl.dot(dv_tile, tl.trans(error), by_found, input_precision="tf32x3")
    return by_read, by_found


@triton.jit
def states_products(
    do_base, dv_base, errors_base, entering, leaving, along, start, T, H, height, V,
    Q: tl.constexpr, QT: tl.constexpr, N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """do S^T, dv S^T, r dS^T for BLOCK_K rows of the states, of which `height` exist, and `along` plus the sum of S * dS.

    Returns [QT, BLOCK_K], [Q, BLOCK_K] twice and a number. `along` times the chunk's decay is what the gradient
    of b_end gets from the entering state.
    """
    k_lane, v_lane = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    place = k_lane[:, None] * V + v_lane[None, :]
    from_read = tl.zeros((QT, BLOCK_K), tl.float32)
    from_found = tl.zeros((Q, BLOCK_K), tl.float32)
    written = tl.zeros((Q, BLOCK_K), tl.float32)
    for v_first in tl.range(0, V, BLOCK_V, disable_licm=True):
        width = V - v_first
        in_state = (k_lane < height)[:, None] & (v_lane < width)[None, :]
        state = tl.load(entering + v_first + place, mask=in_state, other=0.0).to(DOT)
        d_state = tl.load(leaving + v_first + place, mask=in_state, other=0.0).to(DOT)
        along += tl.sum(tl.sum(state.to(tl.float32) * d_state.to(tl.float32), axis=1), axis=0)
        do_tile = load_tokens(do_base + v_first, start, T, H * V, width, Q, QT, N, BLOCK_V, DOT)
        dv_tile = load_steps(dv_base + v_first, start, T, N * H * V, H * V, width, Q, N, BLOCK_V, DOT)
        error = load_steps(errors_base + v_first, start, T, N * H * V, H * V, width, Q, N, BLOCK_V, DOT)
        from_read = tl.dot(do_tile, tl.trans(state), from_read, input_precision="tf32x3")
        from_found = tl.dot(dv_tile, tl.trans(state), from_found, input_precision="tf32x3")
        written = tl.dot(error, tl.trans(d_state), written, input_precision="tf32x3")
    return from_read, from_found, written, along


@triton.jit
def gradients_kernel(
    q, k, beta, g, firsts, enter, d_o, d_v, errors, entering, leaving, d_q, d_k, d_beta, d_g,
    T, H, R, K, V, chunks, stride_qb, stride_qt, stride_kb, stride_kt, stride_kn,
    Q: tl.constexpr, QT: tl.constexpr, N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    DOT: tl.constexpr, GATE: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """One program for a chunk and head: gradients of q, k, beta and g from those of the walks.

    K is taken BLOCK_K columns at a time, V BLOCK_V. d_q [R, B, T, G, K] and d_k [R, B, T N, G, K] are to be summed over the
    R heads of a group.

    Grid: (B * chunks, H). Each head writes its own share of d_q and d_k, which PyTorch adds up in order:
    atomics would change bits from run to run.
    """
    batch, c = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks
    h = tl.program_id(1)
    group, r, groups = h // R, h % R, H // R
    row, start = batch * T, c * Q
    lane, token = tl.arange(0, Q), tl.arange(0, QT)
    tokens = chunk_tokens(start, T, Q, N)
    inside = start + lane < T * N
    do_base = d_o + row * (H * V) + h * V
    dv_base, errors_base = d_v + row * N * (H * V) + h * V, errors + row * N * (H * V) + h * V
    by_read, by_found = steps_products(do_base, dv_base, errors_base, start, T, H, V, Q, QT, N, BLOCK_V, DOT)
    gate, b_end, reach, _, last, keep = chunk_gates(g, firsts, row, start, T, h, H, Q, N, GATE, DOCUMENTS)
    reads = read_reach(firsts, row, start, T, Q, QT, N, DOCUMENTS)
    b, b_read = sum_gates(gate, reach), sum_gates(gate, reads)
    strict = reach & (lane[None, :] < lane[:, None])
    fall = tl.where(strict, tl.exp(tl.minimum(b[:, None] - b[None, :], 0.0)), 0.0)
    by_found = (-by_found * fall).to(DOT)
    fall = tl.where(reads, tl.exp(tl.minimum(b_read[:, None] - b[None, :], 0.0)), 0.0)
    by_read = by_read * fall
    # With one step a token: what it reads of its own step does not decay, but would be the largest term on both sides of
    # the gate's sums, where products of bfloat16 round it twice.
    own = tl.zeros((QT,), tl.float32)
    if N == 1:
        own = tl.sum(tl.where(lane[None, :] == token[:, None], by_read, 0.0), axis=1)
        by_read = tl.where(lane[None, :] == token[:, None], 0.0, by_read)
    by_read = by_read.to(DOT)
    out_of = last * tl.exp(tl.minimum(b_end - b, 0.0))
    at = (row * N + start + lane) * H + h
    write = tl.load(beta + at, mask=inside, other=0.0)
    into = tl.load(enter + at, mask=inside, other=0.0)
    at_read = tl.load(enter + ((row + start // N + token) * N + (N - 1)) * H + h, mask=token < tokens, other=0.0)

    d_write = tl.zeros((Q,), tl.float32)
    d_b = tl.zeros((Q,), tl.float32)
    d_b_read = tl.zeros((QT,), tl.float32)
    d_end, carried = 0.0, 0.0
    k_lane = tl.arange(0, BLOCK_K)
    for k_first in tl.range(0, K, BLOCK_K, disable_licm=True):
        height = K - k_first
        state_at = ((batch * chunks + c) * H + h) * K * V + k_first * V
        dq_tile, dk_tile, written, carried = states_products(
            do_base, dv_base, errors_base, entering + state_at, leaving + state_at, carried, start, T, H, height, V,
            Q, QT, N, BLOCK_K, BLOCK_V, DOT,
        )  # fmt: skip
        k_base = k + batch * stride_kb + group * K + k_first
        k_tile = load_steps(k_base, start, T, stride_kt, stride_kn, height, Q, N, BLOCK_K, DOT)
        q_base = q + batch * stride_qb + group * K + k_first
        q_tile = load_tokens(q_base, start, T, stride_qt, height, Q, QT, N, BLOCK_K, DOT)
        keys = k_tile.to(tl.float32)
        weighted = (keys * write[:, None]).to(DOT)
        dq_tile = tl.dot(by_read, weighted, dq_tile * at_read[:, None], input_precision="tf32x3")
        dk_tile = tl.dot(by_found, weighted, dk_tile * -into[:, None], input_precision="tf32x3")
        written = written * out_of[:, None]
        d_end += tl.sum(tl.sum(written * keys, axis=1) * write, axis=0)
        # Products with the transposes of by_read and by_found, as the transpose of products that take them as they are.
        from_scores = tl.dot(tl.trans(q_tile), by_read, input_precision="tf32x3")
        from_scores = tl.dot(tl.trans(k_tile), by_found, from_scores, input_precision="tf32x3")
        written += tl.trans(from_scores)
        along = tl.sum(written * keys, axis=1)
        d_write += along
        d_b += tl.sum(dk_tile * keys, axis=1) - along * write
        d_b_read += tl.sum(dq_tile * q_tile.to(tl.float32), axis=1)
        if N == 1:
            queries = q_tile.to(tl.float32) * own[:, None]
            d_write += tl.sum(queries * keys, axis=1)
            dq_tile += keys * (own * write)[:, None]
            written += queries
        dk_tile += written * write[:, None]
        share = r * (tl.num_programs(0) // chunks).to(tl.int64) * T
        column = (k_lane < height)[None, :]
        where = d_q + ((share + row + start // N) * groups + group) * K + k_first
        where += token[:, None] * (groups * K) + k_lane[None, :]
        tl.store(where, dq_tile.to(d_q.dtype.element_ty), mask=(token < tokens)[:, None] & column)
        where = d_k + (((share + row) * N + start) * groups + group) * K + k_first
        where += lane[:, None] * (groups * K) + k_lane[None, :]
        tl.store(where, dk_tile.to(d_k.dtype.element_ty), mask=inside[:, None] & column)

    tl.store(d_beta + (row * N + start + lane) * H + h, d_write, mask=inside)
    if GATE:
        d_end += keep * tl.exp(b_end) * carried
        # A token's gate is in the sums of all steps after it in its document.
        d_gate = tl.sum(tl.where(reach, d_b[:, None], 0.0), axis=0)
        d_gate += tl.sum(tl.where(reads, d_b_read[:, None], 0.0), axis=0) + last * d_end
        where = d_g + (row + (start + lane) // N) * H + h
        tl.store(where, d_gate, mask=inside & ((start + lane) % N == 0))
