"""The Triton scan of Mamba as an operation that autograd, torch.compile and meta tensors know.

How: forward saves the state in front of each chunk; backward goes through the chunks from the last, walks one
forward for the states in front of its tiles, then its tiles backward. Sums over rows (A, D) and over blocks of
channels (B, C) are partial results of programs, added by PyTorch in a fixed order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from amfm.kernels.common.custom_op import differentiate, fake_of
from amfm.kernels.common.inputs import first_tokens, outer_strides, pack, pack_inner
from amfm.kernels.common.limits import DIAG_LIMITS
from amfm.kernels.common.scan_launch import differentiated
from amfm.kernels.diag_scan.triton_kernels import diag_backward_kernel, diag_forward_kernel
from amfm.kernels.runtime.interpreter import dot_dtype
from amfm.kernels.runtime.tuning import Config, config_for

# Tokens of the largest tile, of which a chunk is a multiple.
LARGEST_TILE = DIAG_LIMITS.chunk_sizes[0]


# Candidates of each kernel, the fixed one first: tokens and channels of a tile. Backward holds four tiles of states at
# once: only those of 8 x 32 spill on no GPU (sm_80, sm_90, sm_100 with the assembler of Triton 3.9).
FORWARD, BACKWARD = (
    tuple({"Q": tokens, "BLOCK_C": channels, "num_warps": warps, "num_stages": 1} for tokens, channels, warps in tiles)
    for tiles in (((16, 64, 8), (8, 64, 8), (16, 32, 8)), ((8, 32, 8), (8, 64, 8), (16, 32, 8)))
)


def diag_scan_triton(
    x_BTC: Tensor,
    dt_BTC: Tensor,
    A_CN: Tensor,
    B_BTN: Tensor,
    C_BTN: Tensor,
    D_C: Tensor,
    initial_state_BCN: Tensor | None,
    document_ids_BT: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """As `torch_impl.chunked_diag_scan`, for float32, bfloat16 and float16.

    chunk_size is the distance of the states that backward starts from. Raises ValueError for chunk or state sizes without
    a kernel.

    x and dt [B, T, C], A [C, N], B and C [B, T, N], D [C], initial state [B, C, N] -> y [B, T, C] and the last
    state.
    """
    dot_dtype(x_BTC.dtype)  # rejects float64
    DIAG_LIMITS.check(chunk_size, A_CN.shape[1], 1)
    firsts = None if document_ids_BT is None else first_tokens(document_ids_BT)
    tensors = (x_BTC, dt_BTC, A_CN, B_BTN, C_BTN, D_C, initial_state_BCN, firsts)
    return _forward(*tensors, chunk_size, differentiated(*tensors))[:2]


def _config(kernel: str, candidates: tuple[Config, ...], x: Tensor, N: int, chunk_size: int) -> dict[str, Any]:
    """Tile and options of a kernel, with no more channels than there are, and the tiles of a chunk."""
    config = dict(config_for(kernel, (x.dtype, N, chunk_size), candidates, x.device))
    config["BLOCK_C"] = min(config["BLOCK_C"], triton.next_power_of_2(x.shape[2]))
    return config | {"TILES": chunk_size // config["Q"], "BLOCK_N": triton.next_power_of_2(N)}


@torch.library.custom_op("amfm::diag_scan_triton", mutates_args=())
def _forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    initial: Tensor | None,
    firsts: Tensor | None,
    chunk_size: int,
    keep_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, last state, and the states that enter chunks [B, chunks, N, channels] (empty unless they are kept)."""
    x, B, C, dt, A = pack_inner(x), pack_inner(B), pack_inner(C), dt.contiguous(), A.contiguous()
    initial = pack(initial)
    (rows, T, channels), N = x.shape, A.shape[1]
    chunks = triton.cdiv(T, chunk_size)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    final = dt.new_empty(rows, channels, N)
    entering = dt.new_empty(rows, chunks, N, channels) if keep_states else None
    config = _config("diag_forward", FORWARD, x, N, chunk_size)
    diag_forward_kernel[(triton.cdiv(channels, config["BLOCK_C"]), rows)](
        x, dt, A, B, C, D, firsts, initial, y, entering, final, T, channels, N, chunks, *outer_strides(x, B, C),
        DOCUMENTS=firsts is not None, INITIAL=initial is not None, SAVE=keep_states, **config,
    )  # fmt: skip
    return y, final, dt.new_empty(0) if entering is None else entering


@fake_of(_forward)
def _(given: Any) -> tuple[Tensor, ...]:
    x, dt, chunk = given.x, given.dt, given.chunk_size
    (rows, T, channels), N = x.shape, given.A.shape[1]
    entering = (rows, (T + chunk - 1) // chunk, N, channels) if given.keep_states else (0,)
    return x.new_empty(x.shape), dt.new_empty(rows, channels, N), dt.new_empty(entering)


@torch.library.custom_op("amfm::diag_scan_triton_backward", mutates_args=())
def _backward(
    d_y: Tensor,
    d_final: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    initial: Tensor | None,
    firsts: Tensor | None,
    entering: Tensor,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, dt, A, B, C, D and the initial state; that of an absent one is empty."""
    x, B, C, dt, A, d_y = pack_inner(x), pack_inner(B), pack_inner(C), dt.contiguous(), A.contiguous(), d_y.contiguous()
    d_final = pack(d_final)
    (rows, T, channels), N = x.shape, A.shape[1]
    assert len(entering) == rows, "a scan that is to be differentiated keeps its states"
    config = _config("diag_backward", BACKWARD, x, N, chunk_size)
    blocks = triton.cdiv(channels, config["BLOCK_C"])
    # One state for each tile of a chunk, a program's own.
    buffer = dt.new_empty(rows, blocks, config["TILES"], config["BLOCK_N"], config["BLOCK_C"])
    d_x, d_dt = torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.empty_like(dt)
    d_A, d_D, d_initial = dt.new_empty(rows, channels, N), dt.new_empty(rows, channels), dt.new_empty(rows, channels, N)
    d_B, d_C = dt.new_empty(blocks, rows, T, N), dt.new_empty(blocks, rows, T, N)
    diag_backward_kernel[(blocks, rows)](
        x, dt, A, B, C, D, firsts, d_y, d_final, entering, buffer, d_x, d_dt, d_A, d_B, d_C, d_D, d_initial,
        T, channels, N, entering.shape[1], *outer_strides(x, B, C),
        DOCUMENTS=firsts is not None, D_FINAL=d_final is not None, **config,
    )  # fmt: skip
    d_initial = x.new_empty(0) if initial is None else d_initial.to(initial.dtype)
    return d_x, d_dt, d_A.sum(0), d_B.sum(0).to(B.dtype), d_C.sum(0).to(C.dtype), d_D.sum(0), d_initial


differentiate(
    _forward,
    _backward,
    outputs=("y", "final", "entering"),
    gradients=("x", "dt", "A", "B", "C", "D", "initial"),
)
