"""A delta mixer after its projections as one custom operation each way, out of the kernels of its parts.

Forward: q, k and v opened, gates, the scan, o closed, the output's product. Kept: the inputs and o. Backward: the product, o
closed back, which makes the normed rows once more for the weight of the product; q, k, v and gates opened once more; the scan's
kernels of backward; and what they give taken back to the projection (passes.py), as segments of rows do another way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from amfm.kernels.common.custom_op import differentiate, fake_of, is_accumulated
from amfm.kernels.common.inputs import pack_tokens
from amfm.kernels.common.limits import DELTA_LIMITS, VECTOR_DELTA_LIMITS
from amfm.kernels.delta_block.launch import split_gates
from amfm.kernels.delta_block.passes import Rows, mix_segments
from amfm.kernels.delta_block.sizes import DeltaSizes
from amfm.kernels.mamba2.rank_part import Exchange
from amfm.kernels.runtime.interpreter import dot_dtype


def mix_triton(
    projected_BTX: Tensor,
    conv_weight_CW: Tensor,
    A_log_H: Tensor | None,
    dt_bias_X: Tensor | None,
    norm_weight_V: Tensor,
    out_weight_DI: Tensor | None,
    sizes: DeltaSizes,
    decay_BTX: Tensor | None,
    gate_BTI: Tensor | None,
    starts_BT: Tensor | None,
    chunk_size: int,
    exchange: Exchange | None,
) -> Tensor:
    """As `op.delta_mix`, for float32, bfloat16 and float16; without an output weight the normed and gated rows [B, T, H V].

    Raises ValueError for chunks or states without a kernel, which are those of the scan.
    """
    dot_dtype(projected_BTX.dtype)  # rejects float64
    limits = VECTOR_DELTA_LIMITS if sizes.channels else DELTA_LIMITS
    limits.check(chunk_size, sizes.key, sizes.value)
    chunk = min(chunk_size, limits.chunk_sizes[-1])
    decay, gate = (None if x is None else pack_tokens(x) for x in (decay_BTX, gate_BTI))
    starts = None if starts_BT is None else starts_BT.contiguous()
    weights = conv_weight_CW.contiguous(), A_log_H, dt_bias_X, norm_weight_V, out_weight_DI
    tensors = pack_tokens(projected_BTX), decay, gate, *weights, starts
    if exchange is not None:
        return mix_segments(*tensors, sizes, chunk, exchange)
    return _forward(*tensors, sizes.numbers, sizes.floats, chunk)[0]


@torch.library.custom_op("amfm::delta_block_triton", mutates_args=())
def _forward(
    projected: Tensor,
    decay: Tensor | None,
    gate: Tensor | None,
    conv_weight: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    norm_weight: Tensor,
    out_weight: Tensor | None,
    starts: Tensor | None,
    numbers: list[int],
    floats: list[float],
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """Output, and o before its norm, [B, T, H, V]."""
    sizes = DeltaSizes.of(numbers, floats)
    rows = Rows(projected, decay, gate, conv_weight, A_log, dt_bias, starts, sizes, chunk_size)
    o, _ = rows.scan(rows.open())
    return rows.close(o, None, norm_weight, out_weight), o


@fake_of(_forward)
def _(given: Any) -> tuple[Tensor, ...]:
    sizes, (B, T, _) = DeltaSizes.of(given.numbers, given.floats), given.projected.shape
    width = sizes.inner if given.out_weight is None else len(given.out_weight)
    return given.projected.new_empty(B, T, width), given.projected.new_empty(B, T, sizes.heads, sizes.value)


@torch.library.custom_op("amfm::delta_block_triton_backward", mutates_args=("out_weight_sum",))
def _backward(
    d_out: Tensor,
    projected: Tensor,
    decay: Tensor | None,
    gate: Tensor | None,
    conv_weight: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    norm_weight: Tensor,
    out_weight: Tensor | None,
    starts: Tensor | None,
    o: Tensor,
    numbers: list[int],
    floats: list[float],
    chunk_size: int,
    out_weight_sum: Tensor | None,
    out_weight_adds: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the first four tensors, of A_log and dt_bias as one, of the norm's weight, and of the output's.

    Empty for what is absent, and for a weight's that lands in its sum.
    """
    sizes = DeltaSizes.of(numbers, floats)
    rows = Rows(projected, decay, gate, conv_weight, A_log, dt_bias, starts, sizes, chunk_size)
    places, total = rows.gradients(), (out_weight_sum, out_weight_adds)
    d_o, d_norm, d_out_weight = rows.close_back(d_out, o, None, norm_weight, out_weight, places, total)
    found = rows.scan_back(d_o, None, rows.open())
    d_conv, d_gates, _ = rows.open_back(found, places)
    d_projected, d_decay, d_gate = (projected.new_empty(0) if x is None else x for x in places)
    return d_projected, d_decay, d_gate, d_conv, d_gates, d_norm, d_out_weight


@fake_of(_backward)
def _(given: Any) -> tuple[Tensor, ...]:
    first, weight = given.projected, given.out_weight
    is_absent = weight is None or is_accumulated(given, "out_weight")
    gates = (0,) if given.dt_bias is None else (2, len(given.dt_bias))
    return (
        first.new_empty(first.shape),
        *(first.new_empty((0,) if x is None else x.shape) for x in (given.decay, given.gate)),
        given.conv_weight.new_empty(given.conv_weight.shape),
        first.new_empty(gates, dtype=first.dtype if given.dt_bias is None else torch.float32),
        given.norm_weight.new_empty(given.norm_weight.shape),
        first.new_empty((0,)) if is_absent else weight.new_empty(weight.shape),
    )


def _unpack(results: tuple[Tensor, ...], kept: Any) -> dict[str, Tensor | None]:
    d_projected, d_decay, d_gate, d_conv_weight, d_gates, d_norm_weight, d_out_weight = results
    d_A_log, d_dt_bias = split_gates(d_gates, kept.A_log, kept.dt_bias)
    return {
        "projected": d_projected,
        "decay": None if kept.decay is None else d_decay,
        "gate": None if kept.gate is None else d_gate,
        "conv_weight": d_conv_weight,
        "A_log": d_A_log,
        "dt_bias": d_dt_bias,
        "norm_weight": d_norm_weight,
        "out_weight": None if kept.out_weight is None else d_out_weight,
    }


differentiate(_forward, _backward, outputs=("out", "o"), unpack=_unpack)
