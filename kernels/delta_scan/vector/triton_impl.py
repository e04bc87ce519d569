"""The Triton delta rule with a gate of each key channel as an operation that autograd, torch.compile and meta tensors know.

How: as `amfm.kernels.delta_scan.triton_impl`, with one step a token, a key head for each head, and one more launch
in backward, for pairs of tokens; the last kernel takes K in parts. Only inputs are saved.

The delta rule with a gate of each key channel: what a chunk does on its own, then one walk over chunks, in Triton.

Formulas: README.md of delta_scan; gates as sums over halves of halves: kernels/decay_scan/README.md.

How: decays are applied to q and k once here, so that the walks are plain products with no factors of their own;
the inverse is that of the scalar form.
"""

# Triton reads a kernel's parameters from the call: they carry no types.
# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: ANN201

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from amfm.kernels.common.custom_op import differentiate, fake_of
from amfm.kernels.common.inputs import first_tokens, outer_strides, pack, pack_inner
from amfm.kernels.common.limits import VECTOR_DELTA_LIMITS
from amfm.kernels.common.scan_launch import ScanLaunch
from amfm.kernels.common.tiles import load_operand
from amfm.kernels.decay_scan.vector.triton_forward import join_halves, last_row, load_decay, load_gates, power_inside
from amfm.kernels.delta_scan.triton_forward import invert_unit_lower
from amfm.kernels.delta_scan.vector.triton_backward import (
    vector_gradients_kernel,
    vector_pairs_kernel,
    vector_walk_back_kernel,
)
from amfm.kernels.runtime.interpreter import dot_dtype
from amfm.kernels.runtime.tuning import Config


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


# Candidates of each kernel, the fixed one first. PART: key channels that a program takes, or takes at a time.
PREPARE = tuple({"PART": part, "num_warps": warps, "num_stages": 1} for part, warps in ((32, 8), (32, 4), (64, 8)))
PAIRS = tuple({"BLOCK_V": 64, "num_warps": 8, "num_stages": stages} for stages in (2, 1))
GRADIENTS = tuple(
    {"PART": part, "BLOCK_V": columns, "num_warps": warps, "num_stages": 1}
    for part, columns, warps in ((32, 64, 8), (32, 32, 8), (32, 64, 4))
)


def walk_candidates(K: int) -> tuple[Config, ...]:
    """Configurations of the walks: above 128 rows of a state two stages of all tiles do not fit into shared memory."""
    choices = ((32, 4, 2), (32, 8, 2), (64, 8, 2), (32, 4, 1)) if K <= 128 else ((32, 8, 1), (16, 8, 1), (32, 4, 1))
    return tuple({"BLOCK_V": columns, "num_warps": warps, "num_stages": stages} for columns, warps, stages in choices)


def delta_vector_triton(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    beta_BTH: Tensor,
    g_BTHK: Tensor,
    erase_BTHK: Tensor | None,
    initial_state_BHKV: Tensor | None,
    document_ids_BT: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """As `torch_impl.chunked_delta` with one step a token, for float32, bfloat16 and float16; beta, gates and states are float32.

    chunk_size: 16, 32 or a multiple of 64, which runs as 64. Nothing but the inputs is kept for backward. Raises
    ValueError for chunk or key sizes without a kernel.
    """
    dot_dtype(v_BTHV.dtype)  # rejects float64
    VECTOR_DELTA_LIMITS.check(chunk_size, q_BTHK.shape[-1], v_BTHV.shape[-1])
    chunk = min(chunk_size, VECTOR_DELTA_LIMITS.chunk_sizes[-1])
    firsts = None if document_ids_BT is None else first_tokens(document_ids_BT)
    return _forward(q_BTHK, k_BTHK, v_BTHV, beta_BTH, g_BTHK, erase_BTHK, initial_state_BHKV, firsts, chunk)


def _launch(q: Tensor, v: Tensor, chunk_size: int) -> ScanLaunch:
    """Sizes of q [B, T, H, K] and v [B, T, H, V], and the number of chunks in a row."""
    (B, T, H, V), K = v.shape, q.shape[3]
    return ScanLaunch(B, T, H, K, V, chunk_size, triton.cdiv(T, chunk_size))


class _Prepared(NamedTuple):
    """What `vector_prepare_kernel` writes."""

    q_start: Tensor
    k_start: Tensor
    k_end: Tensor
    inverse: Tensor
    scores: Tensor
    decay: Tensor


def _prepare(
    launch: ScanLaunch, q: Tensor, k: Tensor, beta: Tensor, g: Tensor, erase: Tensor | None, firsts: Tensor | None
) -> _Prepared:
    """Launch `vector_prepare_kernel` over all chunks and heads."""
    (B, T, H, K), chunks = q.shape, launch.chunks
    keys, pairs = (q.new_empty(B, T, H, size) for size in (K, launch.Q))
    decay = g.new_empty(B, chunks, H, K)
    prepared = _Prepared(keys, torch.empty_like(keys), torch.empty_like(keys), pairs, torch.empty_like(pairs), decay)
    vector_prepare_kernel[(B * chunks, H)](
        q, k, beta, g, erase, firsts, *prepared, T, H, K, chunks, *outer_strides(q, k), ERASE=erase is not None,
        LEVELS=launch.levels, PRECISION="tf32x3" if q.dtype == torch.float32 else "tf32", DOCUMENTS=firsts is not None,
        **launch.config("vector_delta_prepare", PREPARE, q),
    )  # fmt: skip
    return prepared


def _walk(
    launch: ScanLaunch,
    prepared: _Prepared,
    v: Tensor,
    initial: Tensor | None,
    o: Tensor | None = None,
    entering: Tensor | None = None,
    errors: Tensor | None = None,
) -> Tensor:
    """Walk rows forward, writing what is given of o, entering and errors; returns the last state."""
    p = prepared
    final = v.new_empty(launch.B, launch.H, launch.K, launch.V, dtype=torch.float32)
    grid, constants = launch.walk(
        "vector_delta_states_walk" if o is None else "vector_delta_walk", walk_candidates(launch.K), v
    )
    vector_walk_kernel[grid](
        p.q_start, p.k_start, p.k_end, v, p.inverse, p.scores, p.decay, initial, o, entering, errors, final,
        *launch.sizes, *outer_strides(v), INITIAL=initial is not None, OUTPUT=o is not None, SAVE=entering is not None,
        **constants,
    )  # fmt: skip
    return final


def scan_vector_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor,
    erase: Tensor | None,
    initial: Tensor | None,
    firsts: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """Launch both kernels: output [B, T, H, V] and last state."""
    q, k, v, beta, g = pack_inner(q, 2), pack_inner(k, 2), pack_inner(v, 2), beta.contiguous(), g.contiguous()
    launch = _launch(q, v, chunk_size)
    o = v.new_empty(v.shape)
    return o, _walk(launch, _prepare(launch, q, k, beta, g, pack(erase), firsts), v, pack(initial), o=o)


_forward = torch.library.custom_op("amfm::delta_vector_triton", scan_vector_rows, mutates_args=())


@fake_of(_forward)
def _(given: Any) -> tuple[Tensor, ...]:
    v, K = given.v, given.q.shape[3]
    B, _, H, V = v.shape
    return v.new_empty(v.shape), v.new_empty(B, H, K, V, dtype=torch.float32)


def scan_vector_rows_backward(
    d_o: Tensor,
    d_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor,
    erase: Tensor | None,
    initial: Tensor | None,
    firsts: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, beta, g, erase and the initial state; that of an absent one is empty."""
    q, k, v, beta, g = pack_inner(q, 2), pack_inner(k, 2), pack_inner(v, 2), beta.contiguous(), g.contiguous()
    d_o, d_final, erase = d_o.contiguous(), pack(d_final), pack(erase)
    launch = _launch(q, v, chunk_size)
    (B, T, H, V), K = v.shape, q.shape[3]
    p = _prepare(launch, q, k, beta, g, erase, firsts)
    entering, leaving = launch.chunk_states(v), launch.chunk_states(v)
    errors, d_v = torch.empty_like(d_o), torch.empty_like(d_o)
    _walk(launch, p, v, pack(initial), None, entering, errors)
    d_initial = beta.new_empty(B, H, K, V)
    grid, constants = launch.walk("vector_delta_walk_back", walk_candidates(K), d_o)
    vector_walk_back_kernel[grid](
        p.q_start, p.k_start, p.k_end, p.inverse, p.scores, p.decay, d_o, d_final, leaving, d_v, d_initial,
        *launch.sizes, D_FINAL=d_final is not None, **constants,
    )  # fmt: skip
    # The walk back was the last to read the scores and inverses: gradients of pairs take their place.
    vector_pairs_kernel[(B * launch.chunks, H)](
        d_o, d_v, errors, p.scores, p.inverse, T, H, V, launch.chunks,
        **launch.config("vector_delta_pairs", PAIRS, v),
    )  # fmt: skip
    config = launch.config("vector_delta_gradients", GRADIENTS, v)
    parts = triton.cdiv(K, config["PART"])
    d_q, d_k, d_g = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, g))
    d_beta, d_erase = beta.new_empty(parts, B, T, H), q.new_empty(0) if erase is None else torch.empty_like(erase)
    vector_gradients_kernel[(B * launch.chunks, H * parts)](
        q, k, beta, g, erase, firsts, d_o, d_v, errors, p.scores, p.inverse, entering, leaving, d_q, d_k, d_beta, d_g, d_erase,
        *launch.sizes, *outer_strides(q, k), ERASE=erase is not None, LEVELS=launch.levels, DOCUMENTS=firsts is not None, **config,
    )  # fmt: skip
    d_beta = d_beta[0] if parts == 1 else d_beta.sum(0)
    return d_q, d_k, d_v, d_beta, d_g, d_erase, q.new_empty(0) if initial is None else d_initial.to(initial.dtype)


_backward = torch.library.custom_op("amfm::delta_vector_triton_backward", scan_vector_rows_backward, mutates_args=())


differentiate(_forward, _backward, outputs=("o", "final"), gradients=("q", "k", "v", "beta", "g", "erase", "initial"))
