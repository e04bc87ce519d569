"""The Triton scan as an operation that autograd, torch.compile and meta tensors know, and how its kernels are launched.

How: `_forward` and `_backward` are custom operations with fake implementations, so that torch.compile treats
each as one node and meta tensors give shapes. A launch decides sizes, a row's chunks, the columns of V a program takes, and
segments where just rows and heads do not fill the GPU. States and gradients are summed by PyTorch in a fixed order; there are
no atomics, so every run gives bitwise identical results.

Launches are shared with Mamba2's mixer as one operation (`kernels/mamba2`), which hands its gates over raw and takes gradients
into slices of wider tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor

from amfm.kernels.common.custom_op import differentiate, fake_of
from amfm.kernels.common.inputs import first_tokens, outer_strides, pack, pack_inner, token_stride
from amfm.kernels.common.limits import DECAY_LIMITS
from amfm.kernels.common.scan_launch import ScanLaunch, cut_segments, differentiated, padded
from amfm.kernels.decay_scan.triton_backward import gradients_kernel, walk_back_kernel
from amfm.kernels.decay_scan.triton_forward import chunk_state_kernel
from amfm.kernels.runtime.interpreter import dot_dtype


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
    segment_chunks cuts rows into segments of this many chunks that are walked at the same time; 0 cuts only where the
    rows and heads would leave processors idle. With keep_states forward saves the states that enter chunks (in the
    dtype of v), else backward walks the row again for them. Raises ValueError for chunk or state sizes without a kernel.

    q and k [B, T, G, K], v [B, T, H, V], g and scale [B, T, H] float32, skip [H], initial state [B, H, K, V] ->
    o [B, T, H, V] in the dtype of v and the last state in float32.
    """
    dot_dtype(v_BTHV.dtype)  # rejects float64
    DECAY_LIMITS.check(chunk_size, q_BTGK.shape[-1], v_BTHV.shape[-1])
    chunk = min(chunk_size, DECAY_LIMITS.chunk_sizes[-1])
    initial = None if initial_state_BHKV is None else initial_state_BHKV.float()
    firsts = None if document_ids_BT is None else first_tokens(document_ids_BT)
    tensors = (q_BTGK, k_BTGK, v_BTHV, g_BTH, scale_BTH, skip_H, initial, firsts)
    return _forward(*tensors, chunk, segment_chunks, keep_states and differentiated(*tensors))[:2]


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
    launch = DecayLaunch.of(q, v, chunk_size, segment_chunks)
    y = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    entering = launch.chunk_states(v) if keep_states else None
    last = walk(launch, q, k, v, Gates(g, scale), skip, firsts, initial, y, entering)
    return y, last.contiguous(), v.new_empty(0) if entering is None else entering


@fake_of(_forward)
def _(given: Any) -> tuple[Tensor, ...]:
    v, K = given.v, given.q.shape[3]
    B, T, H, V = v.shape
    entering = (B, (T + given.chunk_size - 1) // given.chunk_size, H, K, V) if given.keep_states else (0,)
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
    entering: Tensor,
    chunk_size: int,
    segment_chunks: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, g, scale, skip and the initial state; those of absent inputs are empty."""
    q, k, v, g, d_y = pack_inner(q, 2), pack_inner(k, 2), pack_inner(v, 2), g.contiguous(), d_y.contiguous()
    scale, d_final = pack(scale), pack(d_final)
    launch = DecayLaunch.of(q, v, chunk_size, segment_chunks)
    gates = Gates(g, scale)
    # Forward did not keep the states: walk again, without outputs.
    if not entering.numel():
        entering = launch.chunk_states(v)
        walk(launch, q, k, v, gates, None, firsts, pack(initial), None, entering)
    leaving, d_first = walk_back(launch, q, gates, firsts, d_y, d_final)
    # Partial sums of several programs are added in float32 and rounded once.
    sums = torch.float32 if launch.splits > 1 else v.dtype
    d_q, d_k = (v.new_empty(launch.splits, *q.shape, dtype=sums) for _ in range(2))
    d_v = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    d_g = torch.empty_like(g)
    d_scale = None if scale is None else torch.empty_like(g)
    states = (entering, leaving)
    d_skip = find_gradients(launch, q, k, v, gates, skip, firsts, states, d_y, d_q, d_k, d_v, d_g, d_scale)
    d_q, d_k = (d[0] if launch.splits == 1 else d.sum(0).to(v.dtype) for d in (d_q, d_k))
    d_initial = q.new_empty(0) if initial is None else d_first.contiguous()
    d_scale = q.new_empty(0) if scale is None or d_scale is None else d_scale.to(scale.dtype)
    d_skip = q.new_empty(0) if skip is None else d_skip.sum((0, 1)).to(skip.dtype)
    return d_q, d_k, d_v, d_g, d_scale, d_skip, d_initial


differentiate(
    _forward,
    _backward,
    outputs=("y", "final", "entering"),
    gradients=("q", "k", "v", "g", "scale", "skip", "initial"),
)


# Tokens of a step: a chunk of 128 is two, which keeps their products in registers.
LARGEST_TILE = 64
# Rows of a state next to which two stages of loads fit.
WIDEST_STATE = 128
# Heads of a group that one program of the gradient kernel walks over: fewer fill the GPU better, more share sums.
HEADS_PER_SPLIT = 32
# Candidates of each kernel, the fixed one first; BLOCK_V: columns of V that a program takes, or takes at a time. Compiled
# for sm_90, a state of 128 x 64 next to the output's products spills; two programs of 128 x 32 do not.
WALK = tuple(
    {"BLOCK_V": columns, "num_warps": warps, "num_stages": stages}
    for columns, warps, stages in ((32, 8, 2), (32, 4, 2), (64, 8, 2), (64, 8, 1))
)
# A state of 256 x 32 next to two stages of loads spills, next to one it does not.
WIDE_WALK = (WALK[0] | {"num_stages": 1}, *WALK)
STATES_WALK = tuple(
    {"BLOCK_V": columns, "num_warps": warps, "num_stages": stages}
    for columns, warps, stages in ((64, 8, 2), (64, 4, 2), (32, 4, 2), (64, 8, 3))
)
WALK_BACK = tuple(
    {"BLOCK_V": columns, "num_warps": warps, "num_stages": stages}
    for columns, warps, stages in ((64, 8, 2), (64, 4, 2), (32, 4, 2), (32, 4, 3))
)
# By tiles of a chunk: the state in the middle of two takes registers, which half the columns give back.
GRADIENTS = {
    tiles: tuple({"BLOCK_V": columns, "num_warps": 8, "num_stages": 1} for columns in order)
    for tiles, order in ((1, (32, 16, 64)), (2, (16, 32, 64)))
}


@dataclass(frozen=True)
class Gates:
    """Gates of a walk: g and scale [B, T, H] float32, packed; or g is Mamba2's dt before its softplus, with A_log and bias [H].

    Then g may have strides of rows and tokens.
    """

    g: Tensor
    scale: Tensor | None = None
    A_log: Tensor | None = None
    bias: Tensor | None = None

    def arguments(self) -> tuple[Tensor | None, ...]:
        """Tensors in the order in which kernels take them."""
        return self.g, self.scale, self.A_log, self.bias

    def constants(self) -> dict[str, bool]:
        """What kernels that read the scale are compiled for."""
        return {"SCALE": self.scale is not None, "RAW": self.A_log is not None}


@dataclass(frozen=True)
class DecayLaunch(ScanLaunch):
    """Sizes of one call: Q are the tokens of a tile, of which a chunk has `tiles`; R heads share q and k."""

    R: int = 1
    tiles: int = 1

    @classmethod
    def of(cls, q: Tensor, v: Tensor, chunk_size: int, segment_chunks: int) -> DecayLaunch:
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

    @property
    def splits(self) -> int:
        """Programs of the gradient kernel that share a tile and a group's heads."""
        return triton.cdiv(self.R, HEADS_PER_SPLIT)

    def for_gradients(self) -> DecayLaunch:
        """The launch of the gradient kernel, which halves a tile next to a wide state: sums of 256 x 64 spill on sm_90."""
        is_wide = self.K > WIDEST_STATE and self.tiles == 1 and self.Q == LARGEST_TILE
        return replace(self, Q=self.Q // 2, tiles=2) if is_wide else self

    def constants(self, v: Tensor) -> dict[str, Any]:
        """What all kernels are compiled for."""
        return super().constants(v) | {"TILES": self.tiles, "BLOCK_K": padded(self.K)}


def walk(
    launch: DecayLaunch,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Gates,
    skip: Tensor | None,
    firsts: Tensor | None,
    initial: Tensor | None,
    y: Tensor | None,
    entering: Tensor | None,
) -> Tensor:
    """Walk rows forward, writing y and the states that enter chunks where they are given; returns the last state."""
    return launch.over_segments(_launch_forward(launch, q, k, v, gates, skip, firsts, y, entering), initial)


def walk_to_end(
    launch: DecayLaunch, q: Tensor, k: Tensor, v: Tensor, gates: Gates, firsts: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Walk rows forward only for what leaves them (`ScanLaunch.ends`)."""
    return launch.ends(_launch_forward(launch, q, k, v, gates, None, firsts, None, None))


def _launch_forward(
    launch: DecayLaunch,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Gates,
    skip: Tensor | None,
    firsts: Tensor | None,
    y: Tensor | None,
    entering: Tensor | None,
) -> Callable[[Tensor | None, bool], tuple[Tensor, Tensor]]:
    """The walk over the segments of all rows, as `ScanLaunch.over_segments` takes it."""

    def walk_segments(states: Tensor | None, store: bool) -> tuple[Tensor, Tensor]:
        final, decay = launch.segment_ends(v)
        written = (y, entering) if store else (None, None)
        name, candidates = "scan_walk", WALK if launch.K <= WIDEST_STATE else WIDE_WALK
        if written[0] is None:
            name, candidates = "scan_states_walk", STATES_WALK
        grid, constants = launch.walk(name, candidates, v)
        chunk_state_kernel[grid](
            q, k, v, *gates.arguments(), skip, firsts, states, *written, final, decay, *launch.sizes,
            *outer_strides(q, k, v, gates.g), SKIP=skip is not None, INITIAL=states is not None,
            OUTPUT=written[0] is not None, SAVE=written[1] is not None, DOCUMENTS=firsts is not None,
            **gates.constants(), **constants,
        )  # fmt: skip
        return final, decay

    return walk_segments


def walk_back(
    launch: DecayLaunch, q: Tensor, gates: Gates, firsts: Tensor | None, d_y: Tensor, d_final: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients of the states that leave chunks [B, chunks, H, K, V], in the dtype of d_y, and of the first state."""
    leaving = launch.chunk_states(d_y)
    return leaving, launch.over_segments(
        _launch_backward(launch, q, gates, firsts, d_y, leaving), d_final, backward=True
    )


def walk_to_start(launch: DecayLaunch, q: Tensor, gates: Gates, firsts: Tensor | None, d_y: Tensor) -> Tensor:
    """Walk rows backward for only the gradient of their first state, as it is where the last state has none."""
    return launch.ends(_launch_backward(launch, q, gates, firsts, d_y, None), backward=True)[0]


def _launch_backward(
    launch: DecayLaunch, q: Tensor, gates: Gates, firsts: Tensor | None, d_y: Tensor, leaving: Tensor | None
) -> Callable[[Tensor | None, bool], tuple[Tensor, Tensor]]:
    """The walk back over the segments of all rows."""
    grid, constants = launch.walk("scan_walk_back", WALK_BACK, d_y)

    def walk_segments(d_states: Tensor | None, store: bool) -> tuple[Tensor, Tensor]:
        d_initial, decay = launch.segment_ends(d_y)
        walk_back_kernel[grid](
            q, gates.g, gates.A_log, gates.bias, firsts, d_y, d_states, leaving, d_initial, decay, *launch.sizes,
            *outer_strides(q, gates.g), RAW=gates.A_log is not None, D_FINAL=d_states is not None, STORE=store,
            DOCUMENTS=firsts is not None, **constants,
        )  # fmt: skip
        return d_initial, decay

    return walk_segments


def find_gradients(
    launch: DecayLaunch,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Gates,
    skip: Tensor | None,
    firsts: Tensor | None,
    states: tuple[Tensor, Tensor],
    d_y: Tensor,
    d_q: Tensor,
    d_k: Tensor,
    d_v: Tensor,
    d_g: Tensor,
    d_scale: Tensor | None,
) -> Tensor:
    """Write gradients of the inputs, given states that enter chunks and gradients of those that leave them.

    d_q and d_k [splits, B, T, G, K], parts to be added if there are several (`DecayLaunch.splits`), d_v [B, T, H, V] and d_g
    [B, T, H] are where tokens of all rows follow each other at one distance, which only raw gates leave open. Returns parts of the sums over tokens,
    [B * tiles, kinds, H] float32: of A_log, bias and skip with raw gates, of skip without (no kinds without a skip).
    """
    launch = launch.for_gradients()
    tiles = launch.B * triton.cdiv(launch.T, launch.Q)
    kinds = 3 if gates.A_log is not None else int(skip is not None)
    d_heads = v.new_empty(tiles, kinds, launch.H, dtype=torch.float32)
    gradients_kernel[(tiles, q.shape[2] * launch.splits)](
        q, k, v, *gates.arguments(), skip, firsts, d_y, *states, d_q, d_k, d_v, d_g, d_scale, d_heads,
        launch.T, launch.H, launch.R, launch.K, launch.V, launch.chunks, launch.splits,
        *outer_strides(q, k, v, gates.g), token_stride(d_q, 2), token_stride(d_v), token_stride(d_g),
        SKIP=skip is not None, DOCUMENTS=firsts is not None, **gates.constants(), **launch.config("scan_gradients", GRADIENTS[launch.tiles], v),
    )  # fmt: skip
    return d_heads
