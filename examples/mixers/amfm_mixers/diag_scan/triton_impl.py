"""The Triton scan of Mamba as an operation that autograd, torch.compile and meta tensors know.

How: forward saves the state in front of each chunk; backward goes through the chunks from the last, walks one
forward for the states in front of its tiles, then its tiles backward. Sums over rows (A, D) and over blocks of
channels (B, C) are partial results of programs, added by PyTorch in a fixed order.

The selective scan as Triton kernels: the states of a block of channels stay on chip while its program walks a row.

Names and formulas: README.md here. Tensors of a tile are [Q, N, channels], so that neighbouring threads hold neighbouring
channels, and the tokens of one are in one thread: a walk over them needs no exchange.
"""

# Triton reads a kernel's parameters from the call: they carry no types.
# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: ANN201, SIM102

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from amfm.kernels.common.custom_op import differentiate, fake_of
from amfm.kernels.common.inputs import first_tokens, outer_strides, pack, pack_inner
from amfm.kernels.common.scan_launch import differentiated
from amfm.kernels.common.tiles import load_values
from amfm.kernels.runtime.interpreter import dot_dtype
from amfm.kernels.runtime.tuning import Config, config_for
from amfm_mixers.diag_scan.op import diag_flops
from amfm_mixers.options import DIAG_LIMITS


@triton.jit
def load_matrix(base, n, column, N, channels):
    """A [channels, N] matrix as [N, channels], zeros outside.

    [BLOCK_N, BLOCK_C] float32 where the matrix is.
    """
    inside = (n < N)[:, None] & (column < channels)[None, :]
    return tl.load(base + column.to(tl.int64)[None, :] * N + n[:, None], mask=inside, other=0.0)


@triton.jit
def store_matrix(base, value, n, column, N, channels):
    """The transpose of `load_matrix`."""
    inside = (n < N)[:, None] & (column < channels)[None, :]
    tl.store(base + column.to(tl.int64)[None, :] * N + n[:, None], value, mask=inside)


@triton.jit
def decays(dt_tile, rates, firsts, row, t, T, DOCUMENTS: tl.constexpr):
    """e^(dt rates) of a tile, [Q, N, channels], 0 at tokens that begin a document other than the row's first.

    dt_tile [Q, channels], rates A [N, channels].
    """
    exponents = dt_tile[:, None, :] * rates[None, :, :]
    if DOCUMENTS:
        begin = tl.load(firsts + row + tl.minimum(t, T - 1))
        exponents = tl.where(((begin == t) & (t > 0))[:, None, None], -float("inf"), exponents)
    return tl.exp(exponents)


@triton.jit
def take_token(tile, token: tl.constexpr, Q: tl.constexpr):
    """One token of a [Q, N, channels] tile, by bits: sums with zeros of integers cost nothing once compiled.

    Of floats x + 0.0 differs from x at -0.0, so a compiler would have to keep the additions.
    """
    bits = tl.where(tl.arange(0, Q)[:, None, None] == token, tile.to(tl.int32, bitcast=True), 0)
    return tl.sum(bits, axis=0).to(tl.float32, bitcast=True)


@triton.jit
def put_token(tile, row, token: tl.constexpr, Q: tl.constexpr):
    """A tile with one of its tokens replaced."""
    return tl.where(tl.arange(0, Q)[:, None, None] == token, row[None, :, :], tile)


@triton.jit
def walk_tile(decay, new, state, Q: tl.constexpr):
    """States after each token of a tile and after the last, from the state before it.

    Unrolled: a multiply-add a token inside one thread. states [Q, N, channels], state [N, channels].
    """
    states = new
    for token in tl.static_range(Q):
        state = take_token(decay, token, Q) * state + take_token(new, token, Q)
        states = put_token(states, state, token, Q)
    return states, state


@triton.jit
def walk_tile_back(decay, flow, d_state, Q: tl.constexpr):
    """What reaches each token's state, from its own output and from the token after it; and what the tile passes on.

    `flow` begins as C_t dy_t and ends as the gradient of each token's state.
    """
    for back in tl.static_range(Q):
        row = take_token(flow, Q - 1 - back, Q) + d_state
        flow = put_token(flow, row, Q - 1 - back, Q)
        d_state = take_token(decay, Q - 1 - back, Q) * row
    return flow, d_state


@triton.jit
def diag_forward_kernel(
    x, dt, A, B, C, D, firsts, initial, y, entering, final,
    T, channels, N, chunks, stride_xb, stride_xt, stride_bb, stride_bt, stride_cb, stride_ct,
    Q: tl.constexpr, TILES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
    DOCUMENTS: tl.constexpr, INITIAL: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    """One program walks one row for a block of channels, a tile of Q tokens per step.

    dt [B, T, channels] and y are packed; final and initial are [B, channels, N]; with SAVE entering [B, chunks, N,
    channels] holds the states before chunks of TILES tiles.

    Grid: (blocks of channels, B). x, B and C may be slices with packed channels; sums and states are float32.
    """
    batch = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    n = tl.arange(0, BLOCK_N)
    row = batch * T
    state_base = batch * channels * N
    rates = load_matrix(A, n, column, N, channels)
    through = tl.load(D + column, mask=column < channels, other=0.0)
    state = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    if INITIAL:
        state = load_matrix(initial + state_base, n, column, N, channels)
    in_state = (n < N)[:, None] & (column < channels)[None, :]
    for tile in tl.range(0, tl.cdiv(T, Q)):
        t = tile * Q + tl.arange(0, Q)
        if SAVE:
            if tile % TILES == 0:
                at = entering + (batch * chunks + tile // TILES) * N * channels
                tl.store(at + n[:, None] * channels + column[None, :], state, mask=in_state)
        x_tile = load_values(x + batch * stride_xb, t, T, stride_xt, column, channels)
        dt_tile = load_values(dt + row * channels, t, T, channels, column, channels)
        B_tile = load_values(B + batch * stride_bb, t, T, stride_bt, n, N)
        C_tile = load_values(C + batch * stride_cb, t, T, stride_ct, n, N)
        decay = decays(dt_tile, rates, firsts, row, t, T, DOCUMENTS)
        states, state = walk_tile(decay, (dt_tile * x_tile)[:, None, :] * B_tile[:, :, None], state, Q)
        out = tl.sum(states * C_tile[:, :, None], axis=1) + through[None, :] * x_tile
        where = y + (row + t)[:, None] * channels + column[None, :]
        tl.store(where, out.to(y.dtype.element_ty), mask=(t < T)[:, None] & (column < channels)[None, :])
    store_matrix(final + state_base, state, n, column, N, channels)


@triton.jit
def diag_backward_kernel(
    x, dt, A, B, C, D, firsts, d_y, d_final, entering, buffer, d_x, d_dt, d_A, d_B, d_C, d_D, d_initial,
    T, channels, N, chunks, stride_xb, stride_xt, stride_bb, stride_bt, stride_cb, stride_ct,
    Q: tl.constexpr, TILES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
    DOCUMENTS: tl.constexpr, D_FINAL: tl.constexpr,
):  # fmt: skip
    """One program walks one row backward for a block of channels, with the gradient of the state on chip.

    A chunk is walked forward from its saved state first, for the states before its tiles, which stay in `buffer` [B, blocks,
    TILES, BLOCK_N, BLOCK_C], the program's own. d_A [B, channels, N], d_D [B, channels] are sums of a row; d_B and d_C
    [blocks, B, T, N] those of a block of channels.

    Grid: (blocks of channels, B). d_B and d_C are sums over channels, which no program sees whole: PyTorch adds
    the blocks in order.
    """
    batch, block = tl.program_id(1).to(tl.int64), tl.program_id(0)
    column = block * BLOCK_C + tl.arange(0, BLOCK_C)
    n = tl.arange(0, BLOCK_N)
    row = batch * T
    x_base, B_base, C_base = x + batch * stride_xb, B + batch * stride_bb, C + batch * stride_cb
    dt_base, dy_base = dt + row * channels, d_y + row * channels
    state_base = batch * channels * N
    rates = load_matrix(A, n, column, N, channels)
    through = tl.load(D + column, mask=column < channels, other=0.0)
    in_state = (n < N)[:, None] & (column < channels)[None, :]
    own = n[:, None] * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    buffer_base = buffer + (batch * tl.num_programs(0) + block) * TILES * BLOCK_N * BLOCK_C
    d_state = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    if D_FINAL:
        d_state = load_matrix(d_final + state_base, n, column, N, channels)
    d_rates = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    d_through = tl.zeros((BLOCK_C,), tl.float32)
    for step in tl.range(0, chunks):
        chunk = chunks - 1 - step
        first_tile = chunk * TILES
        tiles = tl.minimum(TILES, tl.cdiv(T, Q) - first_tile)
        at = entering + (batch * chunks + chunk) * N * channels
        state = tl.load(at + n[:, None] * channels + column[None, :], mask=in_state, other=0.0)
        for tile in tl.range(0, tiles - 1):
            t = (first_tile + tile) * Q + tl.arange(0, Q)
            tl.store(buffer_base + tile * BLOCK_N * BLOCK_C + own, state)
            x_tile = load_values(x_base, t, T, stride_xt, column, channels)
            dt_tile = load_values(dt_base, t, T, channels, column, channels)
            B_tile = load_values(B_base, t, T, stride_bt, n, N)
            decay = decays(dt_tile, rates, firsts, row, t, T, DOCUMENTS)
            _, state = walk_tile(decay, (dt_tile * x_tile)[:, None, :] * B_tile[:, :, None], state, Q)
        tl.store(buffer_base + (tiles - 1) * BLOCK_N * BLOCK_C + own, state)
        # Threads may read what others have stored.
        tl.debug_barrier()
        for back in tl.range(0, tiles):
            tile = tiles - 1 - back
            t = (first_tile + tile) * Q + tl.arange(0, Q)
            state = tl.load(buffer_base + tile * BLOCK_N * BLOCK_C + own)
            x_tile = load_values(x_base, t, T, stride_xt, column, channels)
            dt_tile = load_values(dt_base, t, T, channels, column, channels)
            dy_tile = load_values(dy_base, t, T, channels, column, channels)
            B_tile = load_values(B_base, t, T, stride_bt, n, N)
            C_tile = load_values(C_base, t, T, stride_ct, n, N)
            wrote = (row + t)[:, None] * channels + column[None, :]
            inside = (t < T)[:, None] & (column < channels)[None, :]
            wrote_n = ((block * tl.num_programs(1) + batch) * T + t)[:, None] * N + n[None, :]
            inside_n = (t < T)[:, None] & (n < N)[None, :]

            new = (dt_tile * x_tile)[:, None, :] * B_tile[:, :, None]
            decay = decays(dt_tile, rates, firsts, row, t, T, DOCUMENTS)
            states, _ = walk_tile(decay, new, state, Q)
            tl.store(d_C + wrote_n, tl.sum(states * dy_tile[:, None, :], axis=2), mask=inside_n)
            flow, d_state = walk_tile_back(decay, dy_tile[:, None, :] * C_tile[:, :, None], d_state, Q)
            tl.store(d_B + wrote_n, tl.sum(flow * (dt_tile * x_tile)[:, None, :], axis=2), mask=inside_n)
            into = tl.sum(flow * B_tile[:, :, None], axis=1)
            dx_tile = dt_tile * into + through[None, :] * dy_tile
            tl.store(d_x + wrote, dx_tile.to(d_x.dtype.element_ty), mask=inside)
            # The gradient of an exponent: the state before the token, decayed, times what reaches the state after it.
            flow = flow * (states - new)
            d_rates += tl.sum(flow * dt_tile[:, None, :], axis=0)
            d_dt_tile = tl.sum(flow * rates[None, :, :], axis=1) + into * x_tile
            tl.store(d_dt + wrote, d_dt_tile, mask=inside)
            d_through += tl.sum(dy_tile * x_tile, axis=0)
        # The next chunk's states take the place of these.
        tl.debug_barrier()
    store_matrix(d_A + state_base, d_rates, n, column, N, channels)
    store_matrix(d_initial + state_base, d_state, n, column, N, channels)
    tl.store(d_D + batch * channels + column, d_through, mask=column < channels)


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


# What a plan counts of them, by shapes.
@register_flop_formula(torch.ops.amfm.diag_scan_triton)
def _(x: torch.Size, dt: torch.Size, A: torch.Size, *_: Any, **__: Any) -> int:
    rows, tokens, channels = x
    return diag_flops(rows, tokens, channels, A[1])


@register_flop_formula(torch.ops.amfm.diag_scan_triton_backward)
def _(d_y: torch.Size, d_final: Any, x: torch.Size, dt: torch.Size, A: torch.Size, *_: Any, **__: Any) -> int:
    rows, tokens, channels = x
    return diag_flops(rows, tokens, channels, A[1], backward=True)
