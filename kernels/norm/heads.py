"""The norm of heads as an operation that autograd, torch.compile and meta tensors know, and the launches that larger ones share."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from amfm.kernels.common.custom_op import differentiate, fake_of
from amfm.kernels.common.partial_sums import sum_first
from amfm.kernels.common.strides import pack_tokens, stride_unit, token_stride
from amfm.kernels.norm.triton_heads import head_norm_backward_kernel, head_norm_forward_kernel
from amfm.kernels.runtime.interpreter import count_programs, dot_dtype

TILE_VALUES = 2048  # of a program, 16 a thread: with 32 forward spills on sm_100
LARGEST_HEAD = 4096


def head_norm_triton(o_BTHV: Tensor, gate_BTI: Tensor | None, weight_V: Tensor, epsilon: float, act: str) -> Tensor:
    """As `op.head_norm`, for float32, bfloat16 and float16. Keeps its inputs only.

    Raises ValueError for heads wider than LARGEST_HEAD.
    """
    dot_dtype(o_BTHV.dtype)  # rejects float64
    if o_BTHV.shape[-1] > LARGEST_HEAD:
        raise ValueError(f'backend "triton" norms heads of up to {LARGEST_HEAD} values; got {o_BTHV.shape[-1]}')
    return _forward(o_BTHV.contiguous(), gate_BTI, weight_V, epsilon, act)


@torch.library.custom_op("amfm::head_norm_triton", mutates_args=())
def _forward(o: Tensor, gate: Tensor | None, weight: Tensor, epsilon: float, act: str) -> Tensor:
    """The normed and gated rows, [B, T, H V]."""
    return norm_heads(o, None, None if gate is None else pack_tokens(gate), weight, epsilon, act)


@fake_of(_forward)
def _(given: Any) -> Tensor:
    B, T, H, V = given.o.shape
    return given.o.new_empty(B, T, H * V)


@torch.library.custom_op("amfm::head_norm_triton_backward", mutates_args=())
def _backward(
    d_out: Tensor, o: Tensor, gate: Tensor | None, weight: Tensor, epsilon: float, act: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of o, of the gate (empty without) and of the weight."""
    gate = None if gate is None else pack_tokens(gate)
    d_gate = None if gate is None else torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    d_o, d_weight = norm_heads_backward(d_out.contiguous(), o, None, gate, weight, epsilon, act, d_gate, None)
    return d_o, o.new_empty(0) if d_gate is None else d_gate, d_weight


differentiate(_forward, _backward, outputs=("out",), gradients=("o", "gate", "weight"))


def _tile(size: int) -> dict[str, int]:
    """Columns that hold a head, a power of two, and as many rows as a tile has then."""
    columns = max(2, triton.next_power_of_2(size))
    return {"BLOCK_C": columns, "BLOCK_R": max(1, min(32, TILE_VALUES // columns)), "num_warps": 4}


def norm_heads(
    o: Tensor, added: Tensor | None, gate: Tensor | None, weight: Tensor, epsilon: float, act: str
) -> Tensor:
    """o r w act(gate), [B, T, H V], of o [B, T, H, V] whose heads are one distance apart; gate [B, T, H V], a slice."""
    B, T, H, V = o.shape
    out = o.new_empty(B, T, H * V)
    stride = 0 if gate is None else token_stride(gate)
    unit, tile = stride_unit(stride), _tile(V)
    head_norm_forward_kernel[(triton.cdiv(B * T * H, tile["BLOCK_R"]),)](
        o, added, gate, weight, out, B * T * H, H, o.stride(2), stride // unit, epsilon,
        ACT=act, ADDED=added is not None, SIZE=V, UNIT=unit, **tile,
    )  # fmt: skip
    return out


def norm_heads_backward(
    d_out: Tensor, o: Tensor, added: Tensor | None, gate: Tensor | None, weight: Tensor, epsilon: float, act: str,
    d_gate: Tensor | None, out: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of o (and of what was added), packed, and of the weight; writes d_gate, a slice, and where it is given out."""
    B, T, H, V = o.shape
    d_o = o.new_empty(B, T, H, V)
    strides = (0, 0) if gate is None or d_gate is None else (token_stride(gate), token_stride(d_gate))
    unit, tile = stride_unit(*strides), _tile(V)
    programs = max(1, min(triton.cdiv(B * T * H, tile["BLOCK_R"]), count_programs(o.device)))
    partial = o.new_empty(programs, V, dtype=torch.float32)
    head_norm_backward_kernel[(programs,)](
        o, added, gate, weight, d_out, d_o, d_gate, out, partial, B * T * H, H, o.stride(2), *(each // unit for each in strides),
        epsilon, ACT=act, ADDED=added is not None, OUT=out is not None, SIZE=V, UNIT=unit, **tile,
    )  # fmt: skip
    return d_o, sum_first(partial, weight.dtype)
