"""The Triton delta rule with a gate of each key channel as an operation that autograd, torch.compile and meta tensors know.

How: as `amfm.kernels.delta_scan.triton_impl`, with one step a token, a key head for each head, and one more launch
in backward, for pairs of tokens; the last kernel takes K in parts. Only inputs are saved.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from amfm.kernels.common.custom_op import differentiate, fake_of
from amfm.kernels.common.inputs import first_tokens, outer_strides, pack, pack_inner
from amfm.kernels.common.limits import VECTOR_DELTA_LIMITS
from amfm.kernels.common.scan_launch import ScanLaunch
from amfm.kernels.delta_scan.vector.triton_backward import (
    vector_gradients_kernel,
    vector_pairs_kernel,
    vector_walk_back_kernel,
)
from amfm.kernels.delta_scan.vector.triton_forward import vector_prepare_kernel, vector_walk_kernel
from amfm.kernels.runtime.interpreter import dot_dtype
from amfm.kernels.runtime.tuning import Config

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
