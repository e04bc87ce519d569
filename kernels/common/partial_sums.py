"""Sums of the parts that programs write, as one kernel: float32 parts in, their sum in the dtype of the gradient out.

Programs that each walk a share of the tokens write one part of a weight's gradient; adding parts by atomics would make the
bits depend on their order. PyTorch's sum and cast are two launches and a tensor in between, this is one.
"""

# Triton reads a kernel's parameters from the call: they carry no types.
# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: ANN201

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from amfm.kernels.runtime.backend import INTERPRETED

LARGEST_TILE = {"BLOCK_P": 16, "BLOCK_C": 64} if INTERPRETED else {"BLOCK_P": 32, "BLOCK_C": 128}


@triton.jit
def sum_parts_kernel(parts, total, count, columns, stride_p, stride_o, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """total [outer, columns] of parts [count, outer, columns], added in float32 and in one order, rounded once.

    Grid: outer times blocks of columns, the blocks innermost. Parts are `stride_p` apart, rows of the total `stride_o`.
    """
    blocks = tl.cdiv(columns, BLOCK_C)
    column = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    outer = (tl.program_id(0) // blocks).to(tl.int64)
    lane = tl.arange(0, BLOCK_P)
    first = parts + outer * columns + column[None, :]
    added = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for begin in range(0, count, BLOCK_P):
        part = begin + lane[:, None]
        inside = (part < count) & (column[None, :] < columns)
        added += tl.load(first + part.to(tl.int64) * stride_p, mask=inside, other=0.0)
    summed = tl.sum(added, axis=0)
    tl.store(total + outer * stride_o + column, summed.to(total.dtype.element_ty), mask=column < columns)


def grid_of(outer: int, columns: int) -> tuple[int]:
    """Programs of `sum_parts_kernel`, in one dimension: a GPU takes 65,535 of a second one, and routed rows may be
    more blocks.
    """
    return (outer * triton.cdiv(columns, LARGEST_TILE["BLOCK_C"]),)


def sum_parts(parts: Tensor, total: Tensor) -> Tensor:
    """Add parts [P, outer, columns] (float32, packed) into total [outer, columns], rows of which may be apart; returns it."""
    count, outer, columns = parts.shape
    if total.numel():
        tile = LARGEST_TILE | {"BLOCK_P": min(LARGEST_TILE["BLOCK_P"], triton.next_power_of_2(count))}
        sum_parts_kernel[grid_of(outer, columns)](
            parts, total, count, columns, outer * columns, total.stride(0), **tile
        )
    return total


def sum_first(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """Add parts [P, ...] (float32, packed) over their first dimension -> [...] in `dtype`."""
    total = parts.new_empty(parts.shape[1:], dtype=dtype)
    sum_parts(parts.view(len(parts), 1, -1), total.view(1, -1))
    return total
