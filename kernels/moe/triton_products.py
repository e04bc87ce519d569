"""Products of sorted rows by their experts' matrices: tiles, configurations and launches.

How tall a tile is follows only from sizes, and what else a product may vary the tuner chooses (`product_config`). The sum over a
token's choices is launched here too.

The grouped product with as many programs as the GPU holds and operands fetched by its copy engine (TMA).

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

from amfm.kernels.moe.triton_kernels import (
    grouped_outer_kernel,
    grouped_product_kernel,
    load_tile,
    source_rows,
    sum_choices_kernel,
)
from amfm.kernels.runtime.backend import INTERPRETED
from amfm.kernels.runtime.interpreter import count_programs, dot_dtype
from amfm.kernels.runtime.tuning import Config, config_for, kept_until_retuned

# The fixed warps and stages of a product; others are candidates (`product_config`).
OPTIONS = {"num_warps": 8, "num_stages": 3}
OUTER_TILE = (
    {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32} if INTERPRETED else {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64}
)
SUM_TILE = {"BLOCK_M": 16, "BLOCK_N": 64} if INTERPRETED else {"BLOCK_M": 4, "BLOCK_N": 512}


def product_tile(rows: int, experts: int) -> dict[str, int]:
    """Tile of a product: half-height tiles for few rows per expert, where most of a full one would be padding.

    Follows only from sizes, never from counts, which only the device knows.
    """
    if INTERPRETED:
        return {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 32}
    return {"BLOCK_M": 128 if rows >= 256 * experts else 64, "BLOCK_N": 128, "BLOCK_K": 64}


def narrow_tile(rows: int, experts: int) -> dict[str, int]:
    """Tile of a product that holds two results (gate and up) or the activation's gradient: wider ones spill registers."""
    tile = product_tile(rows, experts)
    return {**tile, "BLOCK_N": min(tile["BLOCK_N"], 64)}


def product_config(kernel: str, tile: dict[str, int], x: Tensor, *, has_descriptors: bool = False) -> Config:
    """Configuration of a product with this tile for rows like x."""
    return _find_config(kernel, *tile.values(), x.dtype, x.device, has_descriptors)


@kept_until_retuned
def _find_config(
    kernel: str, height: int, width: int, depth: int, dtype: torch.dtype, device: torch.device, has_descriptors: bool
) -> Config:
    """A product's tile keeps its height and width; what it takes of the inner size at a time may change, and warps and stages.

    With descriptors the persistent kernel is a candidate too.
    """
    tile = {"BLOCK_M": height, "BLOCK_N": width, "BLOCK_K": depth}
    halved = {**tile, "BLOCK_K": max(16, depth // 2)}
    candidates = [tile | OPTIONS]
    candidates += [tile | {"num_warps": warps, "num_stages": stages} for warps, stages in ((8, 4), (4, 3))]
    candidates += [halved | {"num_warps": warps, "num_stages": 4} for warps in (8, 4)]
    shape: tuple[object, ...] = (dtype, height, width)
    if has_descriptors:
        candidates += [tile | {"num_warps": 8, "num_stages": stages, "PERSISTENT": 1} for stages in (3, 4)]
        shape += ("descriptors",)
    return config_for(kernel, shape, candidates, device)


def multiply(x: Tensor, weight_EBA: Tensor, sources: Tensor | None, tiles: Tensor) -> Tensor:
    """Sorted rows times the transpose of their expert's matrix: [S, B]; the matrix may be a transposed view.

    Results go to the rows that `sources` names. The matrix is addressed by its three strides, so that backward's transpose of
    `up` needs no copy.
    """
    experts, columns, inner = weight_EBA.shape
    rows = len(x)
    y = x.new_empty(rows, columns)
    tile = product_tile(rows, experts)
    config = product_config("experts_product", tile, x, has_descriptors=takes_descriptors(x, weight_EBA))
    if config.get("PERSISTENT"):
        launch_persistent(x, weight_EBA, y, sources, tiles, {k: v for k, v in config.items() if k != "PERSISTENT"})
        return y
    grid = (len(tiles) * triton.cdiv(columns, tile["BLOCK_N"]),)
    grouped_product_kernel[grid](
        x, weight_EBA, y, sources, tiles, experts, columns, inner, *weight_EBA.stride(),
        GATHER=False, SCATTER=sources is not None, DOT=dot_dtype(x.dtype), **config,
    )  # fmt: skip
    return y


def multiply_outer(
    left: Tensor,
    right: Tensor,
    sources: Tensor | None,
    offsets_E: Tensor,
    place: Tensor | None,
    adds: bool,
    *,
    gather_left: bool,
) -> Tensor:
    """left^T right over each expert's rows: [E, A, B]; one of the two is gathered if there are sources.

    If there is a place it is written there, or added to what is there, and the result is empty.
    """
    experts, lefts, rights = offsets_E.shape[0], left.shape[1], right.shape[1]
    result = left.new_empty(experts, lefts, rights) if place is None else place
    grid = (triton.cdiv(lefts, OUTER_TILE["BLOCK_M"]), triton.cdiv(rights, OUTER_TILE["BLOCK_N"]), experts)
    grouped_outer_kernel[grid](
        left, right, result, sources, offsets_E, lefts, rights,
        GATHER_LEFT=gather_left and sources is not None, GATHER_RIGHT=not gather_left and sources is not None,
        ADD=adds, DOT=dot_dtype(left.dtype), **product_config("experts_outer", OUTER_TILE, left),
    )  # fmt: skip
    return result if place is None else left.new_empty(0)


def sum_choices(rows_SD: Tensor, places: Tensor, weights_RK: Tensor | None, tokens: int, choices: int) -> Tensor:
    """Each token's rows added up, by weight if there are weights: [R, D] in the dtype of the rows.

    places [R * K] int32: the row of each pair; from S on, of a pair without a row. Sums are float32, in the order of a token's
    choices.
    """
    rows, model = rows_SD.shape
    y = rows_SD.new_empty(tokens, model)
    if y.numel():
        grid = (triton.cdiv(tokens, SUM_TILE["BLOCK_M"]), triton.cdiv(model, SUM_TILE["BLOCK_N"]))
        sum_choices_kernel[grid](
            rows_SD, places, weights_RK, y, tokens, rows, model, choices, WEIGHTED=weights_RK is not None, **SUM_TILE
        )
    return y


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
