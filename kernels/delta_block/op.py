"""A delta mixer from its projections to its output, as one operation with little to keep for backward.

How: apart, the convolution, unit lengths, gates, the scan, the norm by head, its gate and the last product each write what the next
one reads, and keep it. As one operation in Triton q, k and v come out of the projection in one pass, the norm and its gate are
another, what is kept is the projection and the scan's o, and every gradient is written into its slice of the projection's
(README.md).

Sources: Yang et al. 2024 (arXiv 2406.06484, 2412.06464), Siems et al. 2025 (arXiv 2502.10297), Kimi Team 2025 (arXiv 2510.26692).

`mix_by_parts` is the same out of separate operations: what it means, and with `reference` one token at a time."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from amfm.kernels.causal_conv1d.op import WIDTHS, causal_conv1d
from amfm.kernels.common.inputs import check_documents, check_float, check_shape
from amfm.kernels.delta_block.sizes import DeltaSizes, cut_columns
from amfm.kernels.delta_scan.op import delta_scan
from amfm.kernels.linear.op import linear
from amfm.kernels.low_precision.recipe import recipe_of
from amfm.kernels.mamba2.rank_part import Exchange
from amfm.kernels.runtime.backend import resolve_backend

__all__ = ["DeltaSizes", "block_bytes", "delta_mix", "scan_bytes"]


def delta_mix(
    projected_BTX: Tensor,
    conv_weight_CW: Tensor,
    A_log_H: Tensor | None,
    dt_bias_X: Tensor | None,
    norm_weight_V: Tensor,
    out_weight_DI: Tensor,
    sizes: DeltaSizes,
    *,
    decay_BTX: Tensor | None = None,
    gate_BTI: Tensor | None = None,
    document_starts_BT: Tensor | None = None,
    chunk_size: int = 64,
    exchange: Exchange | None = None,
    backend: str = "torch",
) -> Tensor:
    """q, k, v = silu(conv(q, k, v)), q and k of unit length; o = scan(q, k, v, beta, g); norm(o) act(gate) W^T, [B, T, D].

    projected [B, T, X] has the parts q, k, v, beta, decay and gate, in this order; the raw numbers of the decay [B, T, H] or [B,
    T, H K] and of the gate [B, T, H V] may come apart from it. conv weight [C, W] over q, k and v; A_log [H], and the bias of the
    decay, where there is one; norm weight [V]; out weight [D, H V]. q is scaled by K^-1/2. Rows begin from zeros, and so does
    each document: `document_starts_BT` [B, T] int32 is the place in the row of the first token of each token's document, None if rows
    hold one document.

    With an exchange rows are segments of longer rows: it hands them windows and states of the segments before, and all ranks
    that it reaches must call, forward and backward. Only Triton takes one. Raises ValueError for shapes, dtypes or devices that
    do not fit.
    """
    _check(projected_BTX, conv_weight_CW, A_log_H, dt_bias_X, norm_weight_V, out_weight_DI, sizes, decay_BTX, gate_BTI)
    rows, tokens, _ = projected_BTX.shape
    check_documents(document_starts_BT, rows, tokens, projected_BTX, name="document_starts_BT")
    backend = resolve_backend(backend, projected_BTX.device, "delta_block")
    if exchange is not None and backend != "triton":
        raise ValueError(f'segments with an exchange need backend "triton"; got {backend!r}; call the parts in turn')
    if backend == "triton":
        from amfm.kernels.delta_block.triton_impl import mix_triton

        # A product of few bits is a separate operation: what it keeps are the codes of its rows.
        own = out_weight_DI if recipe_of(out_weight_DI) is None else None
        weights = conv_weight_CW, A_log_H, dt_bias_X, norm_weight_V, own
        settings = decay_BTX, gate_BTI, document_starts_BT, chunk_size, exchange
        mixed = mix_triton(projected_BTX, *weights, sizes, *settings)
        return mixed if own is not None else linear(mixed, out_weight_DI)

    wide = torch.float64 if projected_BTX.dtype == torch.float64 else torch.float32
    given = (projected_BTX, conv_weight_CW, A_log_H, dt_bias_X, norm_weight_V, out_weight_DI)
    projected, conv, A_log, bias, norm, out = (None if x is None else x.to(wide) for x in given)
    assert projected is not None and conv is not None and norm is not None and out is not None
    decay, gate = (None if x is None else x.to(wide) for x in (decay_BTX, gate_BTI))
    mixed = mix_by_parts(
        projected, conv, A_log, bias, norm, out, sizes, decay, gate, document_starts_BT, chunk_size, backend
    )
    return mixed.to(projected_BTX.dtype)


def _check(
    projected: Tensor,
    conv_weight: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    norm_weight: Tensor,
    out_weight: Tensor,
    sizes: DeltaSizes,
    decay: Tensor | None,
    gate: Tensor | None,
) -> None:
    """Raise ValueError unless the tensors have the sizes that `sizes` says."""
    widths = sizes.widths(decay=decay is None, gate=gate is None)
    check_shape("projected_BTX", projected, (-1, -1, sum(widths.values())))
    check_float("projected_BTX", projected)
    if 0 in projected.shape:
        raise ValueError(f"projected_BTX needs at least 1 row of 1 token; got {list(projected.shape)}")
    for name, raw, width in (("decay_BTX", decay, sizes.decays), ("gate_BTI", gate, sizes.inner)):
        if raw is not None:
            check_shape(name, raw, (*projected.shape[:2], width), projected)
            check_float(name, raw, projected)
    check_shape("conv_weight_CW", conv_weight, (sizes.channel_count, -1), projected)
    check_float("conv_weight_CW", conv_weight)
    if conv_weight.shape[1] not in WIDTHS:
        raise ValueError(f"conv_weight_CW must have a width of 2, 3 or 4; got {conv_weight.shape[1]}")
    for name, vector, size in (("A_log_H", A_log, sizes.heads), ("dt_bias_X", dt_bias, sizes.decays)):
        if (vector is None) == bool(sizes.decays):
            raise ValueError(f"{name} belongs to a decay; got decay={sizes.decay!r} and {name}={vector}")
        if vector is not None:
            check_shape(name, vector, (size,), projected)
            check_float(name, vector)
    check_shape("norm_weight_V", norm_weight, (sizes.value,), projected)
    check_float("norm_weight_V", norm_weight)
    check_shape("out_weight_DI", out_weight, (-1, sizes.inner), projected)
    check_float("out_weight_DI", out_weight, projected)
    if sizes.heads % sizes.key_heads:
        raise ValueError(f"the {sizes.key_heads} key heads must divide the {sizes.heads} heads")
    if sizes.channels and (sizes.steps > 1 or sizes.key_heads != sizes.heads):
        raise ValueError(f"decays of key channels need 1 step a token and a key head for each head; got {sizes}")


def block_bytes(sizes: DeltaSizes, *, value_bytes: int = 2, backward: bool = False) -> int:
    """Bytes per token that must move around the scan: what is opened, gated and closed, the scan's own left out.

    Forward: q, k, v, beta, decay and gate are read once; what the scan takes is written, gates in float32; o is read and its normed
    rows are written. Backward makes what the scan takes once more, reads the gradients of it (of q and k one per head that shares
    them) with the inputs, writes those of the inputs; and reads o, the gate and the gradient of the normed rows for the gradients of
    o and of the gate, and the normed rows.
    """
    opened, gates = sizes.channel_count, sizes.heads * sizes.steps + sizes.decays
    gate = 0 if sizes.act == "none" else sizes.inner
    opens = 2 * opened * value_bytes + gates * (value_bytes + 4)
    if not backward:
        return opens + (2 * sizes.inner + gate) * value_bytes
    shares = sizes.heads // sizes.key_heads
    q, k, v = sizes.convolved
    back = (shares * (q + k) + v + 2 * opened) * value_bytes + gates * (2 * value_bytes + 4)
    return opens + back + (4 * sizes.inner + 2 * gate) * value_bytes


def scan_bytes(sizes: DeltaSizes, chunk_size: int, *, value_bytes: int = 2, backward: bool = False) -> int:
    """Bytes per token of the scan's own kernels, of chunks of this many steps; what heads share is read once, from the cache.

    Forward prepares (of q and k the inverse and scores of a chunk; with gates of channels these and q and k decayed) and walks.
    Backward prepares, walks for errors and entering states, walks back for leaving states, and makes gradients of all.
    """
    q, k, v = sizes.convolved
    chunk = min(chunk_size, 64)
    pairs = sizes.heads * sizes.steps * chunk  # of the inverse, and so many scores a token without its steps
    scores = sizes.heads * chunk
    states = sizes.heads * sizes.key * sizes.value * sizes.steps // chunk
    keys = q + k if not sizes.channels else q + 2 * k
    gates = 4 * sizes.decays
    prepare = value_bytes * (q + k + pairs + scores + (keys if sizes.channels else 0)) + gates
    if not backward:
        return prepare + value_bytes * (keys + v + pairs + scores + sizes.inner)
    walks = value_bytes * (2 * keys + 3 * v + 2 * pairs + scores + sizes.inner + 2 * states)
    shares = sizes.heads // sizes.key_heads
    gradients = value_bytes * ((1 + shares) * (q + k) + 2 * v + sizes.inner + 2 * states) + 2 * gates
    if sizes.channels:
        gradients += value_bytes * (2 * v + sizes.inner + 2 * (pairs + scores))
    return prepare + walks + gradients


def mix_by_parts(
    projected_BTX: Tensor,
    conv_weight_CW: Tensor,
    A_log_H: Tensor | None,
    dt_bias_X: Tensor | None,
    norm_weight_V: Tensor,
    out_weight_DI: Tensor,
    sizes: DeltaSizes,
    decay_BTX: Tensor | None,
    gate_BTI: Tensor | None,
    starts_BT: Tensor | None,
    chunk_size: int,
    backend: str,
) -> Tensor:
    """Convolution, unit lengths, gates, scan, norm by head and gate, product with the output's weight."""
    parts = cut_columns(projected_BTX, sizes.widths(decay=decay_BTX is None, gate=gate_BTI is None))
    inputs_BTC = projected_BTX[..., : sizes.channel_count]
    convolved_BTC = causal_conv1d(
        inputs_BTC, conv_weight_CW, None, document_ids_BT=starts_BT, activation="silu", backend=backend
    )
    q, k, v = convolved_BTC.split(sizes.convolved, dim=-1)
    q_BTGK = _unit(q.unflatten(-1, (sizes.key_heads, sizes.key))) * sizes.key**-0.5
    k_BTNGK = _unit(k.unflatten(-1, (sizes.key_heads, sizes.steps, sizes.key))).transpose(2, 3)
    v_BTNHV = v.unflatten(-1, (sizes.heads, sizes.steps, sizes.value)).transpose(2, 3)
    beta_BTNH = sizes.factor * parts["beta"].unflatten(-1, (sizes.heads, sizes.steps)).transpose(2, 3).sigmoid()
    g = None
    if A_log_H is not None and dt_bias_X is not None:
        raw = parts["decay"] if decay_BTX is None else decay_BTX
        step = (raw + dt_bias_X).unflatten(-1, (sizes.heads, -1))
        rate = A_log_H.exp()[:, None]
        g = -rate * functional.softplus(step) if sizes.decay == "softplus" else sizes.floor * (rate * step).sigmoid()
        g = g if sizes.channels else g[..., 0]
    scanned = delta_scan(
        q_BTGK, k_BTNGK, v_BTNHV, beta_BTNH, g, document_ids_BT=starts_BT, chunk_size=chunk_size, backend=backend
    )
    o_BTHV = scanned.o_BTHV
    mean = o_BTHV.square().mean(-1, keepdim=True)
    closed_BTI = (o_BTHV * torch.rsqrt(mean + sizes.epsilon) * norm_weight_V).flatten(-2)
    if sizes.act != "none":
        gate = parts["gate"] if gate_BTI is None else gate_BTI
        closed_BTI = closed_BTI * (functional.silu(gate) if sizes.act == "silu" else gate.sigmoid())
    return functional.linear(closed_BTI, out_weight_DI)


def _unit(x: Tensor) -> Tensor:
    """Vectors of the last dim at length 1; zero stays zero."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)
