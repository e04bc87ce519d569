"""The grouped product with as many programs as the GPU holds and operands fetched by its copy engine (TMA).

A candidate of the tuner next to `triton_kernels.grouped_product_kernel`, not the default: what it wins or loses only a
GPU can say. Each program takes tile after tile, so that the next tile's operands are on their way while the last one is
stored, and descriptors compute addresses that the other kernel computes in registers. TMA wants rows that are in order
at multiples of 16
bytes: rows that are gathered stay with the other kernel. GPUs before Hopper have no such engine.
"""

# Triton reads a kernel's parameters from the call: they carry no types.
# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: ANN201

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from amfm.kernels.moe.triton_kernels import load_tile, source_rows
from amfm.kernels.runtime.interpreter import count_programs, dot_dtype
from amfm.kernels.runtime.tuning import Config

HOPPER = 9
ALIGNMENT_BYTES = 16


@triton.jit(do_not_specialize=["works"])
def persistent_product_kernel(
    rows, matrices, y, sources, tiles, experts, columns, inner, works,
    SCATTER: tl.constexpr, TRANSPOSED: tl.constexpr, DOT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y [S, columns] = rows [S, inner] times each expert's matrix, [columns, inner] or TRANSPOSED [inner, columns].

    rows and matrices are descriptors of blocks [BLOCK_M, BLOCK_K] and [1, BLOCK_N, BLOCK_K] ([1, BLOCK_K, BLOCK_N]); a block
    may reach into the next expert's rows, whose results are not stored. With SCATTER results go to the rows that `sources`
    names. `works`: tiles (an upper bound) times column blocks, column blocks innermost.

    Grid: as many programs as the GPU holds.
    """
    blocks = tl.cdiv(columns, BLOCK_N)
    for work in tl.range(tl.program_id(0), works, tl.num_programs(0)):
        expert, begin, end = load_tile(tiles, work // blocks)
        if expert < experts:
            first = work % blocks * BLOCK_N
            at, of = begin.to(tl.int32), expert.to(tl.int32)
            result = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for start in range(0, inner, BLOCK_K):
                x_tile = rows.load([at, start]).to(DOT)
                if TRANSPOSED:
                    w_tile = tl.reshape(matrices.load([of, start, first]), (BLOCK_K, BLOCK_N)).to(DOT)
                else:
                    w_tile = tl.trans(tl.reshape(matrices.load([of, first, start]), (BLOCK_N, BLOCK_K)).to(DOT))
                result = tl.dot(x_tile, w_tile, result, input_precision="tf32x3")
            row = begin + tl.arange(0, BLOCK_M)
            inside = row < end
            column = first + tl.arange(0, BLOCK_N)
            place = source_rows(sources, row, inside, SCATTER)[:, None] * columns + column[None, :]
            tl.store(y + place, result.to(y.dtype.element_ty), mask=inside[:, None] & (column[None, :] < columns))


def takes_descriptors(x: Tensor, weight_EBA: Tensor) -> bool:
    """Whether the GPU has TMA, and rows and matrices are as it wants them."""
    if x.device.type != "cuda" or torch.cuda.get_device_capability(x.device)[0] < HOPPER:
        return False
    _, columns, inner = weight_EBA.shape
    begins = columns, inner, x.storage_offset(), weight_EBA.storage_offset()
    aligned = all(numbers * x.element_size() % ALIGNMENT_BYTES == 0 for numbers in begins)
    return aligned and 1 in weight_EBA.stride()[1:]


def launch_persistent(
    x: Tensor, weight_EBA: Tensor, y: Tensor, sources: Tensor | None, tiles: Tensor, config: Config
) -> None:
    """Write y [S, B]: rows x [S, A] in sorted order, times the transpose of their expert's matrix [B, A], a view maybe."""
    experts, columns, inner = weight_EBA.shape
    given = dict(config)
    height, width, depth = given["BLOCK_M"], given["BLOCK_N"], given["BLOCK_K"]
    is_transposed = weight_EBA.stride(2) != 1
    matrices = weight_EBA.transpose(1, 2) if is_transposed else weight_EBA
    block = [1, depth, width] if is_transposed else [1, width, depth]
    works = len(tiles) * triton.cdiv(columns, width)
    persistent_product_kernel[(min(works, count_programs(x.device, 1)),)](
        TensorDescriptor.from_tensor(x, [height, depth]), TensorDescriptor.from_tensor(matrices, block), y, sources, tiles,
        experts, columns, inner, works, SCATTER=sources is not None, TRANSPOSED=is_transposed, DOT=dot_dtype(x.dtype), **given,
    )  # fmt: skip
