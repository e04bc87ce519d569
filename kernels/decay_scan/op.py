"""Linear recurrences with a decaying state: the Mamba-2 scan, its one-token step, and the general form.

How: both public scans are one recurrence, S_t = e^(g_t) S_(t-1) + u_t k_t v_t^T with o_t = S_t^T q_t; Mamba-2
is it with q = C, k = B, v = x, u = dt and a skip D x (README.md has the table). This file checks, takes
softplus and exponential in float32, which autograd differentiates, and hands the recurrence to the chunked form
of the backend: products inside chunks, states between them. A scan by tokens would read and write the state T
times, the cost of the quadratic form grows with T squared.

No ranks communicate here. A row cut over ranks is scanned by each rank from zero; `total_decay` and carry.py
compose.

`scan_by_steps` and `mamba2_by_steps` are the definition, one token at a time, in float64 where tests ask for it. They never
form e^(-b) or a sum of gates, so they have none of the precautions of the chunked forms to get wrong."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from amfm.kernels.common.inputs import agreed, check_float, check_row, check_shape, drop_single_document
from amfm.kernels.decay_scan.torch_impl import chunked_scan
from amfm.kernels.decay_scan.vector.torch_impl import chunked_vector_scan
from amfm.kernels.runtime.backend import resolve_backend


class ScanOutput(NamedTuple):
    """Output of `mamba2_scan`: y, the state after the last token, and the factor of the initial state in it.

    Shapes: y [B, T, H, P], state [B, H, P, N], factor [B, H]. State and factor are float32 (float64 for float64
    inputs).
    """

    y_BTHP: Tensor
    final_state_BHPN: Tensor
    total_decay_BH: Tensor


class DecayScanOutput(NamedTuple):
    """Output of `decay_scan`: o, the state after the last token, and the factor of the initial state in it.

    Shapes: o [B, T, H, V], state [B, H, K, V], factor [B, H] or, with a gate of each key channel, [B, H, K].
    """

    o_BTHV: Tensor
    final_state_BHKV: Tensor
    total_decay: Tensor


def mamba2_scan(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    A_log_H: Tensor,
    B_BTGN: Tensor,
    C_BTGN: Tensor,
    D_H: Tensor,
    dt_bias_H: Tensor,
    *,
    document_ids_BT: Tensor | None = None,
    initial_state_BHPN: Tensor | None = None,
    chunk_size: int = 64,
    keep_states: bool = True,
    backend: str = "auto",
) -> ScanOutput:
    """Mamba-2: h_t = e^(dt_t A) h_(t-1) + dt_t x_t B_t^T, y_t = h_t C_t + D x_t, h = 0 before each document.

    x [B, T, H, P], B and C [B, T, G, N] with G dividing H, in one dtype; dt [B, T, H] raw, softplus(dt + dt_bias) is
    taken here; A = -exp(A_log). Document ids are integers [B, T], equal inside a document. The initial state belongs
    to the document of each row's first token. Gates, decays and states are float32 (float64 for float64 inputs).

    Returns y [B, T, H, P] in the dtype of x; the state [B, H, P, N] after the last token, of that token's document;
    and the factor [B, H] with which the initial state enters it, 0 where the row's documents differ. States of
    consecutive pieces of a row compose: final = total_decay * initial + (final with no initial state).

    With keep_states the Triton backend saves the states that enter chunks for backward, N / chunk_size times the size of
    x, and without walks the row again for them; the torch backend always saves them.

    Raises ValueError for shapes, dtypes or devices that do not fit. Source: Dao and Gu 2024, arXiv 2405.21060.
    """
    check_mamba2(x_BTHP, dt_BTH, A_log_H, B_BTGN, C_BTGN, D_H, dt_bias_H)
    B, _, H, P = x_BTHP.shape
    check_row(document_ids_BT, initial_state_BHPN, (B, H, P, B_BTGN.shape[3]), chunk_size, x_BTHP)
    backend = resolve_backend(backend, x_BTHP.device, "decay_scan")
    wide = torch.float64 if x_BTHP.dtype == torch.float64 else torch.float32
    if backend == "reference":
        x, dt, A_log, k, q, D, bias = (t.to(wide) for t in (x_BTHP, dt_BTH, A_log_H, B_BTGN, C_BTGN, D_H, dt_bias_H))
        initial = None if initial_state_BHPN is None else initial_state_BHPN.to(wide)
        y, final, decay = mamba2_by_steps(x, dt, A_log, k, q, D, bias, document_ids_BT, initial)
        return ScanOutput(y.to(x_BTHP.dtype), final, decay)
    document_ids_BT = drop_single_document(document_ids_BT)
    dt_BTH = F.softplus(dt_BTH.to(wide) + dt_bias_H.to(wide))
    g_BTH = dt_BTH * -A_log_H.to(wide).exp()
    # Mamba-2 writes its state [P, N]; the recurrence holds keys in rows, [N, P].
    initial = None if initial_state_BHPN is None else initial_state_BHPN.transpose(-1, -2)
    y_BTHP, state_BHNP = _find_scan(backend, keep_states)(
        C_BTGN, B_BTGN, x_BTHP, g_BTH, dt_BTH, D_H, initial, document_ids_BT, chunk_size
    )
    return ScanOutput(y_BTHP, state_BHNP.transpose(-1, -2), total_decay(g_BTH, document_ids_BT))


def mamba2_step(
    x_BHP: Tensor,
    dt_BH: Tensor,
    A_log_H: Tensor,
    B_BGN: Tensor,
    C_BGN: Tensor,
    D_H: Tensor,
    dt_bias_H: Tensor,
    state_BHPN: Tensor,
) -> tuple[Tensor, Tensor]:
    """One token of `mamba2_scan` for decoding: from the state before it to (y [B, H, P], the state after it, float32).

    Raises ValueError for shapes, dtypes or devices that do not fit.
    """
    check_mamba2(x_BHP[:, None], dt_BH[:, None], A_log_H, B_BGN[:, None], C_BGN[:, None], D_H, dt_bias_H)
    B, H, P = x_BHP.shape
    G, N = B_BGN.shape[1:]
    check_shape("state_BHPN", state_BHPN, (B, H, P, N), x_BHP)
    wide = torch.float64 if x_BHP.dtype == torch.float64 else torch.float32
    x = x_BHP.to(wide)
    dt = F.softplus(dt_BH.to(wide) + dt_bias_H.to(wide))
    decay = (dt * -A_log_H.to(wide).exp()).exp()
    k = B_BGN.to(wide).repeat_interleave(H // G, dim=1)
    q = C_BGN.to(wide).repeat_interleave(H // G, dim=1)
    state = state_BHPN.to(wide) * decay[..., None, None] + (dt[..., None] * x)[..., None] * k[:, :, None]
    y = (state @ q[..., None])[..., 0] + D_H.to(wide)[:, None] * x
    return y.to(x_BHP.dtype), state


def decay_scan(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    g: Tensor,
    *,
    document_ids_BT: Tensor | None = None,
    initial_state_BHKV: Tensor | None = None,
    chunk_size: int = 64,
    keep_states: bool = True,
    backend: str = "auto",
) -> DecayScanOutput:
    """S_t = e^(g_t) S_(t-1) + k_t v_t^T, o_t = S_t^T q_t, with S = 0 before the first token of each document.

    q and k [B, T, H, K], v [B, T, H, V] in one dtype; g <= 0 is the log of the decay, taken in float32 (float64 for
    float64 inputs): [B, T, H] one for a head, or [B, T, H, K] one for each of its key channels, diag(e^(g_t)) S_(t-1).
    Lightning attention and RetNet have a constant g for each head, GLA and HGRN2 a vector.

    Returns o [B, T, H, V] in the dtype of v, the state [B, H, K, V] after the last token, and the factor, [B, H] or
    [B, H, K] as the gate is, with which the initial state enters it. keep_states as in `mamba2_scan`; a vector gate
    takes chunk sizes that are powers of two.

    Raises ValueError for shapes, dtypes or devices that do not fit. Sources: Sun et al. 2023 (arXiv 2307.08621),
    Qin et al. 2024 (arXiv 2401.04658), for vectors Yang et al. 2023 (arXiv 2312.06635).
    """
    g = check_decay(q_BTHK, k_BTHK, v_BTHV, g)
    B, _, H, V = v_BTHV.shape
    check_row(document_ids_BT, initial_state_BHKV, (B, H, q_BTHK.shape[3], V), chunk_size, v_BTHV)
    backend = resolve_backend(backend, v_BTHV.device, "decay_scan_vector" if g.dim() == 4 else "decay_scan")
    if backend == "reference":
        initial = None if initial_state_BHKV is None else initial_state_BHKV.to(g.dtype)
        o, final, decay = scan_by_steps(
            q_BTHK.to(g.dtype), k_BTHK.to(g.dtype), v_BTHV.to(g.dtype), g, document_ids_BT, initial
        )
        return DecayScanOutput(o.to(v_BTHV.dtype), final, decay)
    document_ids_BT = drop_single_document(document_ids_BT)
    if g.dim() == 4:
        o_BTHV, final = _find_vector_scan(backend, keep_states)(
            q_BTHK, k_BTHK, v_BTHV, g, initial_state_BHKV, document_ids_BT, chunk_size
        )
    else:
        o_BTHV, final = _find_scan(backend, keep_states)(
            q_BTHK, k_BTHK, v_BTHV, g, None, None, initial_state_BHKV, document_ids_BT, chunk_size
        )
    return DecayScanOutput(o_BTHV, final, total_decay(g, document_ids_BT))


def decay_step(q_BHK: Tensor, k_BHK: Tensor, v_BHV: Tensor, g: Tensor, state_BHKV: Tensor) -> tuple[Tensor, Tensor]:
    """One token of `decay_scan` for decoding: from the state before it to (o [B, H, V], the state after it, float32).

    g [B, H], or [B, H, K] for a decay of each key channel. Raises ValueError for shapes, dtypes or devices that do not fit.
    """
    check_shape("v_BHV", v_BHV, (-1, -1, -1))
    g = check_decay(q_BHK[:, None], k_BHK[:, None], v_BHV[:, None], g[:, None])[:, 0]
    (B, H, V), K = v_BHV.shape, q_BHK.shape[-1]
    check_shape("state_BHKV", state_BHKV, (B, H, K, V), v_BHV)
    check_float("state_BHKV", state_BHKV)
    decay = (g[..., None] if g.dim() == 3 else g[..., None, None]).exp()
    state = state_BHKV.to(g.dtype) * decay + k_BHK.to(g.dtype)[..., None] * v_BHV.to(g.dtype)[:, :, None]
    o = (q_BHK.to(g.dtype)[:, :, None] @ state)[:, :, 0]
    return o.to(v_BHV.dtype), state


def check_decay(q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, g: Tensor) -> Tensor:
    """Raise ValueError unless these are inputs of `decay_scan`; returns g in float32 (float64 for float64 inputs)."""
    check_shape("v", v_BTHV, (-1, -1, -1, -1))
    B, T, H = agreed(v_BTHV.shape[:3], q_BTHK.shape[:3], k_BTHK.shape[:3])
    check_shape("v", v_BTHV, (B, T, H, -1))
    check_shape("q", q_BTHK, (B, T, H, -1), v_BTHV)
    K = q_BTHK.shape[3]
    check_shape("k", k_BTHK, (B, T, H, K), v_BTHV, "q")
    check_shape("g", g, (B, T, H, K) if g.dim() == 4 else (B, T, H), v_BTHV)
    check_float("v", v_BTHV)
    check_float("q", q_BTHK, v_BTHV)
    check_float("k", k_BTHK, v_BTHV)
    check_float("g", g)
    return g.to(torch.float64 if v_BTHV.dtype == torch.float64 else torch.float32)


def total_decay(g: Tensor, document_ids_BT: Tensor | None) -> Tensor:
    """Factor [B, H], or [B, H, K] of a vector gate, by which a row scales the state it starts from.

    It is 0 where that state's document ends in the row.
    """
    decay = g.sum(1).exp()
    if document_ids_BT is None:
        return decay
    # Ids must not return once a document has ended, so first and last token decide.
    ends = document_ids_BT[:, -1] != document_ids_BT[:, 0]
    return decay.masked_fill(ends.view(-1, *(1,) * (decay.dim() - 1)), 0.0)


def _find_scan(backend: str, keep_states: bool) -> Callable[..., tuple[Tensor, Tensor]]:
    """The scan with one gate per head, for a resolved backend; Triton is imported only where it is used."""
    if backend == "torch":
        return chunked_scan
    from amfm.kernels.decay_scan.triton_impl import scan_triton

    return functools.partial(scan_triton, keep_states=keep_states)


def _find_vector_scan(backend: str, keep_states: bool) -> Callable[..., tuple[Tensor, Tensor]]:
    """The scan with a gate of each key channel, for a resolved backend."""
    if backend == "torch":
        return chunked_vector_scan
    from amfm.kernels.decay_scan.vector.triton_impl import scan_vector_triton

    return functools.partial(scan_vector_triton, keep_states=keep_states)


def check_mamba2(
    x_BTHP: Tensor, dt_BTH: Tensor, A_log_H: Tensor, B_BTGN: Tensor, C_BTGN: Tensor, D_H: Tensor, dt_bias_H: Tensor
) -> None:
    """Raise ValueError unless these are inputs of `mamba2_scan`.

    Groups must divide heads; x, B and C share a dtype, while gates and parameters may have others.
    """
    check_shape("x_BTHP", x_BTHP, (-1, -1, -1, -1))
    B, T = agreed(x_BTHP.shape[:2], dt_BTH.shape[:2], B_BTGN.shape[:2], C_BTGN.shape[:2])
    check_shape("x_BTHP", x_BTHP, (B, T, -1, -1))
    H = x_BTHP.shape[2]
    check_shape("dt_BTH", dt_BTH, (B, T, H), x_BTHP, "x_BTHP")
    check_shape("B_BTGN", B_BTGN, (B, T, -1, -1), x_BTHP)
    check_shape("C_BTGN", C_BTGN, (B, T, *B_BTGN.shape[2:]), x_BTHP, "B_BTGN")
    for name, vector in (("A_log_H", A_log_H), ("D_H", D_H), ("dt_bias_H", dt_bias_H)):
        check_shape(name, vector, (H,), x_BTHP)
        check_float(name, vector)
    groups = B_BTGN.shape[2]
    if groups == 0 or H % groups:
        raise ValueError(f"the groups of B_BTGN must divide the {H} heads of x_BTHP; got {groups} groups")
    check_float("x_BTHP", x_BTHP)
    check_float("dt_BTH", dt_BTH)
    check_float("B_BTGN", B_BTGN, x_BTHP)
    check_float("C_BTGN", C_BTGN, x_BTHP)


def scan_flops(B: int, T: int, H: int, G: int, K: int, V: int, *, chunk_size: int, backward: bool = False) -> int:
    """Floating-point operations of the chunked form with q k^T taken once per group.

    A token costs 2 Q K G for q k^T, 2 Q V H inside the chunk and 4 K V H for the state; backward 6 Q K G + 4 Q V H +
    10 K V H (its own products, and the states walked again).
    """
    if backward:
        return B * T * (6 * chunk_size * K * G + 4 * chunk_size * V * H + 10 * K * V * H)
    return B * T * (2 * chunk_size * K * G + 2 * chunk_size * V * H + 4 * K * V * H)


def scan_bytes(B: int, T: int, H: int, G: int, K: int, V: int, *, value_bytes: int = 2, backward: bool = False) -> int:
    """Bytes that must move: each input read once and each output written once; gates and their scale are float32.

    Forward: v, o, q, k, g, scale. Backward: v, do, dv, q, k, dq, dk, g, scale and their gradients.
    """
    if backward:
        return B * T * (value_bytes * (3 * H * V + 4 * G * K) + 16 * H)
    return B * T * (value_bytes * (2 * H * V + 2 * G * K) + 8 * H)


def vector_scan_bytes(B: int, T: int, H: int, K: int, V: int, *, value_bytes: int = 2, backward: bool = False) -> int:
    """`scan_bytes` with a float32 gate of each key channel: v, o, q, k, g; backward v, do, dv, q, k, dq, dk, g, dg.

    Operations are those of `scan_flops` with a group for each head.
    """
    if backward:
        return B * T * H * (value_bytes * (3 * V + 4 * K) + 8 * K)
    return B * T * H * (value_bytes * (2 * V + 2 * K) + 4 * K)


def scan_by_steps(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    g: Tensor,
    document_ids_BT: Tensor | None,
    initial_state_BHKV: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """S_t = e^(g_t) S_(t-1) + k_t v_t^T, o_t = S_t^T q_t, with S = 0 before the first token of each document.

    The gate is one number per head, [B, T, H], or one for each key channel (row of the state), [B, T, H, K].

    Returns o [B, T, H, V], the last state [B, H, K, V], and the factor ([B, H] or [B, H, K]) by which the initial state
    enters the last one (0 where the row's last token is in another document than its first).
    """
    B, T, H, K = q_BTHK.shape
    state = q_BTHK.new_zeros(B, H, K, v_BTHV.shape[-1]) if initial_state_BHKV is None else initial_state_BHKV
    decay = torch.ones_like(g[:, 0])
    outputs = []
    for t in range(T):
        carry = g[:, t].exp()
        if document_ids_BT is not None and t > 0:
            begins = document_ids_BT[:, t] != document_ids_BT[:, t - 1]
            carry = carry.masked_fill(begins.view(B, *(1,) * (carry.dim() - 1)), 0.0)
        # One factor a head scales the whole state, one per key channel scales its row.
        of_rows = carry[..., None, None] if carry.dim() == 2 else carry[..., None]
        state = of_rows * state + k_BTHK[:, t, :, :, None] * v_BTHV[:, t, :, None, :]
        decay = carry * decay
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, q_BTHK[:, t]))
    return torch.stack(outputs, dim=1), state, decay


def mamba2_by_steps(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    A_log_H: Tensor,
    B_BTGN: Tensor,
    C_BTGN: Tensor,
    D_H: Tensor,
    dt_bias_H: Tensor,
    document_ids_BT: Tensor | None,
    initial_state_BHPN: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mamba-2 (Dao and Gu 2024, arXiv 2405.21060, section 2) as the recurrence above with k = B, q = C, v = dt x.

    Returns y [B, T, H, P], the last state [B, H, P, N] and the factor [B, H] on the initial state.
    """
    dt_BTH = F.softplus(dt_BTH + dt_bias_H)
    heads_per_group = x_BTHP.shape[2] // B_BTGN.shape[2]
    k_BTHN = B_BTGN.repeat_interleave(heads_per_group, dim=2)
    q_BTHN = C_BTGN.repeat_interleave(heads_per_group, dim=2)
    initial = None if initial_state_BHPN is None else initial_state_BHPN.transpose(-1, -2)
    g_BTH = -A_log_H.exp() * dt_BTH
    y_BTHP, state_BHNP, decay_BH = scan_by_steps(
        q_BTHN, k_BTHN, dt_BTH[..., None] * x_BTHP, g_BTH, document_ids_BT, initial
    )
    return y_BTHP + D_H[:, None] * x_BTHP, state_BHNP.transpose(-1, -2), decay_BH
