"""The selective scan of Mamba (S6), elementwise in channels and state numbers, and its one-token step.

How: with a decay of each channel and state number nothing is shared that a matrix product could take, so the
recurrence is walked, in chunks that keep only the states at their borders (README.md). Softplus and -exp(A_log)
are taken here and differentiated by autograd; backends see dt >= 0 and A <= 0. No ranks communicate: pieces of
a row compose by the total decay, and `read_carried_state` adds what a late state contributes.

`diag_by_steps` is the definition, one token at a time, that every other form is compared with."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from amfm.kernels.common.inputs import agreed, check_float, check_row, check_shape, drop_single_document
from amfm.kernels.runtime.backend import resolve_backend
from amfm_mixers.diag_scan.torch_impl import chunked_diag_scan


class DiagScanOutput(NamedTuple):
    """Output of `diag_scan`: y, the state after the last token, and the factor of the initial state in it."""

    y_BTC: Tensor
    final_state_BCN: Tensor
    total_decay_BCN: Tensor


def diag_scan(
    x_BTC: Tensor,
    dt_BTC: Tensor,
    A_log_CN: Tensor,
    B_BTN: Tensor,
    C_BTN: Tensor,
    D_C: Tensor,
    dt_bias_C: Tensor,
    *,
    document_ids_BT: Tensor | None = None,
    initial_state_BCN: Tensor | None = None,
    chunk_size: int = 64,
    backend: str = "auto",
) -> DiagScanOutput:
    """Mamba (S6): h_t = e^(dt_t A) h_(t-1) + dt_t x_t B_t, y_t = h_t C_t + D x_t, h = 0 before each document.

    Each of the C channels has N state numbers of its own, with its own decay: x [B, T, C], B and C [B, T, N], shared
    by all channels, in one dtype; dt [B, T, C] raw, softplus(dt + dt_bias) is taken here; A = -exp(A_log) [C, N]; D and
    dt_bias [C]. Document ids are integers [B, T], equal inside a document. The initial state belongs to the document of
    each row's first token. Steps, decays and states are float32 (float64 for float64 inputs).

    Returns y [B, T, C] in the dtype of x; the state [B, C, N] after the last token, of that token's document; and the
    factor [B, C, N] with which the initial state enters it, 0 where the row's documents differ. States of consecutive
    pieces of a row compose: final = total_decay * initial + (final with no initial state).

    Backward keeps the state that enters each chunk, N / chunk_size float32 numbers for each of x, and walks from it again.

    Raises ValueError for shapes, dtypes or devices that do not fit. Source: Gu and Dao 2023, arXiv 2312.00752.
    """
    check_diag(x_BTC, dt_BTC, A_log_CN, B_BTN, C_BTN, D_C, dt_bias_C)
    check_row(document_ids_BT, initial_state_BCN, (x_BTC.shape[0], *A_log_CN.shape), chunk_size, x_BTC)
    wide = torch.float64 if x_BTC.dtype == torch.float64 else torch.float32
    initial = None if initial_state_BCN is None else initial_state_BCN.to(wide)
    backend = resolve_backend(backend, x_BTC.device, "diag_scan", "amfm_mixers.diag_scan.case")
    if backend == "reference":
        x, dt, A_log, k, q, D, bias = (t.to(wide) for t in (x_BTC, dt_BTC, A_log_CN, B_BTN, C_BTN, D_C, dt_bias_C))
        y, final, decay = diag_by_steps(x, dt, A_log, k, q, D, bias, document_ids_BT, initial)
        return DiagScanOutput(y.to(x_BTC.dtype), final, decay)
    document_ids_BT = drop_single_document(document_ids_BT)
    dt_BTC = F.softplus(dt_BTC.to(wide) + dt_bias_C.to(wide))
    A_CN = -A_log_CN.to(wide).exp()
    y_BTC, final = _find_scan(backend)(
        x_BTC, dt_BTC, A_CN, B_BTN, C_BTN, D_C.to(wide), initial, document_ids_BT, chunk_size
    )
    return DiagScanOutput(y_BTC, final, _total_decay(dt_BTC, A_CN, document_ids_BT))


def diag_step(
    x_BC: Tensor,
    dt_BC: Tensor,
    A_log_CN: Tensor,
    B_BN: Tensor,
    C_BN: Tensor,
    D_C: Tensor,
    dt_bias_C: Tensor,
    state_BCN: Tensor,
) -> tuple[Tensor, Tensor]:
    """One token of `diag_scan` for decoding: from the state before it to (y [B, C], the state after it, float32).

    Raises ValueError for shapes, dtypes or devices that do not fit.
    """
    check_diag(x_BC[:, None], dt_BC[:, None], A_log_CN, B_BN[:, None], C_BN[:, None], D_C, dt_bias_C)
    check_shape("state_BCN", state_BCN, (*x_BC.shape, A_log_CN.shape[1]), x_BC)
    check_float("state_BCN", state_BCN)
    wide = torch.float64 if x_BC.dtype == torch.float64 else torch.float32
    x = x_BC.to(wide)
    dt = F.softplus(dt_BC.to(wide) + dt_bias_C.to(wide))
    decay = (dt[..., None] * -A_log_CN.to(wide).exp()).exp()
    state = decay * state_BCN.to(wide) + (dt * x)[..., None] * B_BN.to(wide)[:, None]
    y = (state @ C_BN.to(wide)[..., None])[..., 0] + D_C.to(wide) * x
    return y.to(x_BC.dtype), state


def check_diag(
    x_BTC: Tensor, dt_BTC: Tensor, A_log_CN: Tensor, B_BTN: Tensor, C_BTN: Tensor, D_C: Tensor, dt_bias_C: Tensor
) -> None:
    """Raise ValueError unless these are inputs of `diag_scan`.

    x, B and C share a dtype; dt and the parameters may have others.
    """
    check_shape("x", x_BTC, (-1, -1, -1))
    B, T = agreed(x_BTC.shape[:2], dt_BTC.shape[:2], B_BTN.shape[:2], C_BTN.shape[:2])
    check_shape("x", x_BTC, (B, T, -1))
    C = x_BTC.shape[2]
    check_shape("dt", dt_BTC, (B, T, C), x_BTC)
    check_shape("A_log_CN", A_log_CN, (C, -1), x_BTC)
    N = A_log_CN.shape[1]
    check_shape("B", B_BTN, (B, T, N), x_BTC)
    check_shape("C", C_BTN, (B, T, N), x_BTC)
    for name, vector in (("D_C", D_C), ("dt_bias_C", dt_bias_C)):
        check_shape(name, vector, (C,), x_BTC)
    for name, tensor in (("x", x_BTC), ("B", B_BTN), ("C", C_BTN)):
        check_float(name, tensor, x_BTC)
    for name, tensor in (("dt", dt_BTC), ("A_log_CN", A_log_CN), ("D_C", D_C), ("dt_bias_C", dt_bias_C)):
        check_float(name, tensor)


def _total_decay(dt_BTC: Tensor, A_CN: Tensor, document_ids_BT: Tensor | None) -> Tensor:
    """Factor [B, C, N] by which a row scales the state it starts from; 0 where that state's document ends in the row."""
    decay_BCN = (dt_BTC.sum(1)[..., None] * A_CN).exp()
    if document_ids_BT is None:
        return decay_BCN
    ends_B = document_ids_BT[:, -1] != document_ids_BT[:, 0]
    return decay_BCN.masked_fill(ends_B[:, None, None], 0.0)


def _find_scan(backend: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """The scan of a resolved backend; Triton is imported only where it is used."""
    if backend == "torch":
        return chunked_diag_scan
    from amfm_mixers.diag_scan.triton_impl import diag_scan_triton

    return diag_scan_triton


def diag_flops(B: int, T: int, C: int, N: int, *, backward: bool = False) -> int:
    """Floating-point operations, a power counted as one: 7 a state number and token forward, 20 backward.

    Forward: exponent, power, input, state (2) and output (2). Backward takes the states again (5), what flows back (3), its
    product with the decayed state (2), and twice 5 for the gradients of B, C, x, dt and A.
    """
    return B * T * C * N * (20 if backward else 7)


def diag_bytes(B: int, T: int, C: int, N: int, *, value_bytes: int = 2, backward: bool = False) -> int:
    """Bytes that must move: each input read once and each output written once; steps after softplus are float32.

    Forward: x, y, B, C, dt. Backward: x, dy, dx, B, C and their gradients, dt and its gradient.
    """
    if backward:
        return B * T * (value_bytes * (3 * C + 4 * N) + 8 * C)
    return B * T * (value_bytes * (2 * C + 2 * N) + 4 * C)


def diag_by_steps(
    x_BTC: Tensor,
    dt_BTC: Tensor,
    A_log_CN: Tensor,
    B_BTN: Tensor,
    C_BTN: Tensor,
    D_C: Tensor,
    dt_bias_C: Tensor,
    document_ids_BT: Tensor | None,
    initial_state_BCN: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mamba (Gu and Dao 2023, arXiv 2312.00752, algorithm 2): h_t = e^(dt_t A) h_(t-1) + dt_t x_t B_t, y_t = h_t C_t + D x_t.

    Each channel c has a state of N numbers of its own, zero before the first token of each document; dt goes through
    softplus(dt + dt_bias) and A = -exp(A_log).

    Returns y [B, T, C], the last state [B, C, N], and the factor [B, C, N] by which the initial state enters the last
    one (0 where the row's last token is in another document than its first).

    x and dt [B, T, C], A_log [C, N], B and C [B, T, N], D and dt_bias [C]; all in one dtype, float64 in tests.
    """
    dt_BTC = F.softplus(dt_BTC + dt_bias_C)
    A_CN = -A_log_CN.exp()
    state = x_BTC.new_zeros(x_BTC.shape[0], *A_CN.shape) if initial_state_BCN is None else initial_state_BCN
    total = torch.ones_like(state)
    outputs = []
    for t in range(x_BTC.shape[1]):
        decay = (dt_BTC[:, t, :, None] * A_CN).exp()
        if document_ids_BT is not None and t > 0:
            begins = document_ids_BT[:, t] != document_ids_BT[:, t - 1]
            decay = decay.masked_fill(begins[:, None, None], 0.0)
        state = decay * state + (dt_BTC[:, t] * x_BTC[:, t])[..., None] * B_BTN[:, t, None]
        total = decay * total
        outputs.append((state * C_BTN[:, t, None]).sum(-1) + D_C * x_BTC[:, t])
    return torch.stack(outputs, dim=1), state, total
