"""A delta mixer after its projections out of separate operations: what it means, and with `reference` one token at a time."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from amfm.kernels.causal_conv1d.op import causal_conv1d
from amfm.kernels.delta_block.sizes import DeltaSizes, cut_columns
from amfm.kernels.delta_scan.op import delta_scan


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
