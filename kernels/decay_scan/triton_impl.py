"""The Triton scan as an operation that autograd, torch.compile and meta tensors know.

How: `_forward` and `_backward` are custom operations with fake implementations, so that torch.compile treats
each as one node and meta tensors give shapes. Launches are decided here: a row's chunks, the columns of V a
program takes, and segments where rows and heads alone don't fill the card. States and gradients are summed by
PyTorch in a fixed order; there are no atomics, so every run gives the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from kernels.decay_scan.triton_backward import gradients_kernel, walk_back_kernel
from kernels.decay_scan.triton_forward import chunk_state_kernel
from kernels.documents import first_tokens
from kernels.interpreter import dot_dtype
from kernels.limits import DECAY_LIMITS
from kernels.scan_launch import ScanLaunch, cut_segments, differentiated, padded
from kernels.strides import outer_strides, pack, pack_inner

# Tokens of a step: a chunk of 128 is two, which keeps their products in registers.
LARGEST_TILE = 64
# Heads of a group that one program of the gradient kernel walks over: fewer fill the card better, more share sums.
HEADS_PER_SPLIT = 32
# Candidates of each kernel, the fixed one first; BLOCK_V: columns of V that a program takes, or takes at a time. Compiled
# for sm_90, a state of 128 x 64 next to the output's products spills; two programs of 128 x 32 do not.
WALK = tuple(
    {"BLOCK_V": columns, "num_warps": warps, "num_stages": stages}
    for columns, warps, stages in ((32, 8, 2), (32, 4, 2), (64, 8, 2), (64, 8, 1))
)
STATES_WALK = tuple(
    {"BLOCK_V": columns, "num_warps": warps, "num_stages": stages}
    for columns, warps, stages in ((64, 8, 2), (64, 4, 2), (32, 4, 2), (64, 8, 3))
)
WALK_BACK = tuple(
    {"BLOCK_V": columns, "num_warps": warps, "num_stages": stages}
    for columns, warps, stages in ((64, 4, 2), (64, 8, 2), (32, 4, 2), (32, 4, 3))
)
GRADIENTS = tuple({"BLOCK_V": columns, "num_warps": 8, "num_stages": 1} for columns in (32, 16, 64))


def scan_triton(
    q_BTGK: Tensor,
    k_BTGK: Tensor,
    v_BTHV: Tensor,
    g_BTH: Tensor,
    scale_BTH: Tensor | None,
    skip_H: Tensor | None,
    initial_state_BHKV: Tensor | None,
    document_ids_BT: Tensor | None,
    chunk_size: int,
    segment_chunks: int = 0,
    keep_states: bool = True,
) -> tuple[Tensor, Tensor]:
    """As `torch_impl.chunked_scan`, for float32, bfloat16 and float16.

    chunk_size is the distance of the states that backward reads, 16 to 128 or a multiple of 128, which runs as 128.
    segment_chunks cuts rows into segments of so many chunks that are walked at the same time; 0 cuts only where the
    rows and heads alone would leave processors idle. With keep_states forward saves the states that enter chunks (in the
    dtype of v), else backward walks the row again for them. Raises ValueError for chunk or state sizes without a kernel.

    q and k [B, T, G, K], v [B, T, H, V], g and scale [B, T, H] float32, skip [H], initial state [B, H, K, V] ->
    o [B, T, H, V] in the dtype of v and the last state in float32.
    """
    dot_dtype(v_BTHV.dtype)  # refuses float64
    DECAY_LIMITS.check(chunk_size, q_BTGK.shape[-1], v_BTHV.shape[-1])
    chunk = min(chunk_size, DECAY_LIMITS.chunk_sizes[-1])
    initial = None if initial_state_BHKV is None else initial_state_BHKV.float()
    firsts = None if document_ids_BT is None else first_tokens(document_ids_BT)
    tensors = (q_BTGK, k_BTGK, v_BTHV, g_BTH, scale_BTH, skip_H, initial, firsts)
    return _forward(*tensors, chunk, segment_chunks, keep_states and differentiated(*tensors))[:2]


@dataclass(frozen=True)
class _Launch(ScanLaunch):
    """Sizes of one call: Q are the tokens of a tile, of which a chunk has `tiles`; R heads share q and k."""

    R: int = 1
    tiles: int = 1

    @classmethod
    def of(cls, q: Tensor, v: Tensor, chunk_size: int, segment_chunks: int) -> _Launch:
        """Sizes of q [B, T, G, K] and v [B, T, H, V], and the cut of rows into chunks and segments."""
        (B, T, H, V), (G, K) = v.shape, q.shape[2:]
        chunks = triton.cdiv(T, chunk_size)
        cut = cut_segments(chunks, segment_chunks, B * H * triton.cdiv(V, LARGEST_TILE), v.device)
        Q = min(chunk_size, LARGEST_TILE)
        return cls(B, T, H, K, V, Q, chunks, *cut, R=H // G, tiles=chunk_size // Q)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Scalars of the walks, in their order."""
        return self.T, self.H, self.R, self.K, self.V, self.chunks, self.segments, self.segment_chunks

    @property
    def tuned_for(self) -> tuple[int, ...]:
        """Sizes that a kernel's configuration depends on."""
        return self.Q, self.tiles, self.K, self.V

    def constants(self, v: Tensor) -> dict[str, Any]:
        """What all kernels are compiled for."""
        return super().constants(v) | {"TILES": self.tiles, "BLOCK_K": padded(self.K)}


def _walk(
    launch: _Launch,
    inputs: tuple[Tensor | None, ...],
    initial: Tensor | None,
    y: Tensor | None,
    entering: Tensor | None,
) -> Tensor:
    """Walk rows forward, writing y and the states that enter chunks where they are given; returns the last state."""
    q, k, v, g, scale, skip, firsts = inputs
    assert q is not None and k is not None and v is not None, "a scan has q, k and v"

    def walk(states: Tensor | None, store: bool) -> tuple[Tensor, Tensor]:
        final, decay = launch.segment_ends(v)
        written = (y, entering) if store else (None, None)
        name, candidates = ("scan_states_walk", STATES_WALK) if written[0] is None else ("scan_walk", WALK)
        grid, constants = launch.walk(name, candidates, v)
        chunk_state_kernel[grid](
            q, k, v, g, scale, skip, firsts, states, *written, final, decay, *launch.sizes, *outer_strides(q, k, v),
            SCALE=scale is not None, SKIP=skip is not None, INITIAL=states is not None, OUTPUT=written[0] is not None,
            SAVE=written[1] is not None, DOCUMENTS=firsts is not None, **constants,
        )  # fmt: skip
        return final, decay

    return launch.over_segments(walk, initial)


def _walk_back(
    launch: _Launch, q: Tensor, g: Tensor, firsts: Tensor | None, d_y: Tensor, d_final: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients of the states that leave chunks [B, chunks, H, K, V], in the dtype of d_y, and of the first state."""
    leaving = launch.chunk_states(d_y)
    grid, constants = launch.walk("scan_walk_back", WALK_BACK, d_y)

    def walk(d_states: Tensor | None, store: bool) -> tuple[Tensor, Tensor]:
        d_initial, decay = launch.segment_ends(d_y)
        walk_back_kernel[grid](
            q, g, firsts, d_y, d_states, leaving, d_initial, decay, *launch.sizes, *outer_strides(q),
            D_FINAL=d_states is not None, STORE=store, DOCUMENTS=firsts is not None, **constants,
        )  # fmt: skip
        return d_initial, decay

    return leaving, launch.over_segments(walk, d_final, backward=True)


@torch.library.custom_op("amfm::decay_scan_triton", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: Tensor | None,
    skip: Tensor | None,
    initial: Tensor | None,
    firsts: Tensor | None,
    chunk_size: int,
    segment_chunks: int,
    keep_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, last state, and the states that enter chunks (empty unless they are kept)."""
    q, k, v, g = pack_inner(q, 2), pack_inner(k, 2), pack_inner(v, 2), g.contiguous()
    scale, initial = pack(scale), pack(initial)
    launch = _Launch.of(q, v, chunk_size, segment_chunks)
    y = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    entering = launch.chunk_states(v) if keep_states else None
    last = _walk(launch, (q, k, v, g, scale, skip, firsts), initial, y, entering)
    return y, last.contiguous(), v.new_empty(0) if entering is None else entering


@_forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: Tensor | None,
    skip: Tensor | None,
    initial: Tensor | None,
    firsts: Tensor | None,
    chunk_size: int,
    segment_chunks: int,
    keep_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    B, T, H, V = v.shape
    K = q.shape[3]
    entering = (B, (T + chunk_size - 1) // chunk_size, H, K, V) if keep_states else (0,)
    return v.new_empty(v.shape), v.new_empty(B, H, K, V, dtype=torch.float32), v.new_empty(entering)


@torch.library.custom_op("amfm::decay_scan_triton_backward", mutates_args=())
def _backward(
    d_y: Tensor,
    d_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: Tensor | None,
    skip: Tensor | None,
    initial: Tensor | None,
    firsts: Tensor | None,
    entering: Tensor | None,
    chunk_size: int,
    segment_chunks: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, g, scale, skip and the initial state; those of absent inputs are empty."""
    q, k, v, g, d_y = pack_inner(q, 2), pack_inner(k, 2), pack_inner(v, 2), g.contiguous(), d_y.contiguous()
    scale, d_final = pack(scale), pack(d_final)
    launch = _Launch.of(q, v, chunk_size, segment_chunks)
    (B, T, G, K), (H, V) = q.shape, v.shape[2:]
    # Forward did not keep the states: walk again, without outputs.
    if entering is None:
        entering = launch.chunk_states(v)
        _walk(launch, (q, k, v, g, scale, None, firsts), pack(initial), None, entering)
    leaving, d_first = _walk_back(launch, q, g, firsts, d_y, d_final)
    splits, tiles = triton.cdiv(launch.R, HEADS_PER_SPLIT), triton.cdiv(T, launch.Q)
    # Partial sums of several programs are added in float32 and rounded once.
    sums = torch.float32 if splits > 1 else v.dtype
    d_q, d_k = (v.new_empty(splits, B, T, G, K, dtype=sums) for _ in range(2))
    d_v = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    d_g = torch.empty_like(g)
    d_scale = g.new_empty(0) if scale is None else torch.empty_like(g)
    d_skip = g.new_empty(B, tiles, H if skip is not None else 0)
    gradients_kernel[(B * tiles, G * splits)](
        q, k, v, g, scale, skip, firsts, d_y, entering, leaving, d_q, d_k, d_v, d_g, d_scale, d_skip,
        T, H, launch.R, K, V, launch.chunks, splits, *outer_strides(q, k, v),
        SCALE=scale is not None, SKIP=skip is not None, DOCUMENTS=firsts is not None,
        **launch.config("scan_gradients", GRADIENTS, v),
    )  # fmt: skip
    d_q, d_k = (d[0] if splits == 1 else d.sum(0).to(v.dtype) for d in (d_q, d_k))
    d_initial = d_first.contiguous() if initial is not None else g.new_empty(0)
    return d_q, d_k, d_v, d_g, d_scale, d_skip.sum((0, 1)), d_initial


@_backward.register_fake
def _(
    d_y: Tensor,
    d_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: Tensor | None,
    skip: Tensor | None,
    initial: Tensor | None,
    firsts: Tensor | None,
    entering: Tensor | None,
    chunk_size: int,
    segment_chunks: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        q.new_empty(q.shape),
        k.new_empty(k.shape),
        v.new_empty(v.shape),
        g.new_empty(g.shape),
        g.new_empty(0 if scale is None else g.shape),
        g.new_empty(0 if skip is None else skip.shape),
        g.new_empty(0 if initial is None else initial.shape),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    """Keep the inputs and, where asked, the states that enter chunks; without them backward walks the row again."""
    *tensors, ctx.chunk_size, ctx.segment_chunks, keep_states = inputs
    ctx.save_for_backward(*tensors, output[2] if keep_states else None)
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, d_y: Tensor | None, d_final: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    """Gradients of `_forward`'s inputs; None for those that are absent or take none."""
    saved = ctx.saved_tensors
    _, _, v, _, scale, skip, initial, _, _ = saved
    if d_y is None:
        d_y = torch.zeros_like(v)
    d_q, d_k, d_v, d_g, d_scale, d_skip, d_initial = _backward(d_y, d_final, *saved, ctx.chunk_size, ctx.segment_chunks)
    return (
        d_q,
        d_k,
        d_v,
        d_g,
        None if scale is None else d_scale,
        None if skip is None else d_skip.to(skip.dtype),
        None if initial is None else d_initial,
        None,
        None,
        None,
        None,
    )


_forward.register_autograd(_differentiate, setup_context=_save)
