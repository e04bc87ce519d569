"""What a state that enters a row adds to the outputs of the selective scan, without a tensor of all its decays.

Why: a context rank scans its part of a row from zero while the ranks before it still work, and adds this once
their state has come. The decays of a row are N times as wide as x, so they are taken for some tokens at a time.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from amfm.kernels.common.chunks import LOG2_E
from amfm.kernels.common.inputs import check_documents, check_float, check_shape

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
