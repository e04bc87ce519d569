"""The Triton scan with a gate of each key channel as an operation that autograd, torch.compile and meta tensors know.

How: forward prepares and walks; backward prepares again instead of keeping q_start, k_end and the scores (2 K +
Q numbers per token and head), walks for states unless forward kept them, walks back, and finishes tile by tile.
Sizes and walks over segments are those of all scans: `amfm.kernels.common.scan_launch`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from amfm.kernels.common.custom_op import differentiate, fake_of
from amfm.kernels.common.inputs import first_tokens, outer_strides, pack, pack_inner
from amfm.kernels.common.limits import VECTOR_GATE_LIMITS
from amfm.kernels.common.scan_launch import ScanLaunch, cut_segments, differentiated
from amfm.kernels.decay_scan.vector.triton_backward import (
    score_gradients_kernel,
    vector_gradients_kernel,
    vector_walk_back_kernel,
)
from amfm.kernels.decay_scan.vector.triton_forward import prepare_kernel, vector_walk_kernel
from amfm.kernels.runtime.interpreter import dot_dtype
from amfm.kernels.runtime.tuning import Config

# Candidates of each kernel, the fixed one first. PART: key channels that a program takes, or takes at a time.
PREPARE = tuple({"PART": part, "num_warps": warps, "num_stages": 1} for part, warps in ((32, 4), (32, 8), (64, 8)))
SCORE_GRADIENTS = tuple({"BLOCK_V": 64, "num_warps": 4, "num_stages": stages} for stages in (2, 3))
GRADIENTS = tuple(
    {"PART": part, "BLOCK_V": columns, "num_warps": warps, "num_stages": 1}
    for part, columns, warps in ((32, 64, 8), (32, 64, 4), (64, 64, 8))
)


def walk_candidates(K: int) -> tuple[Config, ...]:
    """Configurations of the walks: a state of 128 x 64 or of 256 x 32 stays in registers."""
    fixed, other = (64, 32) if K <= 128 else (32, 64)
    choices = ((fixed, 8, 2), (fixed, 4, 2), (other, 8, 2), (fixed, 8, 1))
    return tuple({"BLOCK_V": columns, "num_warps": warps, "num_stages": stages} for columns, warps, stages in choices)


def scan_vector_triton(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    g_BTHK: Tensor,
    initial_state_BHKV: Tensor | None,
    document_ids_BT: Tensor | None,
    chunk_size: int,
    segment_tiles: int = 0,
    keep_states: bool = True,
) -> tuple[Tensor, Tensor]:
    """As `vector.torch_impl.chunked_vector_scan`, for float32, bfloat16 and float16.

    chunk_size is the distance of the states that backward reads: 16, 32, or a multiple of 64, which runs as 64.
    segment_tiles cuts rows into segments of this many chunks that are walked at the same time; 0 cuts only where the
    rows and heads would leave processors idle. With keep_states forward saves the states that enter chunks (in the
    dtype of v), else backward walks the row again for them. Raises ValueError for chunk or state sizes without a kernel.
    """
    dot_dtype(v_BTHV.dtype)  # rejects float64
    VECTOR_GATE_LIMITS.check(chunk_size, q_BTHK.shape[-1], v_BTHV.shape[-1])
    tile = min(chunk_size, VECTOR_GATE_LIMITS.chunk_sizes[-1])
    initial = None if initial_state_BHKV is None else initial_state_BHKV.float()
    firsts = None if document_ids_BT is None else first_tokens(document_ids_BT)
    tensors = (q_BTHK, k_BTHK, v_BTHV, g_BTHK, initial, firsts)
    return _forward(*tensors, tile, segment_tiles, keep_states and differentiated(*tensors))[:2]


def _launch(q: Tensor, v: Tensor, tile: int, segment_tiles: int) -> ScanLaunch:
    """Sizes of q [B, T, H, K] and v [B, T, H, V]: a chunk is one tile."""
    (B, T, H, V), K = v.shape, q.shape[3]
    tiles = triton.cdiv(T, tile)
    programs = B * H * triton.cdiv(V, walk_candidates(K)[0]["BLOCK_V"])
    return ScanLaunch(B, T, H, K, V, tile, tiles, *cut_segments(tiles, segment_tiles, programs, v.device))


@dataclass(frozen=True)
class _Prepared:
    """What the walks read instead of q, k and g; `triton_forward.prepare_kernel` says what each is."""

    q_start: Tensor
    k_end: Tensor
    scores: Tensor
    decay: Tensor


def _prepare(launch: ScanLaunch, q: Tensor, k: Tensor, g: Tensor, firsts: Tensor | None) -> _Prepared:
    """Launch `prepare_kernel` over all tiles and heads; results are in the dtype of q, the decays float32."""
    (B, T, H, K), tiles = q.shape, launch.chunks
    prepared = _Prepared(
        q.new_empty(B, T, H, K), q.new_empty(B, T, H, K), q.new_empty(B, T, H, launch.Q), g.new_empty(B, tiles, H, K)
    )
    prepare_kernel[(B * tiles, H)](
        q, k, g, firsts, prepared.q_start, prepared.k_end, prepared.scores, prepared.decay,
        T, H, K, *outer_strides(q, k), LEVELS=launch.levels, DOCUMENTS=firsts is not None,
        **launch.config("vector_prepare", PREPARE, q),
    )  # fmt: skip
    return prepared


def _walk(
    launch: ScanLaunch,
    prepared: _Prepared,
    v: Tensor,
    initial: Tensor | None,
    o: Tensor | None,
    entering: Tensor | None,
) -> Tensor:
    """Walk rows forward, writing o and the states that enter tiles where they are given; returns the last state."""
    p = prepared

    def walk(states: Tensor | None, store: bool) -> tuple[Tensor, Tensor]:
        final, total = launch.segment_ends(v, launch.K)
        written = (o, entering) if store else (None, None)
        name = "vector_states_walk" if written[0] is None else "vector_walk"
        grid, constants = launch.walk(name, walk_candidates(launch.K), v)
        vector_walk_kernel[grid](
            p.q_start, p.k_end, v, p.scores, p.decay, states, *written, final, total, *launch.sizes, launch.segments,
            launch.segment_chunks, *outer_strides(v), INITIAL=states is not None, OUTPUT=written[0] is not None,
            SAVE=written[1] is not None, **constants,
        )  # fmt: skip
        return final, total

    return launch.over_segments(walk, initial)


def _walk_back(
    launch: ScanLaunch, prepared: _Prepared, d_o: Tensor, d_final: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the states that leave tiles [B, tiles, H, K, V], in the dtype of d_o, of v, and of the first state."""
    leaving, d_v = launch.chunk_states(d_o), torch.empty_like(d_o)
    p = prepared
    grid, constants = launch.walk("vector_walk_back", walk_candidates(launch.K), d_o)

    def walk(d_states: Tensor | None, store: bool) -> tuple[Tensor, Tensor]:
        d_initial, total = launch.segment_ends(d_o, launch.K)
        vector_walk_back_kernel[grid](
            p.q_start, p.k_end, p.scores, p.decay, d_o, d_states, leaving, d_v, d_initial, total, *launch.sizes,
            launch.segments, launch.segment_chunks, D_FINAL=d_states is not None, STORE=store, **constants,
        )  # fmt: skip
        return d_initial, total

    return leaving, d_v, launch.over_segments(walk, d_final, backward=True)


@torch.library.custom_op("amfm::vector_scan_triton", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    initial: Tensor | None,
    firsts: Tensor | None,
    tile: int,
    segment_tiles: int,
    keep_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, last state, and the states that enter tiles (empty unless they are kept)."""
    q, k, v, g = pack_inner(q, 2), pack_inner(k, 2), pack_inner(v, 2), g.contiguous()
    launch = _launch(q, v, tile, segment_tiles)
    o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    entering = launch.chunk_states(v) if keep_states else None
    last = _walk(launch, _prepare(launch, q, k, g, firsts), v, pack(initial), o, entering)
    return o, last.contiguous(), v.new_empty(0) if entering is None else entering


@fake_of(_forward)
def _(given: Any) -> tuple[Tensor, ...]:
    v, K, tile = given.v, given.q.shape[3], given.tile
    B, T, H, V = v.shape
    entering = (B, (T + tile - 1) // tile, H, K, V) if given.keep_states else (0,)
    return v.new_empty(v.shape), v.new_empty(B, H, K, V, dtype=torch.float32), v.new_empty(entering)


@torch.library.custom_op("amfm::vector_scan_triton_backward", mutates_args=())
def _backward(
    d_o: Tensor,
    d_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    initial: Tensor | None,
    firsts: Tensor | None,
    entering: Tensor,
    tile: int,
    segment_tiles: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, g and the initial state; that of an absent one is empty."""
    q, k, v, g, d_o = pack_inner(q, 2), pack_inner(k, 2), pack_inner(v, 2), g.contiguous(), d_o.contiguous()
    launch = _launch(q, v, tile, segment_tiles)
    prepared = _prepare(launch, q, k, g, firsts)
    # Forward did not keep the states: walk again, without outputs.
    if not entering.numel():
        entering = launch.chunk_states(v)
        _walk(launch, prepared, v, pack(initial), None, entering)
    leaving, d_v, d_first = _walk_back(launch, prepared, d_o, pack(d_final))
    # The walk back was the last to read the scores: their gradients take their place.
    grid, d_scores = (launch.B * launch.chunks, launch.H), prepared.scores
    score_gradients_kernel[grid](
        v, d_o, d_scores, launch.T, launch.H, launch.V, *outer_strides(v),
        **launch.config("vector_score_gradients", SCORE_GRADIENTS, v),
    )  # fmt: skip
    d_q, d_k = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    d_g = torch.empty_like(g)
    config = launch.config("vector_gradients", GRADIENTS, v)
    vector_gradients_kernel[(grid[0], launch.H * triton.cdiv(launch.K, config["PART"]))](
        q, k, v, g, firsts, d_o, d_scores, entering, leaving, d_q, d_k, d_g,
        launch.T, launch.H, launch.K, launch.V, *outer_strides(q, k, v),
        LEVELS=launch.levels, DOCUMENTS=firsts is not None, **config,
    )  # fmt: skip
    return d_q, d_k, d_v, d_g, d_first.contiguous() if initial is not None else q.new_empty(0)


differentiate(_forward, _backward, outputs=("o", "final", "entering"), gradients=("q", "k", "v", "g", "initial"))
