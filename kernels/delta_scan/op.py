"""The gated delta product over rows of packed documents, and its one-token step.

How: a step corrects what the state answers to its key, so the errors of a chunk's steps depend on each other:
they solve a unit lower triangular system, which does not depend on the state (README.md derives it). All
systems are inverted at once, products do the rest, and a loop over chunks carries the state. One token at a
time would read and write the state T N times.

No ranks communicate here: `with_transfer` gives the matrices by which pieces of a row compose.

`delta_by_steps` is the definition, one step at a time, that every other form is compared with."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from amfm.kernels.common.inputs import agreed, check_float, check_row, check_shape, drop_single_document
from amfm.kernels.delta_scan.torch_impl import chunked_delta
from amfm.kernels.runtime.backend import resolve_backend

# (q_BTGK, k_BTNGK, v_BTNHV, beta_BTNH, g_BTH, g_BTHK or None, initial_state_BHKV or None, document_ids_BT or None, chunk_size,
# erase_BTHK or None) -> (o_BTHV in the dtype of v, the last state [B, H, K, V]); beta, g and states are float32, or float64 with v.
DeltaFunction = Callable[
    [Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, int, Tensor | None],
    tuple[Tensor, Tensor],
]


class DeltaScanOutput(NamedTuple):
    """Output of `delta_scan`: o, the state after the last token, and what an entering state adds to both, if asked for.

    Shapes: o [B, T, H, V], state [B, H, K, V] float32 (float64 for float64 inputs), read [B, T, H, K], transfer
    [B, H, K, K].
    """

    o_BTHV: Tensor
    final_state_BHKV: Tensor
    read_BTHK: Tensor | None
    transfer_BHKK: Tensor | None


def delta_scan(
    q_BTGK: Tensor,
    k_BTNGK: Tensor,
    v_BTNHV: Tensor,
    beta_BTNH: Tensor,
    g_BTH: Tensor | None = None,
    *,
    erase_BTHK: Tensor | None = None,
    document_ids_BT: Tensor | None = None,
    initial_state_BHKV: Tensor | None = None,
    chunk_size: int = 64,
    with_transfer: bool = False,
    backend: str = "auto",
) -> DeltaScanOutput:
    """S <- diag(e^(g_t)) S, then S <- (I - beta k k^T) S + beta k v^T for each of a token's N steps, then o_t = S^T q_t.

    S = 0 before the first token of each document. N = 1 is the (gated) delta rule, N > 1 DeltaProduct. q [B, T, G, K],
    k [B, T, N, G, K], v [B, T, N, H, V] in one dtype, with G dividing H, and beta without N where N is 1; the caller normalises k to length 1. beta
    [B, T, N, H] in (0, 1), or (0, 2) for states that may change sign; g [B, T, H] <= 0 is the log of the decay, absent
    for none. g [B, T, H, K] has a decay a key channel (Kimi Delta Attention) and asks for N = 1, G = H and a chunk_size that
    is a power of two. erase [B, T, H, K], only with such gates, is what the state is asked with in place of k, so that S <- S +
    beta k (v - S^T erase)^T (Gated DeltaNet-2). Document ids are integers [B, T], equal inside a document. The initial state belongs to the document of
    each row's first token. beta, g and states are taken in float32 (float64 for float64 inputs). A chunk holds chunk_size
    steps, which changes speed and rounding, not meaning.

    Returns o [B, T, H, V] in the dtype of v and the state [B, H, K, V] after the last token. With `with_transfer` also
    read [B, T, H, K] in the dtype of v, 0 outside the row's first document, and transfer [B, H, K, K], 0 where the row's
    documents differ: o = (o with no initial state) + read @ initial, final = transfer @ initial + (final with no initial
    state). They cost as much again as K more columns of v do.

    Raises ValueError for shapes, dtypes or devices that do not fit. Sources: Yang et al. 2024 (arXiv 2406.06484), Yang
    et al. 2024 (arXiv 2412.06464), Siems et al. 2025 (arXiv 2502.10297), Kimi Team 2025 (arXiv 2510.26692).
    """
    if k_BTNGK.dim() == v_BTNHV.dim() == 4 and beta_BTNH.dim() == 3:
        k_BTNGK, v_BTNHV, beta_BTNH = k_BTNGK[:, :, None], v_BTNHV[:, :, None], beta_BTNH[:, :, None]
    check_delta(q_BTGK, k_BTNGK, v_BTNHV, beta_BTNH, g_BTH, erase_BTHK)
    B, _, _, H, V = v_BTNHV.shape
    K = q_BTGK.shape[3]
    check_row(document_ids_BT, initial_state_BHKV, (B, H, K, V), chunk_size, v_BTNHV)
    if g_BTH is not None and g_BTH.dim() == 4 and chunk_size & (chunk_size - 1):
        raise ValueError(f"chunk_size={chunk_size} must be a power of two for a vector gate; use 16, 32 or 64")
    scan = _find_scan(resolve_backend(backend, v_BTNHV.device, "delta_scan"))
    wide = torch.float64 if v_BTNHV.dtype == torch.float64 else torch.float32
    initial = None if initial_state_BHKV is None else initial_state_BHKV.to(wide)
    values = v_BTNHV
    if with_transfer:
        # The scan is linear in its state: columns of values that are zero carry the identity through the row.
        values = torch.cat([v_BTNHV, v_BTNHV.new_zeros(*v_BTNHV.shape[:-1], K)], dim=-1)
        start = beta_BTNH.new_zeros(B, H, K, V, dtype=wide) if initial is None else initial
        identity = torch.eye(K, dtype=wide, device=start.device).expand(B, H, K, K)
        initial = torch.cat([start, identity], dim=-1)
    g = None if g_BTH is None else g_BTH.to(wide)
    documents = drop_single_document(document_ids_BT)
    o, final = scan(q_BTGK, k_BTNGK, values, beta_BTNH.to(wide), g, initial, documents, chunk_size, erase_BTHK)
    if not with_transfer:
        return DeltaScanOutput(o, final, None, None)
    return DeltaScanOutput(o[..., :V], final[..., :V], o[..., V:], final[..., V:])


def delta_step(
    q_BGK: Tensor,
    k_BNGK: Tensor,
    v_BNHV: Tensor,
    beta_BNH: Tensor,
    g_BH: Tensor | None,
    state_BHKV: Tensor,
    erase_BHK: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One token of `delta_scan` for decoding: from the state before it to (o [B, H, V], the state after it, float32).

    Raises ValueError for shapes, dtypes or devices that do not fit.
    """
    q, k, v, beta = (x[:, None] for x in (q_BGK, k_BNGK, v_BNHV, beta_BNH))
    g, erase = (None if x is None else x[:, None] for x in (g_BH, erase_BHK))
    check_delta(q, k, v, beta, g, erase)
    B, _, H, V = v_BNHV.shape
    check_shape("state_BHKV", state_BHKV, (B, H, q_BGK.shape[-1], V), v_BNHV)
    check_float("state_BHKV", state_BHKV)
    o_BTHV, state = _reference_scan(q, k, v, beta, g, state_BHKV, None, 1, erase)
    return o_BTHV[:, 0], state


def _find_scan(backend: str) -> DeltaFunction:
    """The scan of a resolved backend; Triton is imported only where it is used."""
    if backend == "torch":
        return chunked_delta
    if backend == "reference":
        return _reference_scan
    from amfm.kernels.delta_scan.triton_impl import delta_scan_triton

    return delta_scan_triton


def _reference_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    initial: Tensor | None,
    documents_BT: Tensor | None,
    chunk_size: int,
    erase: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`delta_by_steps` in float32 (float64 for float64 inputs).

    Has no chunks and ignores their size.
    """
    del chunk_size
    wide = torch.float64 if v.dtype == torch.float64 else torch.float32
    gates = None if g is None else g.to(wide)
    start, asked = (None if x is None else x.to(wide) for x in (initial, erase))
    o, final = delta_by_steps(q.to(wide), k.to(wide), v.to(wide), beta.to(wide), gates, start, documents_BT, asked)
    return o.to(v.dtype), final


def check_delta(
    q_BTGK: Tensor,
    k_BTNGK: Tensor,
    v_BTNHV: Tensor,
    beta_BTNH: Tensor,
    g_BTH: Tensor | None = None,
    erase_BTHK: Tensor | None = None,
) -> None:
    """Raise ValueError unless these are inputs of `delta_scan`.

    The message names the argument, what it must be, and what it is. A gate with four dimensions is one of each
    key channel.
    """
    check_shape("v_BTNHV", v_BTNHV, (-1, -1, -1, -1, -1))
    B, T = agreed(v_BTNHV.shape[:2], q_BTGK.shape[:2], k_BTNGK.shape[:2], beta_BTNH.shape[:2])
    check_shape("v_BTNHV", v_BTNHV, (B, T, -1, -1, -1))
    N, H = v_BTNHV.shape[2:4]
    check_shape("q_BTGK", q_BTGK, (B, T, -1, -1), v_BTNHV)
    G, K = q_BTGK.shape[2:]
    check_shape("k_BTNGK", k_BTNGK, (B, T, N, G, K), v_BTNHV, "q_BTGK and v_BTNHV")
    check_shape("beta_BTNH", beta_BTNH, (B, T, N, H), v_BTNHV, "v_BTNHV")
    if N == 0:
        raise ValueError("v_BTNHV must have at least 1 step a token; got 0")
    if G == 0 or H % G:
        raise ValueError(f"the key heads of q_BTGK must divide the {H} heads of v_BTNHV; got {G} key heads")
    check_float("v_BTNHV", v_BTNHV)
    check_float("q_BTGK", q_BTGK, v_BTNHV)
    check_float("k_BTNGK", k_BTNGK, v_BTNHV)
    check_float("beta_BTNH", beta_BTNH)
    if g_BTH is not None and g_BTH.dim() == 4:
        check_shape("g_BTHK", g_BTH, (B, T, H, K), v_BTNHV)
        check_float("g_BTHK", g_BTH)
        if N > 1 or G != H:
            raise ValueError(
                f"a gate of each key channel needs 1 step a token and a key head for each head; got {N} steps and {G} key "
                f"heads for {H} heads"
            )
    elif g_BTH is not None:
        check_shape("g_BTH", g_BTH, (B, T, H), v_BTNHV)
        check_float("g_BTH", g_BTH)
    if erase_BTHK is not None:
        if g_BTH is None or g_BTH.dim() != 4:
            raise ValueError("erase_BTHK needs a gate of each key channel, g_BTHK")
        check_shape("erase_BTHK", erase_BTHK, (B, T, H, K), v_BTNHV)
        check_float("erase_BTHK", erase_BTHK, v_BTNHV)


def delta_flops(
    B: int, T: int, N: int, G: int, H: int, K: int, V: int, *, chunk_size: int, backward: bool = False
) -> int:
    """Floating-point operations of the chunked form for chunks of M = chunk_size steps, with k k^T and q k^T a group.

    A step costs 2 M K G for k k^T, M^2 H for the inverse, 2 M V H for applying it, 4 K V H for reading and writing the
    state; a token 2 M K G for q k^T, 2 M V H for what it reads inside the chunk, 2 K V H for what it reads before it.
    Backward: a step 4 M K G, 6 M V H and 8 K V H, a token 6 M K G, 4 M V H and 4 K V H.
    """
    M = chunk_size
    if backward:
        step = 4 * M * K * G + 6 * M * V * H + 8 * K * V * H
        return B * T * (N * step + 6 * M * K * G + 4 * M * V * H + 4 * K * V * H)
    step = 2 * M * K * G + M * M * H + 2 * M * V * H + 4 * K * V * H
    return B * T * (N * step + 2 * M * K * G + 2 * M * V * H + 2 * K * V * H)


def delta_bytes(
    B: int,
    T: int,
    N: int,
    G: int,
    H: int,
    K: int,
    V: int,
    *,
    value_bytes: int = 2,
    gated: bool = True,
    backward: bool = False,
) -> int:
    """Bytes that must move: each input read once and each output written once; beta and gates are float32.

    Forward: q, k, v, o, beta, g. Backward: q, k, v, do, dq, dk, dv, beta, g and their gradients.
    """
    numbers = G * K + N * G * K + N * H * V
    gates = 4 * (N * H + (H if gated else 0))
    if backward:
        return B * T * (value_bytes * (2 * numbers + H * V) + 2 * gates)
    return B * T * (value_bytes * (numbers + H * V) + gates)


def delta_by_steps(
    q_BTGK: Tensor,
    k_BTNGK: Tensor,
    v_BTNHV: Tensor,
    beta_BTNH: Tensor,
    g_BTH: Tensor | None,
    initial_state_BHKV: Tensor | None,
    document_ids_BT: Tensor | None,
    erase_BTHK: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the delta rule step by step.

    S <- diag(e^(g_t)) S, then S <- (I - beta k k^T) S + beta k v^T for each of a token's N steps, then o_t =
    S^T q_t.

    q [B, T, G, K], k [B, T, N, G, K], v [B, T, N, H, V], beta [B, T, N, H]; g has one number per head, [B, T, H],
    or, as [B, T, H, K], one per key channel. erase [B, T, H, K], with N = 1 and G = H, is what the state is asked with
    in place of k. S = 0 before the first token of each document. Returns o [B, T, H,
    V] and the state [B, H, K, V] after the last token, in the dtype of the inputs, differentiable by autograd.
    """
    B, T, G, K = q_BTGK.shape
    N, H, V = v_BTNHV.shape[2:]
    state = v_BTNHV.new_zeros(B, H, K, V) if initial_state_BHKV is None else initial_state_BHKV
    outputs = []
    for t in range(T):
        # The initial state belongs to the first token's document, so t = 0 never resets it.
        if document_ids_BT is not None and t > 0:
            continues = document_ids_BT[:, t] == document_ids_BT[:, t - 1]
            state = torch.where(continues[:, None, None, None], state, torch.zeros_like(state))
        if g_BTH is not None:
            decay = g_BTH[:, t].exp()
            state = (decay[..., None, None] if decay.dim() == 2 else decay[..., None]) * state
        for j in range(N):
            k_BHK = k_BTNGK[:, t, j].repeat_interleave(H // G, dim=1)
            # What the state answers to the key now; the step moves it towards v by beta.
            asked_BHK = k_BHK if erase_BTHK is None else erase_BTHK[:, t]
            remembered_BHV = torch.einsum("bhkv,bhk->bhv", state, asked_BHK)
            change_BHV = beta_BTNH[:, t, j, :, None] * (v_BTNHV[:, t, j] - remembered_BHV)
            state = state + k_BHK[..., None] * change_BHV[:, :, None]
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, q_BTGK[:, t].repeat_interleave(H // G, dim=1)))
    return torch.stack(outputs, dim=1), state
