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
from kernels.segments import cut_segments, fit_blocks, padded
from kernels.strides import outer_strides, pack_inner
from kernels.tuning import Config, config_for

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
    # Asked here, outside the operation: inside, autograd is off and no tensor requires gradients.
    keep_states = keep_states and torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    return _forward(*tensors, chunk, segment_chunks, keep_states)[:2]


@dataclass(frozen=True)
class _Launch:
    """Sizes of one call, shared by its kernels.

    K and V are the state's rows and columns, Q the tokens of a tile, `tiles` the tiles of a chunk. R = H / G
    heads share q and k.
    """

    B: int
    T: int
    H: int
    G: int
    K: int
    V: int
    Q: int
    tiles: int
    chunks: int
    segments: int
    segment_chunks: int

    @classmethod
    def of(cls, q: Tensor, v: Tensor, chunk_size: int, segment_chunks: int) -> _Launch:
        """Sizes of q [B, T, G, K] and v [B, T, H, V], and the cut of rows into chunks and segments."""
        B, T, H, V = v.shape
        G, K = q.shape[2:]
        chunks = triton.cdiv(T, chunk_size)
        programs = B * H * triton.cdiv(V, LARGEST_TILE)
        segments, segment_chunks = cut_segments(chunks, segment_chunks, programs, v.device)
        Q = min(chunk_size, LARGEST_TILE)
        return cls(B, T, H, G, K, V, Q, chunk_size // Q, chunks, segments, segment_chunks)

    def sizes(self) -> tuple[int, ...]:
        """Scalars of the walks, in their order."""
        return (
            self.T, self.H, self.H // self.G, self.K, self.V, self.chunks, self.segments, self.segment_chunks
        )  # fmt: skip

    def constants(self, v: Tensor, firsts: Tensor | None) -> dict[str, Any]:
        """What all kernels are compiled for."""
        constants = {"Q": self.Q, "TILES": self.tiles, "BLOCK_K": padded(self.K), "DOT": dot_dtype(v.dtype)}
        return constants | {"DOCUMENTS": firsts is not None}

    def config(self, kernel: str, candidates: tuple[Config, ...], v: Tensor) -> dict[str, int]:
        """The kernel's configuration for these sizes, with no more columns than V has."""
        shape = (v.dtype, self.Q, self.tiles, self.K, self.V)
        return fit_blocks(config_for(kernel, shape, candidates, v.device), BLOCK_V=self.V)

    def grid(self, columns: int) -> tuple[int, int]:
        """Programs of a walk: heads and blocks of V, segments."""
        return self.B * self.H * triton.cdiv(self.V, columns), self.segments

    def states(self, like: Tensor) -> Tensor:
        """Room for one state a segment."""
        return like.new_empty(self.B, self.segments, self.H, self.K, self.V, dtype=torch.float32)

    def decays(self, like: Tensor) -> Tensor:
        """Room for one factor a segment."""
        return like.new_empty(self.B, self.segments, self.H, dtype=torch.float32)

    def chunk_states(self, like: Tensor) -> Tensor:
        """Room for one state a chunk, in the dtype of `like`."""
        return like.new_empty(self.B, self.chunks, self.H, self.K, self.V)


def pass_states(initial: Tensor | None, local: Tensor, decay: Tensor, *, backward: bool) -> tuple[Tensor, Tensor]:
    """Hand states from segment to segment: those entering each, in the shape of `local`, and the one after the last.

    local [B, segments, ...]: the state of each segment from zero. decay: as local but for its last dims, which share it.

    Runs over segments in order (backward: from the last), in float32; segments are few, so PyTorch does it.
    """
    segments = range(local.shape[1])
    decay = decay.reshape(*decay.shape, *(1,) * (local.dim() - decay.dim()))
    state = torch.zeros_like(local[:, 0]) if initial is None else initial
    entering = torch.empty_like(local)
    for s in reversed(segments) if backward else segments:
        entering[:, s] = state
        state = decay[:, s] * state + local[:, s]
    return entering, state


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

    def run(states: Tensor | None, y: Tensor | None, entering: Tensor | None) -> tuple[Tensor, Tensor]:
        final, decay = launch.states(v), launch.decays(v)
        name, candidates = ("scan_states_walk", STATES_WALK) if y is None else ("scan_walk", WALK)
        config = launch.config(name, candidates, v)
        chunk_state_kernel[launch.grid(config["BLOCK_V"])](
            q, k, v, g, scale, skip, firsts, states, y, entering, final, decay, *launch.sizes(), *outer_strides(q, k, v),
            SCALE=scale is not None, SKIP=skip is not None, INITIAL=states is not None,
            OUTPUT=y is not None, SAVE=entering is not None, **launch.constants(v, firsts), **config,
        )  # fmt: skip
        return final, decay

    if launch.segments == 1:
        return run(initial, y, entering)[0][:, 0]
    # Two walks: the first finds each segment's own state, the second starts from what truly enters it.
    states, last = pass_states(initial, *run(None, None, None), backward=False)
    run(states, y, entering)
    return last


def _walk_back(
    launch: _Launch, q: Tensor, g: Tensor, firsts: Tensor | None, d_y: Tensor, d_final: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients of the states that leave chunks [B, chunks, H, K, V], in the dtype of d_y, and of the first state."""
    leaving = launch.chunk_states(d_y)
    config = launch.config("scan_walk_back", WALK_BACK, d_y)

    def run(d_states: Tensor | None, *, store: bool) -> tuple[Tensor, Tensor]:
        d_initial, decay = launch.states(d_y), launch.decays(d_y)
        walk_back_kernel[launch.grid(config["BLOCK_V"])](
            q, g, firsts, d_y, d_states, leaving, d_initial, decay, *launch.sizes(), *outer_strides(q),
            D_FINAL=d_states is not None, STORE=store, **launch.constants(d_y, firsts), **config,
        )  # fmt: skip
        return d_initial, decay

    # As in `_walk`: segments first find what they pass on, then walk again from what reaches them.
    if launch.segments == 1:
        return leaving, run(d_final, store=True)[0][:, 0]
    d_states, d_first = pass_states(d_final, *run(None, store=False), backward=True)
    run(d_states, store=True)
    return leaving, d_first


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
    scale = None if scale is None else scale.contiguous()
    launch = _Launch.of(q, v, chunk_size, segment_chunks)
    y = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    entering = launch.chunk_states(v) if keep_states else None
    initial = None if initial is None else initial.contiguous()
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
    scale = None if scale is None else scale.contiguous()
    d_final = None if d_final is None else d_final.contiguous()
    launch = _Launch.of(q, v, chunk_size, segment_chunks)
    B, T, H, G, K, V = launch.B, launch.T, launch.H, launch.G, launch.K, launch.V
    # Forward did not keep the states: walk again, without outputs.
    if entering is None:
        entering = launch.chunk_states(v)
        start = None if initial is None else initial.contiguous()
        _walk(launch, (q, k, v, g, scale, None, firsts), start, None, entering)
    leaving, d_first = _walk_back(launch, q, g, firsts, d_y, d_final)
    splits, tiles = triton.cdiv(H // G, HEADS_PER_SPLIT), triton.cdiv(T, launch.Q)
    # Partial sums of several programs are added in float32 and rounded once.
    sums = torch.float32 if splits > 1 else v.dtype
    d_q, d_k = (v.new_empty(splits, B, T, G, K, dtype=sums) for _ in range(2))
    d_v = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    d_g = torch.empty_like(g)
    d_scale = g.new_empty(0) if scale is None else torch.empty_like(g)
    d_skip = g.new_empty(B, tiles, H if skip is not None else 0)
    gradients_kernel[(B * tiles, G * splits)](
        q, k, v, g, scale, skip, firsts, d_y, entering, leaving, d_q, d_k, d_v, d_g, d_scale, d_skip,
        T, H, H // G, K, V, launch.chunks, splits, *outer_strides(q, k, v),
        SCALE=scale is not None, SKIP=skip is not None, **launch.constants(v, firsts),
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
