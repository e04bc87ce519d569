"""The Triton delta product as an operation that autograd, torch.compile and meta tensors know.

How: forward prepares and walks; backward prepares and walks again for errors and entering states, walks back,
and finishes chunk by chunk. Only the inputs are saved: states and errors of all chunks would be three times v
at K = 128. Custom operations with fake implementations let torch.compile and meta tensors pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from amfm.kernels.common.custom_op import differentiate, fake_of
from amfm.kernels.common.inputs import first_tokens, outer_strides, pack, pack_inner
from amfm.kernels.common.limits import DELTA_LIMITS
from amfm.kernels.common.scan_launch import ScanLaunch, padded
from amfm.kernels.delta_scan.triton_backward import gradients_kernel, walk_back_kernel
from amfm.kernels.delta_scan.triton_forward import chunk_state_kernel, prepare_kernel
from amfm.kernels.delta_scan.vector.triton_impl import delta_vector_triton
from amfm.kernels.runtime.interpreter import dot_dtype
from amfm.kernels.runtime.tuning import Config

# Candidates of each kernel, the fixed one first; BLOCK_V, BLOCK_K: columns of V and K that a program takes, or takes at a
# time.
PREPARE = tuple({"num_warps": warps, "num_stages": 1} for warps in (4, 8))
WALK = tuple(
    {"BLOCK_V": columns, "num_warps": warps, "num_stages": stages}
    for columns, warps, stages in ((32, 4, 2), (32, 8, 2), (64, 8, 2), (32, 4, 1))
)
STATES_WALK = WALK
WALK_BACK = tuple(
    {"BLOCK_V": columns, "num_warps": warps, "num_stages": stages}
    for columns, warps, stages in ((32, 4, 2), (32, 8, 2), (64, 8, 2), (32, 4, 1))
)
GRADIENTS = tuple(
    {"BLOCK_K": keys, "BLOCK_V": columns, "num_warps": warps, "num_stages": 1}
    for keys, columns, warps in ((64, 128, 8), (64, 64, 8), (32, 128, 8), (32, 64, 4))
)


def gradient_candidates(steps: int) -> tuple[Config, ...]:
    """Those of the gradient kernel: compiled for sm_90, 64 columns of K spill with more than one step a token."""
    return GRADIENTS if steps == 1 else GRADIENTS[2:]


def delta_scan_triton(
    q_BTGK: Tensor,
    k_BTNGK: Tensor,
    v_BTNHV: Tensor,
    beta_BTNH: Tensor,
    g_BTH: Tensor | None,
    initial_state_BHKV: Tensor | None,
    document_ids_BT: Tensor | None,
    chunk_size: int,
    erase_BTHK: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `torch_impl.chunked_delta`, for float32, bfloat16 and float16; beta, gates and states are float32.

    chunk_size counts steps, N a token: 16, 32 or a multiple of 64, which runs as 64. Nothing but the inputs is kept for
    backward. Gates of key channels go to the kernels in vector/. Raises ValueError for chunk or key sizes without a kernel.
    """
    if g_BTH is not None and g_BTH.dim() == 4:
        steps = (k_BTNGK, v_BTNHV, beta_BTNH)
        k, v, beta = (x.squeeze(2) for x in steps)
        rows = (q_BTGK, k, v, beta, g_BTH, erase_BTHK)
        return delta_vector_triton(*rows, initial_state_BHKV, document_ids_BT, chunk_size)
    dot_dtype(v_BTNHV.dtype)  # rejects float64
    DELTA_LIMITS.check(chunk_size, q_BTGK.shape[-1], v_BTNHV.shape[-1])
    chunk = min(chunk_size, DELTA_LIMITS.chunk_sizes[-1])
    firsts = None if document_ids_BT is None else first_tokens(document_ids_BT)
    return _forward(q_BTGK, k_BTNGK, v_BTNHV, beta_BTNH, g_BTH, initial_state_BHKV, firsts, chunk)


@dataclass(frozen=True)
class _Launch(ScanLaunch):
    """Sizes of one call: Q counts steps of a chunk, N of them a token; R heads share q and k."""

    N: int = 1
    R: int = 1

    @classmethod
    def of(cls, q: Tensor, v: Tensor, chunk_size: int) -> _Launch:
        """Sizes of q [B, T, G, K] and v [B, T, N, H, V], and the number of chunks in a row of T N steps."""
        (B, T, N, H, V), (G, K) = v.shape, q.shape[2:]
        return cls(B, T, H, K, V, chunk_size, triton.cdiv(T * N, chunk_size), N=N, R=H // G)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Scalars of kernels that take values, in their order."""
        return self.T, self.H, self.R, self.K, self.V, self.chunks

    @property
    def tuned_for(self) -> tuple[int, ...]:
        """Sizes that a kernel's configuration depends on."""
        return self.Q, self.N, self.K, self.V

    def constants(self, v: Tensor) -> dict[str, Any]:
        """What all kernels are compiled for."""
        return super().constants(v) | {"QT": padded(triton.cdiv(self.Q, self.N)), "N": self.N}


class _Prepared(NamedTuple):
    """What `prepare_kernel` writes.

    inverse [B, T N, H, Q] and scores [B, T, H, Q] in the dtype of v; enter and leave [B, T N, H] and carry [B,
    chunks, H] float32.
    """

    inverse: Tensor
    scores: Tensor
    enter: Tensor
    leave: Tensor
    carry: Tensor


def _prepare(
    launch: _Launch, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, firsts: Tensor | None
) -> _Prepared:
    """Launch `prepare_kernel` over all chunks and heads."""
    B, T, N, H, Q = launch.B, launch.T, launch.N, launch.H, launch.Q
    inverse, scores = v.new_empty(B, T * N, H, Q), v.new_empty(B, T, H, Q)
    enter, leave = beta.new_empty(B, T * N, H), beta.new_empty(B, T * N, H)
    carry = beta.new_empty(B, launch.chunks, H)
    prepare_kernel[(B * launch.chunks, H)](
        q, k, beta, g, firsts, inverse, scores, enter, leave, carry, T, H, launch.R, launch.K, launch.chunks,
        *outer_strides(q), *outer_strides(k, dims=3), PRECISION="tf32x3" if v.dtype == torch.float32 else "tf32",
        BLOCK_K=padded(launch.K), GATE=g is not None, DOCUMENTS=firsts is not None,
        **launch.config("delta_prepare", PREPARE, v),
    )  # fmt: skip
    return _Prepared(inverse, scores, enter, leave, carry)


def _walk(
    launch: _Launch,
    inputs: tuple[Tensor, Tensor, Tensor],
    prepared: _Prepared,
    initial: Tensor | None,
    o: Tensor | None = None,
    entering: Tensor | None = None,
    errors: Tensor | None = None,
) -> Tensor:
    """Walk rows forward, writing what is given of o, entering and errors; returns the last state."""
    q, k, v = inputs
    final = v.new_empty(launch.B, launch.H, launch.K, launch.V, dtype=torch.float32)
    name, candidates = ("delta_states_walk", STATES_WALK) if o is None else ("delta_walk", WALK)
    grid, constants = launch.walk(name, candidates, v)
    chunk_state_kernel[grid](
        q, k, v, *prepared, initial, o, entering, errors, final, *launch.sizes, *outer_strides(q), *outer_strides(k, v, dims=3),
        INITIAL=initial is not None, OUTPUT=o is not None, SAVE=entering is not None, **constants,
    )  # fmt: skip
    return final


def scan_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    initial: Tensor | None,
    firsts: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """Launch both kernels: output [B, T, H, V] and last state."""
    q, k, v, beta = pack_inner(q, 2), pack_inner(k, 2), pack_inner(v, 2), beta.contiguous()
    g, initial = pack(g), pack(initial)
    launch = _Launch.of(q, v, chunk_size)
    o = v.new_empty(launch.B, launch.T, launch.H, launch.V)
    prepared = _prepare(launch, q, k, v, beta, g, firsts)
    return o, _walk(launch, (q, k, v), prepared, initial, o=o)


_forward = torch.library.custom_op("amfm::delta_scan_triton", scan_rows, mutates_args=())


@fake_of(_forward)
def _(given: Any) -> tuple[Tensor, ...]:
    v, K = given.v, given.q.shape[3]
    B, T, _, H, V = v.shape
    return v.new_empty(B, T, H, V), v.new_empty(B, H, K, V, dtype=torch.float32)


@torch.library.custom_op("amfm::delta_scan_triton_backward", mutates_args=())
def _backward(
    d_o: Tensor,
    d_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    initial: Tensor | None,
    firsts: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, beta, g and the initial state; those of absent inputs are empty."""
    given = q, k, v, beta, g, initial, firsts, chunk_size
    d_q, d_k, d_v, d_beta, d_g, d_initial = scan_rows_backward(d_o, d_final, *given)
    d_q, d_k = (d[0] if len(d) == 1 else d.sum(0) for d in (d_q, d_k))
    return d_q, d_k, d_v, d_beta, d_g, d_initial


def scan_rows_backward(
    d_o: Tensor,
    d_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    initial: Tensor | None,
    firsts: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launch the kernels of backward: as `_backward`, with those of q and k [R, ...] as each head that shares them has them."""
    q, k, v, beta, d_o = pack_inner(q, 2), pack_inner(k, 2), pack_inner(v, 2), beta.contiguous(), d_o.contiguous()
    g, d_final = pack(g), pack(d_final)
    launch = _Launch.of(q, v, chunk_size)
    (B, T, N, H, V), (G, K) = v.shape, q.shape[2:]
    prepared = _prepare(launch, q, k, v, beta, g, firsts)
    entering, leaving = launch.chunk_states(v), launch.chunk_states(v)
    errors, d_v = v.new_empty(B, T * N, H, V), v.new_empty(B, T, N, H, V)
    _walk(launch, (q, k, v), prepared, pack(initial), None, entering, errors)
    d_initial = beta.new_empty(B, H, K, V)
    grid, constants = launch.walk("delta_walk_back", WALK_BACK, v)
    walk_back_kernel[grid](
        q, k, *prepared, d_o, d_final, leaving, d_v, d_initial, *launch.sizes, *outer_strides(q), *outer_strides(k, dims=3),
        D_FINAL=d_final is not None, **constants,
    )  # fmt: skip
    d_q, d_k = q.new_empty(launch.R, B, T, G, K), q.new_empty(launch.R, B, T, N, G, K)
    d_beta = torch.empty_like(beta)
    d_g = q.new_empty(0) if g is None else torch.empty_like(g)
    gradients_kernel[(B * launch.chunks, H)](
        q, k, beta, g, firsts, prepared.enter, d_o, d_v, errors, entering, leaving, d_q, d_k, d_beta, d_g,
        *launch.sizes, *outer_strides(q), *outer_strides(k, dims=3), GATE=g is not None, DOCUMENTS=firsts is not None,
        **launch.config("delta_gradients", gradient_candidates(N), v),
    )  # fmt: skip
    return d_q, d_k, d_v, d_beta, d_g, q.new_empty(0) if initial is None else d_initial.to(initial.dtype)


differentiate(_forward, _backward, outputs=("o", "final"), gradients=("q", "k", "v", "beta", "g", "initial"))
