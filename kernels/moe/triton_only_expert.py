"""Feed-forward of rows that all go to one expert, the only one of a rank: products of whole matrices between two Triton kernels.

Forward: up, weighted activation, down. Backward: down, the activation's gradient with the weighted activation again, two weight
gradients, up. Products are the library's, as of any `linear`; nothing is sorted, gathered or listed by tile. Saved: x and the
hidden rows before the activation, as in `triton_experts.py`.
"""

# Triton reads a kernel's parameters from the call: they carry no types.
# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: ANN201

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from amfm.kernels.common.custom_op import fake_of
from amfm.kernels.common.weight_gradients import GradientSum, compute_later, gradient_sums_of, is_split
from amfm.kernels.low_precision.triton_kernels import activate
from amfm.kernels.moe import triton_codes
from amfm.kernels.runtime.backend import INTERPRETED
from amfm.kernels.runtime.interpreter import dot_dtype
from amfm.kernels.swiglu.gate import find_gate, unit_constants

TILE = {"BLOCK_R": 16, "BLOCK_C": 64} if INTERPRETED else {"BLOCK_R": 4, "BLOCK_C": 1024}


@triton.jit(do_not_specialize=["rows"])
def weigh_activation_kernel(
    hidden, active, weights, rows, width,
    SWIGLU: tl.constexpr, ALPHA: tl.constexpr, SHIFT: tl.constexpr, LIMIT: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """active [S, width] = weight * activation(hidden [S, F]), F being 2 * width for gated units. Grid: tiles of rows, of columns."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    place = hidden + row[:, None] * (width * 2 if SWIGLU else width) + column[None, :]
    value = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(place + width, mask=inside, other=0.0).to(tl.float32) if SWIGLU else value
    weight = tl.load(weights + row, mask=row < rows, other=0.0).to(tl.float32)
    result = activate(value, up, SWIGLU, ALPHA, SHIFT, LIMIT) * weight[:, None]
    tl.store(active + row[:, None] * width + column[None, :], result.to(active.dtype.element_ty), mask=inside)


@torch.library.custom_op("amfm::weigh_activation_triton", mutates_args=())
def _weigh(hidden_SF: Tensor, weights_S1: Tensor, activation: str) -> Tensor:
    """Weighted activations [S, width] of hidden rows."""
    active = _empty_active(hidden_SF, activation)
    rows, width = active.shape
    if rows:
        weigh_activation_kernel[(triton.cdiv(rows, TILE["BLOCK_R"]), triton.cdiv(width, TILE["BLOCK_C"]))](
            hidden_SF, active, weights_S1, rows, width, **unit_constants(activation), **TILE
        )
    return active


def _empty_active(hidden_SF: Tensor, activation: str) -> Tensor:
    rows, features = hidden_SF.shape
    return hidden_SF.new_empty(rows, features // (1 if find_gate(activation) is None else 2))


@fake_of(_weigh)
def _(given: Any) -> Tensor:
    return _empty_active(given.hidden_SF, given.activation)


class _OnlyExpert(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_SD: Tensor,
        weights_S1: Tensor,
        up_EFD: Tensor,
        down_EDF: Tensor,
        activation: str,
        totals: Sequence[GradientSum] | None,
    ) -> Tensor:
        hidden_SF = triton_codes.multiply_rows(x_SD, up_EFD[0].t())
        ctx.activation, ctx.totals = activation, totals
        weights_S1 = weights_S1.contiguous()
        ctx.save_for_backward(x_SD, weights_S1, hidden_SF, up_EFD, down_EDF)
        return triton_codes.multiply_rows(_weigh(hidden_SF, weights_S1, activation), down_EDF[0].t())

    @staticmethod
    def backward(ctx: Any, dy_SD: Tensor) -> tuple[Tensor | None, ...]:
        x_SD, weights_S1, hidden_SF, up_EFD, down_EDF = ctx.saved_tensors
        v_SW = triton_codes.multiply_rows(dy_SD, down_EDF[0])
        pairs, offsets_E = triton_codes.all_rows(x_SD)
        given = weights_S1, pairs, triton_codes.list_code_tiles(offsets_E, len(x_SD)), 1, ctx.activation
        d_hidden_SF, active_SW, d_weights_S1 = triton_codes.open_rows(v_SW, hidden_SF, *given)
        del v_SW
        weights, sides = [up_EFD, down_EDF], ((d_hidden_SF, x_SD), (dy_SD, active_SW))
        half = partial(triton_codes.outer_weight_gradients, ctx.totals, sides, up_EFD.dtype)
        dx_SD, d_up, d_down = triton_codes.multiply_rows(d_hidden_SF, up_EFD[0]), None, None
        if is_split(*weights):
            compute_later(weights, half)
        else:
            d_up, d_down = half()
        return dx_SD, d_weights_S1, d_up, d_down, None, None


def only_expert_triton(x_SD: Tensor, weights_S1: Tensor, up_EFD: Tensor, down_EDF: Tensor, activation: str) -> Tensor:
    """weight * feed-forward of each row, [S, D], weights [S, 1], for float32, bfloat16 and float16."""
    dot_dtype(x_SD.dtype)  # rejects float64
    totals = gradient_sums_of(up_EFD, down_EDF)
    y_SD: Tensor = _OnlyExpert.apply(x_SD, weights_S1, up_EFD, down_EDF, activation, totals)
    return y_SD
