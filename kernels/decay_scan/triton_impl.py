"""The Triton scan as an operation that autograd, torch.compile and meta tensors know."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from kernels.decay_scan.triton_backward import gradients_kernel, states_kernel
from kernels.decay_scan.triton_forward import walk_kernel
from kernels.interpreter import count_programs, dot_dtype

CHUNK_SIZES = (16, 32, 64, 128)
LARGEST_STATE_DIM = 256
# Heads of a group that one program of the gradient kernel walks over: fewer fill the card better, more share sums.
HEADS_PER_SPLIT = 32


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
) -> tuple[Tensor, Tensor]:
    """As `torch_impl.chunked_scan`, for float32, bfloat16 and float16.

    segment_chunks cuts rows into segments of so many chunks that are walked at the same time; 0 cuts only where the
    rows and heads alone would leave processors idle. Raises ValueError for chunk or state sizes without a kernel.
    """
    dot_dtype(v_BTHV.dtype)  # refuses float64
    if chunk_size not in CHUNK_SIZES:
        raise ValueError(f'backend "triton" needs a chunk_size of 16, 32, 64 or 128; got {chunk_size}')
    sizes = (q_BTGK.shape[-1], v_BTHV.shape[-1])
    if max(sizes) > LARGEST_STATE_DIM:
        raise ValueError(
            f'backend "triton" holds states of up to {LARGEST_STATE_DIM} x {LARGEST_STATE_DIM}; got {sizes}'
        )
    initial = None if initial_state_BHKV is None else initial_state_BHKV.float()
    return _forward(
        q_BTGK, k_BTGK, v_BTHV, g_BTH, scale_BTH, skip_H, initial, document_ids_BT, chunk_size, segment_chunks
    )


@dataclass(frozen=True)
class _Launch:
    """Sizes of one call, shared by its kernels."""

    B: int
    T: int
    H: int
    G: int
    K: int
    V: int
    Q: int
    chunks: int
    segments: int
    segment_chunks: int
    block_k: int
    block_v: int

    @classmethod
    def of(cls, q: Tensor, v: Tensor, chunk_size: int, segment_chunks: int, largest_v: int = 64) -> _Launch:
        B, T, H, V = v.shape
        G, K = q.shape[2:]
        chunks = triton.cdiv(T, chunk_size)
        block_k, block_v = max(16, triton.next_power_of_2(K)), max(16, min(largest_v, triton.next_power_of_2(V)))
        if segment_chunks == 0:
            programs = B * H * triton.cdiv(V, block_v)
            wanted = max(1, count_programs(v.device, 1) // programs) if v.device.type == "cuda" else 1
            segment_chunks = triton.cdiv(chunks, min(wanted, chunks))
        segments = triton.cdiv(chunks, segment_chunks)
        return cls(B, T, H, G, K, V, chunk_size, chunks, segments, segment_chunks, block_k, block_v)

    def states(self, like: Tensor) -> Tensor:
        """Room for one state a segment."""
        return like.new_empty(self.B, self.segments, self.H, self.K, self.V, dtype=torch.float32)

    def walk_grid(self) -> tuple[int, int]:
        return self.B * self.H * triton.cdiv(self.V, self.block_v), self.segments


def _rows(x: Tensor) -> Tensor:
    """A tensor whose tokens are packed inside; rows and tokens may lie apart, as slices of a wider projection do."""
    return x if x.stride(-1) == 1 and x.stride(-2) == x.shape[-1] else x.contiguous()


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for tensor in tensors for stride in tensor.stride()[:2]]


def _pass_states(initial: Tensor | None, local: Tensor, decay: Tensor, *, backward: bool) -> tuple[Tensor, Tensor]:
    """Hand states from segment to segment: [B, segments, H, K, V] entering each, and the one after the last."""
    segments = range(local.shape[1])
    state = torch.zeros_like(local[:, 0]) if initial is None else initial
    entering = torch.empty_like(local)
    for s in reversed(segments) if backward else segments:
        entering[:, s] = state
        state = decay[:, s, :, None, None] * state + local[:, s]
    return entering, state


@torch.library.custom_op("amfm::decay_scan_triton", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: Tensor | None,
    skip: Tensor | None,
    initial: Tensor | None,
    documents: Tensor | None,
    chunk_size: int,
    segment_chunks: int,
) -> tuple[Tensor, Tensor]:
    q, k, v, g = _rows(q), _rows(k), _rows(v), g.contiguous()
    scale = None if scale is None else scale.contiguous()
    documents = None if documents is None else documents.contiguous()
    # Compiled for sm_90, a state of 128 x 64 next to the output's products spills; two programs of 128 x 32 do not.
    launch = _Launch.of(q, v, chunk_size, segment_chunks, largest_v=32 if q.shape[3] > 64 else 64)
    y = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    final = launch.states(v)
    decay = v.new_empty(launch.B, launch.segments, launch.H, dtype=torch.float32)

    def walk(entering: Tensor | None, output: bool) -> None:
        walk_kernel[launch.walk_grid()](
            q, k, v, g, scale, skip, documents, entering, y, final, decay,
            launch.T, launch.H, launch.H // launch.G, launch.K, launch.V, launch.segments, launch.segment_chunks,
            *_strides(q, k, v),
            Q=chunk_size, BLOCK_K=launch.block_k, BLOCK_V=launch.block_v, DOT=dot_dtype(v.dtype),
            DOCUMENTS=documents is not None, SCALE=scale is not None, SKIP=skip is not None,
            INITIAL=entering is not None, OUTPUT=output, num_warps=8, num_stages=2,
        )  # fmt: skip

    if launch.segments == 1:
        walk(None if initial is None else initial.contiguous(), output=True)
        return y, final[:, 0]
    walk(None, output=False)
    entering, last = _pass_states(initial, final, decay, backward=False)
    walk(entering, output=True)
    return y, last


@_forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: Tensor | None,
    skip: Tensor | None,
    initial: Tensor | None,
    documents: Tensor | None,
    chunk_size: int,
    segment_chunks: int,
) -> tuple[Tensor, Tensor]:
    B, _, H, V = v.shape
    return v.new_empty(v.shape), v.new_empty(B, H, q.shape[3], V, dtype=torch.float32)


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
    documents: Tensor | None,
    chunk_size: int,
    segment_chunks: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, g, scale, skip and the initial state; those of absent inputs are empty."""
    q, k, v, g, d_y = _rows(q), _rows(k), _rows(v), g.contiguous(), d_y.contiguous()
    scale = None if scale is None else scale.contiguous()
    documents = None if documents is None else documents.contiguous()
    launch = _Launch.of(q, v, chunk_size, segment_chunks)
    B, T, H, G, K, V = launch.B, launch.T, launch.H, launch.G, launch.K, launch.V
    common = {"Q": chunk_size, "BLOCK_K": launch.block_k, "DOT": dot_dtype(v.dtype)}
    common |= {"DOCUMENTS": documents is not None, "SCALE": scale is not None}
    final, d_initial = launch.states(v), launch.states(v)
    decay = v.new_empty(B, launch.segments, H, dtype=torch.float32)
    entering = v.new_empty(B, launch.chunks, H, K, V)
    leaving = torch.empty_like(entering)

    def walk(states: Tensor | None, d_states: Tensor | None, store: bool) -> None:
        states_kernel[launch.walk_grid()](
            q, k, v, g, scale, documents, states, d_y, d_states, entering, leaving, final, d_initial, decay,
            T, H, H // G, K, V, launch.chunks, launch.segments, launch.segment_chunks, *_strides(q, k, v),
            BLOCK_V=launch.block_v, INITIAL=states is not None, D_FINAL=d_states is not None, STORE=store,
            num_warps=4, num_stages=2, **common,
        )  # fmt: skip

    if launch.segments == 1:
        walk(
            initial if initial is None else initial.contiguous(),
            d_final if d_final is None else d_final.contiguous(),
            True,
        )
        d_first = d_initial[:, 0]
    else:
        walk(None, None, store=False)
        states, _ = _pass_states(initial, final, decay, backward=False)
        d_states, d_first = _pass_states(d_final, d_initial, decay, backward=True)
        walk(states, d_states, store=True)

    splits = triton.cdiv(H // G, HEADS_PER_SPLIT)
    d_q, d_k = (v.new_empty(splits, B, T, G, K, dtype=torch.float32) for _ in range(2))
    d_v = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    d_g = torch.empty_like(g)
    d_scale = g.new_empty(0) if scale is None else torch.empty_like(g)
    d_skip = g.new_empty(B, launch.chunks, H if skip is not None else 0)
    gradients_kernel[(B * launch.chunks, G * splits)](
        q, k, v, g, scale, skip, documents, d_y, entering, leaving, d_q, d_k, d_v, d_g, d_scale, d_skip,
        T, H, H // G, K, V, launch.chunks, splits, *_strides(q, k, v),
        BLOCK_V=max(16, triton.next_power_of_2(V)), SKIP=skip is not None, num_warps=8, num_stages=1, **common,
    )  # fmt: skip
    d_q, d_k = (d.sum(0).to(v.dtype) for d in (d_q, d_k))
    return d_q, d_k, d_v, d_g, d_scale, d_skip.sum((0, 1)), d_first if initial is not None else g.new_empty(0)


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
    documents: Tensor | None,
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


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:8])
    ctx.chunk_size, ctx.segment_chunks = inputs[8:]
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, d_y: Tensor | None, d_final: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, g, scale, skip, initial, documents = ctx.saved_tensors
    if d_y is None:
        d_y = torch.zeros_like(v)
    d_q, d_k, d_v, d_g, d_scale, d_skip, d_initial = _backward(
        d_y, d_final, q, k, v, g, scale, skip, initial, documents, ctx.chunk_size, ctx.segment_chunks
    )
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
    )


_forward.register_autograd(_differentiate, setup_context=_save)
