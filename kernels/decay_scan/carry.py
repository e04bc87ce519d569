"""What a state that enters a row adds to the row's outputs: the part of a scan that can wait for the state to arrive.

Why: a context rank does not know the state before its part of a row until the ranks before it are done. The
scan is linear in that state, so each rank scans from zero at once and adds e^(b_t) q_t S_in when the state has
come. That multiplies 2 K V a token and head; a second scan would cost more than twice as much and read and
write the row again. It runs in PyTorch behind every backend; communication is the caller's.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from amfm.kernels.common.chunks import LOG2_E
from amfm.kernels.common.gemm_precision import gemm_dtype
from amfm.kernels.common.inputs import check_documents, check_float, check_row, check_shape
from amfm.kernels.decay_scan.op import check_mamba2


def add_carried_state(
    y_BTHP: Tensor,
    dt_BTH: Tensor,
    A_log_H: Tensor,
    C_BTGN: Tensor,
    dt_bias_H: Tensor,
    state_BHPN: Tensor,
    *,
    document_ids_BT: Tensor | None = None,
) -> Tensor:
    """The outputs of `mamba2_scan` with an initial state, from its outputs without one.

    y_t grows by e^(g_1 + ... + g_t) state C_t with g = -exp(A_log) softplus(dt + dt_bias), for the tokens of the row's
    first document: the scan is linear in its state. So a row that is cut over ranks is scanned once, from zero, while
    the state before it is still unknown. Shapes and dtypes as in `mamba2_scan`; returns [B, T, H, P] in the dtype of y.
    Products take operands of the dtype of C, sums are float32 (float64 for float64 inputs).

    Raises ValueError for shapes, dtypes or devices that do not fit.
    """
    check_mamba2(y_BTHP, dt_BTH, A_log_H, C_BTGN, C_BTGN, A_log_H, dt_bias_H)
    B, T, H, P = y_BTHP.shape
    check_shape("state_BHPN", state_BHPN, (B, H, P, C_BTGN.shape[3]), y_BTHP)
    check_float("state_BHPN", state_BHPN)
    check_documents(document_ids_BT, B, T, y_BTHP)
    wide = torch.float64 if y_BTHP.dtype == torch.float64 else torch.float32
    g_BTH = F.softplus(dt_BTH.to(wide) + dt_bias_H.to(wide)) * -A_log_H.to(wide).exp()
    decay_BTH = (g_BTH.cumsum(1) * LOG2_E).exp2()
    if document_ids_BT is not None:
        is_first_BT1 = (document_ids_BT == document_ids_BT[:, :1])[..., None]
        # The entering state belongs to the row's first document; later ones start from zero.
        decay_BTH = torch.where(is_first_BT1, decay_BTH, torch.zeros_like(decay_BTH))
    added_BTHP: Tensor = _AddCarried.apply(y_BTHP, C_BTGN, state_BHPN.to(wide), decay_BTH)
    return added_BTHP


def decay_read(q_BTHK: Tensor, g: Tensor, *, document_ids_BT: Tensor | None = None) -> Tensor:
    """What reads the state before a row: o = o_from_zero + read S_in for `decay_scan`, which is linear in that state.

    read_t = e^(g_1 + ... + g_t) q_t in the row's first document and 0 in those after it. q [B, T, H, K]; g [B, T, H] or
    [B, T, H, K] <= 0, as in `decay_scan`. Returns [B, T, H, K] in float32 (float64 for float64 inputs), differentiable
    in q and g.

    Raises ValueError for shapes, dtypes or devices that do not fit.
    """
    check_shape("q_BTHK", q_BTHK, (-1, -1, -1, -1))
    B, T, H, K = q_BTHK.shape
    check_shape("g", g, (B, T, H, K) if g.dim() == 4 else (B, T, H), q_BTHK)
    check_float("q_BTHK", q_BTHK)
    check_float("g", g)
    check_row(document_ids_BT, None, (B, H, K), 1, q_BTHK)
    wide = torch.float64 if q_BTHK.dtype == torch.float64 else torch.float32
    b = g.to(wide).cumsum(1) * LOG2_E
    if document_ids_BT is not None:
        is_later_BT = document_ids_BT != document_ids_BT[:, :1]
        b = b.masked_fill(is_later_BT.view(B, T, *(1,) * (g.dim() - 2)), -torch.inf)
    return q_BTHK.to(wide) * (b if g.dim() == 4 else b[..., None]).exp2()


class _AddCarried(torch.autograd.Function):
    """y_t + decay_t state C_t. Saves the last three and multiplies again in backward: the product is wider than all of them.

    y and the product stay in their own dtypes in memory; an operation that reads them widens them to that of the decays.
    """

    @staticmethod
    def forward(ctx: Any, y_BTHP: Tensor, C_BTGN: Tensor, state_BHPN: Tensor, decay_BTH: Tensor) -> Tensor:
        ctx.save_for_backward(C_BTGN, state_BHPN, decay_BTH)
        read_BTHP = _multiply(C_BTGN, state_BHPN)
        return torch.addcmul(y_BTHP, read_BTHP, decay_BTH[..., None], out=torch.empty_like(y_BTHP))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_BTHP: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        C_BTGN, state_BHPN, decay_BTH = ctx.saved_tensors
        (B, T, G, N), (_, H, P, _) = C_BTGN.shape, state_BHPN.shape
        d_decay_BTH = (_multiply(C_BTGN, state_BHPN).to(decay_BTH.dtype) * d_BTHP).sum(-1)
        # Heads of a group share C, so their P channels stand side by side in one product, X = R P columns.
        products = gemm_dtype(C_BTGN)
        decayed_BTHP = torch.mul(d_BTHP, decay_BTH[..., None], out=d_BTHP.new_empty(d_BTHP.shape, dtype=products))
        d_BGTX = decayed_BTHP.view(B, T, G, -1).transpose(1, 2)
        C_BGTN = C_BTGN.transpose(1, 2).to(products)
        state_BGXN = state_BHPN.reshape(B, G, -1, N).to(products)
        d_state_BHPN = (d_BGTX.transpose(-1, -2) @ C_BGTN).reshape(B, H, P, N).to(state_BHPN.dtype)
        d_C_BTGN = (d_BGTX @ state_BGXN).transpose(1, 2).to(C_BTGN.dtype)
        return d_BTHP, d_C_BTGN, d_state_BHPN, d_decay_BTH


def _multiply(C_BTGN: Tensor, state_BHPN: Tensor) -> Tensor:
    """state C_t for each head, [B, T, H, P] in the dtype of products, as one product a group."""
    (B, T, G, N), (_, H, P, _) = C_BTGN.shape, state_BHPN.shape
    products = gemm_dtype(C_BTGN)
    state_BGXN = state_BHPN.reshape(B, G, -1, N).to(products)
    out_BGTX = C_BTGN.transpose(1, 2).to(products) @ state_BGXN.transpose(-1, -2)
    return out_BGTX.transpose(1, 2).reshape(B, T, H, P)
