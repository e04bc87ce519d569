"""The gated delta product in Triton: each chunk's triangular inverse, then one walk over a row with the state on chip.

A row is a sequence of steps, N a token, cut into chunks of Q steps wherever they end. Names and formulas: README.md here.

How: `prepare_kernel` runs one program per chunk and head and leaves the inverse X, the weights of what tokens
read, and the factors of entering and leaving states; the walk, which is sequential, is then five products per
chunk, or three where only states are wanted. A chunk has at most 64 steps. DeltaProduct's N steps per token are a
row of T N steps, of which only the first decays and only the last is read.
"""

# Triton reads a kernel's parameters from the call: they carry no types.
# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: ANN201

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def chunk_gates(
    g, firsts, row, start, T, h, H,
    Q: tl.constexpr, N: tl.constexpr, GATE: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """Of one chunk and head: the gates of its steps, b_end, and the masks reach[i, j], first, last and keep (floats).

    g [B, T, H] float32; firsts [B, T] int32. gate, first and last are [Q] float32, reach is [Q, Q].
    """
    lane = tl.arange(0, Q)
    token = (start + lane) // N
    # A token decays the state once, before its first step.
    gate = tl.zeros((Q,), tl.float32)
    if GATE:
        gate = tl.load(g + (row + token) * H + h, mask=(token < T) & ((start + lane) % N == 0), other=0.0)
    reach = lane[None, :] <= lane[:, None]
    first = tl.full((Q,), 1.0, tl.float32)
    last = tl.full((Q,), 1.0, tl.float32)
    keep = 1.0
    if DOCUMENTS:
        begin = tl.load(firsts + row + tl.minimum(token, T - 1)) * N
        end_begin = tl.load(firsts + row + tl.minimum((start + Q - 1) // N, T - 1)) * N
        before = tl.maximum(start - 1, 0)
        reach = reach & (lane[None, :] >= (begin - start)[:, None])
        first = tl.where(begin <= before, 1.0, 0.0)
        last = tl.where(start + lane >= end_begin, 1.0, 0.0)
        keep = tl.where(end_begin <= before, 1.0, 0.0)
    return gate, tl.sum(gate * last, axis=0), reach, first, last, keep


@triton.jit
def read_reach(
    firsts, row, start, T,
    Q: tl.constexpr, QT: tl.constexpr, N: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """reach[i, j]: whether the i-th token whose last step is in the chunk reads what step j of the chunk wrote.

    [QT, Q]; QT is the number of tokens padded to what products take.
    """
    lane = tl.arange(0, Q)
    token = start // N + tl.arange(0, QT)
    reach = lane[None, :] <= (token * N + (N - 1) - start)[:, None]
    if DOCUMENTS:
        begin = tl.load(firsts + row + tl.minimum(token, T - 1)) * N
        reach = reach & (lane[None, :] >= (begin - start)[:, None])
    return reach


@triton.jit
def sum_gates(gate, reach):
    """b: for each row of the mask the sum of the gates in it, so that no document's sum holds another's rounding.

    [Q] or [QT] float32.
    """
    return tl.sum(tl.where(reach, gate[None, :], 0.0), axis=1)


@triton.jit
def load_steps(
    base, start, T, stride_t, stride_n, size,
    Q: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Steps start..start+Q of a [T, N, size] tensor as operands of products, zeros outside; wider would spill registers.

    A step s is row s % N of token s / N, so a tile may begin inside a token.
    """
    lane, column = tl.arange(0, Q)[:, None], tl.arange(0, BLOCK)[None, :]
    step = start % N + lane
    inside = (step // N < T - start // N) & (column < size)
    # A wide scalar and narrow offsets: a tile of 64-bit addresses would take as many registers as the state.
    first = base + tl.cast(start // N, tl.int64) * stride_t
    return tl.load(first + (step // N * stride_t + step % N * stride_n + column), mask=inside, other=0.0).to(DOT)


@triton.jit
def load_tokens(
    base, start, T, stride, size,
    Q: tl.constexpr, QT: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Rows of a [T, size] matrix for the tokens whose last step is in the chunk, zeros if there are fewer than QT."""
    lane, column = tl.arange(0, QT)[:, None], tl.arange(0, BLOCK)[None, :]
    inside = (lane < chunk_tokens(start, T, Q, N)) & (column < size)
    first = base + tl.cast(start // N, tl.int64) * stride
    return tl.load(first + (lane * stride + column), mask=inside, other=0.0).to(DOT)


@triton.jit
def chunk_tokens(start, T, Q: tl.constexpr, N: tl.constexpr):
    """How many tokens have their last step in the chunk that begins at step `start`."""
    return tl.minimum((start + Q) // N, T) - start // N


@triton.jit
def join_blocks(strict, inverse, Q: tl.constexpr, SIZE: tl.constexpr, PRECISION: tl.constexpr):
    """From inverses X and Z of neighbouring blocks of SIZE those of blocks twice as large: [[X, 0], [-Z Y X, Z]].

    Products of whole matrices: what is outside the blocks is zero.

    PRECISION is "tf32" for inputs of 16 bits, whose own rounding is not finer, else "tf32x3".
    """
    i, j = tl.arange(0, Q)[:, None], tl.arange(0, Q)[None, :]
    between = tl.where((i // (2 * SIZE) == j // (2 * SIZE)) & (i // SIZE > j // SIZE), strict, 0.0)
    below = tl.dot(inverse, between, input_precision=PRECISION)
    return inverse - tl.dot(below, inverse, input_precision=PRECISION)


@triton.jit
def invert_unit_lower(strict, Q: tl.constexpr, PRECISION: tl.constexpr):
    """(I + strict)^-1 of a matrix that is zero on and above its diagonal.

    Diagonal blocks of 16 by forward substitution, all at once, then joined in pairs until one is left. No power of the
    matrix is taken: its entries could be large.

    [Q, Q] float32; see inverse.py for why not by powers.
    """
    BLOCKS: tl.constexpr = Q // 16
    own = tl.arange(0, BLOCKS)[:, None, None, None] == tl.arange(0, BLOCKS)[None, None, :, None]
    # Only the diagonal blocks, [BLOCKS, 16, 16]: one of the BLOCKS terms is not zero.
    blocks = tl.sum(tl.where(own, tl.reshape(strict, (BLOCKS, 16, BLOCKS, 16)), 0.0), axis=2)
    row, column = tl.arange(0, 16)[None, :, None], tl.arange(0, 16)[None, None, :]
    solved = tl.where((row == column) & (tl.arange(0, BLOCKS)[:, None, None] >= 0), 1.0, 0.0)
    for i in range(1, 16):
        weights = tl.sum(tl.where(row == i, blocks, 0.0), axis=1)
        change = tl.sum(weights[:, :, None] * solved, axis=1)
        solved -= tl.where(row == i, change[:, None, :], 0.0)
    inverse = tl.reshape(tl.where(own, solved[:, :, None, :], 0.0), (Q, Q))
    if Q > 16:
        inverse = join_blocks(strict, inverse, Q, 16, PRECISION)
    if Q > 32:
        inverse = join_blocks(strict, inverse, Q, 32, PRECISION)
    return inverse


@triton.jit
def prepare_kernel(
    q, k, beta, g, firsts, inverse, scores, enter, leave, carry,
    T, H, R, K, chunks, stride_qb, stride_qt, stride_kb, stride_kt, stride_kn,
    Q: tl.constexpr, QT: tl.constexpr, N: tl.constexpr, BLOCK_K: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr, GATE: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """What the walks take of keys and gates, one program for a chunk and head.

    inverse [B, T N, H, Q] and scores [B, T, H, Q] hold the rows of each chunk's matrices; enter and leave [B, T N, H] and
    carry [B, chunks, H] the factors of states that enter and leave it.

    Grid: (B * chunks, H). q [B, T, G, K] and k [B, T, N, G, K] may be slices with packed heads. inverse and
    scores have the dtype of v, the factors are float32; beta is folded into both matrices and into leave.
    """
    batch, c = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks
    h = tl.program_id(1)
    row, start = batch * T, c * Q
    lane = tl.arange(0, Q)
    at = (row * N + start + lane) * H + h
    inside = start + lane < T * N
    write = tl.load(beta + at, mask=inside, other=0.0)
    gate, b_end, reach, first, last, keep = chunk_gates(g, firsts, row, start, T, h, H, Q, N, GATE, DOCUMENTS)
    b = sum_gates(gate, reach)
    tl.store(enter + at, first * tl.exp(b), mask=inside)
    tl.store(leave + at, last * tl.exp(tl.minimum(b_end - b, 0.0)) * write, mask=inside)
    tl.store(carry + (batch * chunks + c) * H + h, keep * tl.exp(b_end))

    k_base = k + batch * stride_kb + h // R * K
    k_tile = load_steps(k_base, start, T, stride_kt, stride_kn, K, Q, N, BLOCK_K, DOT)
    q_tile = load_tokens(q + batch * stride_qb + h // R * K, start, T, stride_qt, K, Q, QT, N, BLOCK_K, DOT)
    strict = reach & (lane[None, :] < lane[:, None])
    fall = tl.where(strict, tl.exp(tl.minimum(b[:, None] - b[None, :], 0.0)), 0.0) * write[None, :]
    overlap = tl.dot(k_tile, tl.trans(k_tile), input_precision="tf32x3") * fall
    solved = invert_unit_lower(overlap, Q, PRECISION)
    place = inverse + (row * N + start) * (H * Q) + h * Q + (lane[:, None] * (H * Q) + lane[None, :])
    tl.store(place, solved.to(inverse.dtype.element_ty), mask=inside[:, None])

    reads = read_reach(firsts, row, start, T, Q, QT, N, DOCUMENTS)
    b_read = sum_gates(gate, reads)
    fall = tl.where(reads, tl.exp(tl.minimum(b_read[:, None] - b[None, :], 0.0)), 0.0) * write[None, :]
    read = tl.dot(q_tile, tl.trans(k_tile), input_precision="tf32x3") * fall
    token = tl.arange(0, QT)[:, None]
    place = scores + (row + start // N) * (H * Q) + h * Q + (token * (H * Q) + lane[None, :])
    tl.store(place, read.to(scores.dtype.element_ty), mask=token < chunk_tokens(start, T, Q, N))


@triton.jit
def chunk_state_kernel(
    q, k, v, inverse, scores, enter, leave, carry, initial, o, entering, errors, final,
    T, H, R, K, V, chunks,
    stride_qb, stride_qt, stride_kb, stride_kt, stride_kn, stride_vb, stride_vt, stride_vn,
    Q: tl.constexpr, QT: tl.constexpr, N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    DOT: tl.constexpr, INITIAL: tl.constexpr, OUTPUT: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    """One program walks a row for one head and one block of V; the state never leaves the chip.

    o [B, T, H, V] is made with OUTPUT; with SAVE entering [B, chunks, H, K, V], the states that enter the
    chunks, and errors [B, T N, H, V], v - S^T k of each step with the state before it.

    Grid: (B * H * blocks of V). R = H / G heads share q and k.
    """
    v_blocks = tl.cdiv(V, BLOCK_V)
    v_first = tl.program_id(0) % v_blocks * BLOCK_V
    head = tl.program_id(0) // v_blocks
    batch, h = (head // H).to(tl.int64), head % H
    row, width = batch * T, V - v_first
    q_base = q + batch * stride_qb + h // R * K
    k_base = k + batch * stride_kb + h // R * K
    v_base = v + batch * stride_vb + h * V + v_first
    lane, v_lane = tl.arange(0, Q), tl.arange(0, BLOCK_V)[None, :]
    k_lane = tl.arange(0, BLOCK_K)[:, None]
    in_state = (k_lane < K) & (v_lane < width)
    place = k_lane * V + v_lane
    state_base = (batch * H + h) * K * V + v_first
    state = tl.zeros((BLOCK_K, BLOCK_V), tl.float32)
    if INITIAL:
        state = tl.load(initial + state_base + place, mask=in_state, other=0.0).to(tl.float32)
    # What does not change stays in the loop: in registers it would spill.
    for c in tl.range(0, chunks, disable_licm=True):
        start = c * Q
        if SAVE:
            at = ((batch * chunks + c) * H + h) * K * V + v_first
            tl.store(entering + at + place, state.to(entering.dtype.element_ty), mask=in_state)
        at = (row * N + start + lane) * H + h
        inside = start + lane < T * N
        into = tl.load(enter + at, mask=inside, other=0.0)
        out_of = tl.load(leave + at, mask=inside, other=0.0)
        kept = tl.load(carry + (batch * chunks + c) * H + h)
        k_tile = load_steps(k_base, start, T, stride_kt, stride_kn, K, Q, N, BLOCK_K, DOT)
        v_tile = load_steps(v_base, start, T, stride_vt, stride_vn, width, Q, N, BLOCK_V, tl.float32)
        solved = load_steps(inverse + row * N * (H * Q) + h * Q, start, T, N * H * Q, H * Q, Q, Q, N, Q, DOT)
        # Rounded once for both products; the state itself stays float32.
        held = state.to(DOT)
        found = v_tile - tl.dot(k_tile, held, input_precision="tf32x3") * into[:, None]
        error = tl.dot(solved, found.to(DOT), input_precision="tf32x3")
        steps = lane[:, None] * (H * V) + v_lane
        if SAVE:
            where = errors + (row * N + start) * (H * V) + h * V + v_first + steps
            tl.store(where, error.to(errors.dtype.element_ty), mask=inside[:, None] & (v_lane < width))
        if OUTPUT:
            tokens = chunk_tokens(start, T, Q, N)
            token = tl.arange(0, QT)
            q_tile = load_tokens(q_base, start, T, stride_qt, K, Q, QT, N, BLOCK_K, DOT)
            read = load_tokens(scores + row * (H * Q) + h * Q, start, T, H * Q, Q, Q, QT, N, Q, DOT)
            at = ((row + start // N + token) * N + (N - 1)) * H + h
            at_read = tl.load(enter + at, mask=token < tokens, other=0.0)
            out = tl.dot(q_tile, held, input_precision="tf32x3") * at_read[:, None]
            out = tl.dot(read, error.to(DOT), out, input_precision="tf32x3")
            where = o + (row + start // N) * (H * V) + h * V + v_first + (token[:, None] * (H * V) + v_lane)
            tl.store(where, out.to(o.dtype.element_ty), mask=(token < tokens)[:, None] & (v_lane < width))
        written = (error * out_of[:, None]).to(DOT)
        state = tl.dot(tl.trans(k_tile), written, state * kept, input_precision="tf32x3")
    tl.store(final + state_base + place, state, mask=in_state)
