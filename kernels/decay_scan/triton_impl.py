"""The Triton scan as an operation that autograd, torch.compile and meta tensors know.

How: `_forward` and `_backward` are custom operations with fake implementations, so that torch.compile treats
each as one node and meta tensors give shapes. Launches are decided in `launch.py`: a row's chunks, the columns of V a
program takes, and segments where just rows and heads do not fill the GPU. States and gradients are summed by
PyTorch in a fixed order; there are no atomics, so every run gives bitwise identical results.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from amfm.kernels.common.custom_op import differentiate, fake_of
from amfm.kernels.common.inputs import first_tokens, pack, pack_inner
from amfm.kernels.common.limits import DECAY_LIMITS
from amfm.kernels.common.scan_launch import differentiated
from amfm.kernels.decay_scan.launch import DecayLaunch, Gates, find_gradients, walk, walk_back
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
