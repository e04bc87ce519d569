"""The selective scan in chunks with PyTorch: tiles of rows and channels that stay in cache, a backward that walks again.

The derivation, with the names used here, is in README.md next to this file.

Layout: [tokens, rows, N, channels], channels innermost, so that each of the L multiply-adds of a chunk runs
over long contiguous rows. One buffer for decays and one for states serves all tiles. Nothing of size [B, T, N,
C] exists: backward starts from the states that entered chunks and walks forward once more. As custom
operations, torch.compile takes them as single nodes; unrolled, T steps would be T nodes.

`read_carried_state` is what a state that enters a row adds to the outputs: a context rank scans its part of a row from zero while
the ranks before it still work, and adds this once their state has come. The decays of a row are N times as wide as x, so they
are taken for some tokens at a time, and are never all there."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from amfm.kernels.common.chunks import LOG2_E
from amfm.kernels.common.custom_op import differentiate, fake_of
from amfm.kernels.common.inputs import check_documents, check_float, check_shape

# Rows times tokens times channels of a tile: with 16 state numbers 2 MiB of float32 decays, and as much of states.
_TILE = 32768


def chunked_diag_scan(
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
    """h_t = e^(dt_t A) h_(t-1) + dt_t x_t B_t, y_t = h_t C_t + D x_t, h = 0 before the first token of each document.

    dt >= 0, A <= 0 and D in float32 (float64 for float64 inputs), and so the initial state.
    Returns y [B, T, C] in the dtype of x and the last state [B, C, N] in float32 (float64 for float64 inputs).

    x and dt [B, T, C], A [C, N], B and C [B, T, N], D [C], initial state [B, C, N].
    """
    begins_BT = None
    if document_ids_BT is not None:
        begins_BT = torch.zeros_like(document_ids_BT, dtype=torch.bool)
        begins_BT[:, 1:] = document_ids_BT[:, 1:] != document_ids_BT[:, :-1]
    chunk_size = min(chunk_size, x_BTC.shape[1])
    y, final, _ = _forward(x_BTC, dt_BTC, A_CN, B_BTN, C_BTN, D_C, initial_state_BCN, begins_BT, chunk_size)
    return y, final


class _Tile:
    """R rows and c channels that are walked together, a chunk of L tokens at a time."""

    def __init__(
        self,
        inputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
        begins: Tensor | None,
        where: tuple[slice, slice],
        buffer: Tensor,
    ) -> None:
        """Views of x, dt [R, T, c], A [N, c], B and C [R, T, N], begins [R, T], and of room for [chunk, R, N, c] each."""
        rows, channels = where
        x, dt, A, B, C = inputs
        self.x, self.dt, self.B, self.C = x[rows, :, channels], dt[rows, :, channels], B[rows], C[rows]
        self.begins = None if begins is None else begins[rows]
        self.A = A[channels].t().contiguous()
        self.exponents = self.A * LOG2_E
        self.shape = (self.x.shape[0], *self.A.shape)
        self.chunk = buffer.shape[1]
        self.decays, self.states, *rest = buffer[..., : math.prod(self.shape)].unflatten(-1, self.shape)
        self.gradients = rest[0] if rest else None

    def chunks(self) -> list[slice]:
        """The tokens of each chunk, the last one shorter where the row ends."""
        T = self.x.shape[1]
        return [slice(start, min(start + self.chunk, T)) for start in range(0, T, self.chunk)]

    def take(self, tensor_RTX: Tensor, tokens: slice) -> Tensor:
        """Tokens of a [R, T, X] tensor as [L, R, X]."""
        return tensor_RTX[:, tokens].transpose(0, 1).to(self.dt.dtype)

    def walk(self, tokens: slice, state: Tensor) -> tuple[Tensor, Tensor]:
        """Decays and states [L, R, N, c] of a chunk, from the state [R, N, c] before it; both live until the next walk.

        In place: `states` first holds what each token writes and then the state after it.
        """
        length = tokens.stop - tokens.start
        decays, states = self.decays[:length], self.states[:length]
        dt = self.take(self.dt, tokens)
        torch.mul(dt[:, :, None], self.exponents, out=decays)
        if self.begins is not None:
            # A document begins: the exponent becomes -inf and the decay an exact 0.
            decays.masked_fill_(self.begins[:, tokens].t()[:, :, None, None], -torch.inf)
        decays.exp2_()
        torch.mul((dt * self.take(self.x, tokens))[:, :, None], self.take(self.B, tokens)[..., None], out=states)
        for decay, after in zip(decays, states):
            torch.addcmul(after, decay, state, out=after)
            state = after
        return decays, states

    def walk_back(self, decays: Tensor, C_LRN: Tensor, d_out_LRc: Tensor, d_last: Tensor) -> Tensor:
        """Gradients [L, R, N, c] of a chunk's states, from those of its outputs and of the state that leaves it.

        dh_t = C_t dy_t + e^(dt_(t+1) A) dh_(t+1), in place from the last token.
        """
        assert self.gradients is not None, "only a backward has room for gradients of states"
        d_states = torch.mul(C_LRN[..., None], d_out_LRc[:, :, None], out=self.gradients[: len(decays)])
        d_states[-1] += d_last
        each = d_states.unbind(0)
        for t in range(len(each) - 1, 0, -1):
            torch.addcmul(each[t - 1], decays[t], each[t], out=each[t - 1])
        return d_states


def _tiles(B: int, C: int, chunk: int) -> Iterator[tuple[slice, slice]]:
    """Rows and channels that are walked together.

    Channels innermost: tiles that read the same rows of B and C follow each other.
    """
    rows, channels = _tile_size(B, C, chunk)
    for row in range(0, B, rows):
        for channel in range(0, C, channels):
            yield slice(row, row + rows), slice(channel, channel + channels)


def _tile_size(B: int, C: int, chunk: int) -> tuple[int, int]:
    """How many rows and channels fit a tile: all channels before a second row."""
    buffer = max(1, _TILE // chunk)
    return min(B, max(1, buffer // C)), min(C, buffer)


@torch.library.custom_op("amfm::diag_scan_torch", mutates_args=())
def _forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    initial: Tensor | None,
    begins: Tensor | None,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, last state, and the states that enter chunks [B, chunks, N, C]."""
    num_rows, T, num_channels = x.shape
    buffer = dt.new_empty(2, chunk, math.prod(_tile_size(num_rows, num_channels, chunk)) * A.shape[1])
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    final = dt.new_empty(num_rows, *A.shape)
    entering = dt.new_empty(num_rows, -(-T // chunk), A.shape[1], num_channels)
    for rows, channels in _tiles(num_rows, num_channels, chunk):
        tile = _Tile((x, dt, A, B, C), begins, (rows, channels), buffer)
        state = dt.new_zeros(tile.shape) if initial is None else initial[rows, channels].transpose(1, 2)
        for number, tokens in enumerate(tile.chunks()):
            entering[rows, number, :, channels] = state
            _, states = tile.walk(tokens, state)
            state = states[-1].clone()
            read = torch.matmul(tile.take(tile.C, tokens)[:, :, None], states)[:, :, 0]
            out = torch.addcmul(read, tile.take(tile.x, tokens), D[channels])
            y[rows, tokens, channels] = out.transpose(0, 1).to(y.dtype)
        final[rows, channels] = state.transpose(1, 2)
    return y, final, entering


@fake_of(_forward)
def _(given: Any) -> tuple[Tensor, ...]:
    x, dt = given.x, given.dt
    (rows, T, channels), N = x.shape, given.A.shape[1]
    return x.new_empty(x.shape), dt.new_empty(rows, channels, N), dt.new_empty(rows, -(-T // given.chunk), N, channels)


@torch.library.custom_op("amfm::diag_scan_torch_backward", mutates_args=())
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
    begins: Tensor | None,
    entering: Tensor,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, dt, A, B, C, D and the initial state."""
    num_rows, _, num_channels = x.shape
    buffer = dt.new_empty(3, chunk, math.prod(_tile_size(num_rows, num_channels, chunk)) * A.shape[1])
    d_x, d_dt = torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(dt)
    d_A, d_D = torch.zeros_like(A), torch.zeros_like(D)
    d_B, d_C = dt.new_zeros(B.shape), dt.new_zeros(C.shape)
    d_initial = dt.new_empty(num_rows, *A.shape)
    for rows, channels in _tiles(num_rows, num_channels, chunk):
        tile = _Tile((x, dt, A, B, C), begins, (rows, channels), buffer)
        d_A_Nc = dt.new_zeros(tile.A.shape)
        d_state = dt.new_zeros(tile.shape) if d_final is None else d_final[rows, channels].transpose(1, 2).clone()
        for number, tokens in reversed(list(enumerate(tile.chunks()))):
            before = entering[rows, number, :, channels]
            decays, states = tile.walk(tokens, before)
            d_out = tile.take(d_y[rows, :, channels], tokens)
            d_C[rows, tokens] += _sum_channels(d_out, states)
            d_states = tile.walk_back(decays, tile.take(tile.C, tokens), d_out, d_state)
            # What the first token's state got reaches the chunk before, decayed.
            torch.mul(decays[0], d_states[0], out=d_state)
            steps, values = tile.take(tile.dt, tokens), tile.take(tile.x, tokens)
            d_B[rows, tokens] += _sum_channels(steps * values, d_states)
            written = torch.matmul(tile.take(tile.B, tokens)[:, :, None], d_states)[:, :, 0]
            # Decays are not needed any more: their memory takes decay * state before * gradient, the exponents'
            # gradient.
            d_exponents = decays
            d_exponents[0] *= before
            d_exponents[1:] *= states[:-1]
            d_exponents *= d_states
            into_steps = torch.mul(d_exponents, tile.A, out=d_states).sum(2).addcmul_(values, written)
            d_dt[rows, tokens, channels] = into_steps.transpose(0, 1)
            d_A_Nc += d_exponents.mul_(steps[:, :, None]).sum((0, 1))
            through = torch.addcmul(steps * written, d_out, D[channels])
            d_x[rows, tokens, channels] = through.transpose(0, 1).to(x.dtype)
            d_D[channels] += (d_out * values).sum((0, 1))
        d_A[channels] += d_A_Nc.t()
        d_initial[rows, channels] = d_state.transpose(1, 2)
    d_initial = x.new_empty(0) if initial is None else d_initial.to(initial.dtype)
    return d_x, d_dt, d_A, d_B.to(B.dtype), d_C.to(C.dtype), d_D, d_initial


def _sum_channels(row_LRc: Tensor, states_LRNc: Tensor) -> Tensor:
    """Sum of states times a row over channels, [R, L, N].

    The row stands on the left: with the vector on the right, PyTorch's batched product took 12 times as long.
    """
    return torch.matmul(row_LRc[:, :, None], states_LRNc.transpose(-1, -2))[:, :, 0].transpose(0, 1)


differentiate(
    _forward,
    _backward,
    outputs=("y", "final", "entering"),
    gradients=("x", "dt", "A", "B", "C", "D", "initial"),
)


# Rows times tokens times channels that are taken at once: few on a CPU, where their decays stay near the cache.
_PIECE_ON_CPU, _PIECE = 1 << 15, 1 << 22


def read_carried_state(
    dt_BTC: Tensor,
    A_log_CN: Tensor,
    C_BTN: Tensor,
    dt_bias_C: Tensor,
    state_BCN: Tensor,
    *,
    document_ids_BT: Tensor | None = None,
) -> Tensor:
    """What `diag_scan` with this initial state gives on top of what it gives without one, [B, T, C].

    That is sum_n C_tn e^(A_cn (dt_1 + ... + dt_t)) state_cn in the row's first document and 0 in those after it, with dt
    and A as `diag_scan` takes them from its raw inputs. So a row that is cut over ranks is scanned once, from zero, while the
    state before it is still unknown. Returns float32 (float64 for float64 inputs); saves nothing larger than its inputs.

    Raises ValueError for shapes, dtypes or devices that do not fit.
    """
    check_shape("dt", dt_BTC, (-1, -1, -1))
    B, T, C = dt_BTC.shape
    check_shape("A_log_CN", A_log_CN, (C, -1), dt_BTC)
    N = A_log_CN.shape[1]
    check_shape("C", C_BTN, (B, T, N), dt_BTC)
    check_shape("dt_bias_C", dt_bias_C, (C,), dt_BTC)
    check_shape("state_BCN", state_BCN, (B, C, N), dt_BTC)
    for name, tensor in (("dt", dt_BTC), ("A_log_CN", A_log_CN), ("C", C_BTN), ("state_BCN", state_BCN)):
        check_float(name, tensor)
    check_documents(document_ids_BT, B, T, dt_BTC)
    wide = torch.float64 if dt_BTC.dtype == torch.float64 else torch.float32
    # The exponent of a state at token t is A times the time since the row began: one running sum serves all N
    # numbers.
    elapsed_BTC = F.softplus(dt_BTC.to(wide) + dt_bias_C.to(wide)).cumsum(1)
    carried_BTC = _Carry.apply(elapsed_BTC, -A_log_CN.to(wide).exp(), C_BTN, state_BCN.to(wide))
    if document_ids_BT is None:
        return carried_BTC
    return carried_BTC.masked_fill((document_ids_BT != document_ids_BT[:, :1])[..., None], 0.0)


class _Carry(torch.autograd.Function):
    """Takes the decays of some tokens at a time, and again in backward: those of all are N times as wide as its inputs.

    Saves elapsed time, A, C and the state.
    """

    @staticmethod
    def forward(ctx: Any, elapsed_BTC: Tensor, A_CN: Tensor, C_BTN: Tensor, state_BCN: Tensor) -> Tensor:
        ctx.save_for_backward(elapsed_BTC, A_CN, C_BTN, state_BCN)
        carried_BTC = torch.empty_like(elapsed_BTC)
        A_NC, state_B1NC = A_CN.t(), state_BCN.transpose(1, 2)[:, None]
        for tokens in _pieces(elapsed_BTC):
            decayed = _decays(elapsed_BTC[:, tokens], A_NC).mul_(state_B1NC)
            read = C_BTN[:, tokens, None].to(decayed.dtype)
            carried_BTC[:, tokens] = torch.matmul(read, decayed)[:, :, 0]
        return carried_BTC

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_BTC: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        elapsed_BTC, A_CN, C_BTN, state_BCN = ctx.saved_tensors
        A_NC, state_B1NC = A_CN.t().contiguous(), state_BCN.transpose(1, 2)[:, None]
        d_elapsed_BTC = torch.empty_like(elapsed_BTC)
        d_A_NC, d_state_BNC = torch.zeros_like(A_NC), torch.zeros_like(state_B1NC[:, 0])
        d_C_BTN = elapsed_BTC.new_empty(C_BTN.shape)
        for tokens in _pieces(elapsed_BTC):
            elapsed, d_out = elapsed_BTC[:, tokens], d_BTC[:, tokens]
            decays = _decays(elapsed, A_NC)
            d_decayed = C_BTN[:, tokens, :, None].to(decays.dtype) * d_out[:, :, None]
            d_state_BNC += (d_decayed * decays).sum(1)
            decayed = decays.mul_(state_B1NC)
            d_C_BTN[:, tokens] = torch.matmul(d_out[:, :, None], decayed.transpose(-1, -2))[:, :, 0]
            d_exponents = d_decayed.mul_(decayed)
            d_elapsed_BTC[:, tokens] = (d_exponents * A_NC).sum(2)
            d_A_NC += d_exponents.mul_(elapsed[:, :, None]).sum((0, 1))
        return d_elapsed_BTC, d_A_NC.t(), d_C_BTN.to(C_BTN.dtype), d_state_BNC.transpose(1, 2)


def _pieces(elapsed_BTC: Tensor) -> list[slice]:
    """The tokens that are taken at once."""
    B, T, C = elapsed_BTC.shape
    piece = _PIECE_ON_CPU if elapsed_BTC.device.type == "cpu" else _PIECE
    length = max(1, piece // (B * C))
    return [slice(start, start + length) for start in range(0, T, length)]


def _decays(elapsed_BLC: Tensor, A_NC: Tensor) -> Tensor:
    """Factors [B, L, N, C] of the entering state at each token.

    In powers of 2 (`amfm.kernels.common.chunks`).
    """
    return (elapsed_BLC[:, :, None] * (A_NC * LOG2_E)).exp2_()
