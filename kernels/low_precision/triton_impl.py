"""fp8_block by our kernels on Hopper: operands as codes, the three products, one custom operation each, or cuBLASLt's.

Operands of one product along rows are `RowCodes`, along the tokens `ColumnCodes`, weights `WeightCodes`. Where tokens belong to
experts, `Tiles` says which rows are whose; without it they are one matrix, and a weight is one expert's. Codes are uint8 outside of kernels.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from amfm.kernels.common.custom_op import fake_of
from amfm.kernels.common.inputs import check_matrix
from amfm.kernels.common.weight_gradients import GradientSum
from amfm.kernels.low_precision.formats import packed_width
from amfm.kernels.low_precision.library_products import multiplies_by_library, multiply, multiply_outer
from amfm.kernels.low_precision.recipe import keeps_weights, made_once
from amfm.kernels.low_precision.triton_kernels import (
    fp8_outer_kernel,
    fp8_product_kernel,
    pack_rows_kernel,
    quantize_tiles_kernel,
    quantize_weight_kernel,
    unpack_rows_kernel,
)
from amfm.kernels.swiglu.gate import unit_constants

RUN = 128
E4M3 = torch.float8_e4m3fn
QUANTIZE = {"num_warps": 16}
PACK = {"BLOCK_M": 32, "num_warps": 4}
PRODUCT = {"BLOCK_N": 128, "num_warps": 8, "num_stages": 4}
OUTER = {"BLOCK_N": 128, "num_warps": 8, "num_stages": 4}


class Tiles(NamedTuple):
    """Tiles of 128 sorted rows [bound, 3] int32, as `counting_sort.list_tiles` makes them, and the ends of experts [E] int32."""

    tiles: Tensor
    offsets_E: Tensor


class RowCodes(NamedTuple):
    """Codes [S, K] uint8 and scales [ceil(K / 128), S] float32."""

    codes: Tensor
    scales: Tensor


class ColumnCodes(NamedTuple):
    """Codes [tiles, K, 128] uint8 of the transposes of tiles, and scales [tiles, K] float32."""

    codes: Tensor
    scales: Tensor


class WeightCodes(NamedTuple):
    """Codes [E, N, K] uint8 and scales [E, ceil(N / 128), ceil(K / 128)] float32."""

    codes: Tensor
    scales: Tensor


def quantize_rows(
    x: Tensor,
    tiles: Tiles | None = None,
    sources: Tensor | None = None,
    *,
    rows: bool = False,
    columns: bool = False,
    activation: str = "",
    weights: Tensor | None = None,
    pairs: Tensor | None = None,
    gradient: bool = False,
) -> tuple[RowCodes, ColumnCodes]:
    """Codes of rows x [R, K] along rows and along columns in one pass; empty for those that were not asked for.

    `sources` [S] int32: the row of x at each sorted place. `activation`, a word of `amfm.kernels.swiglu.gate`: quantise that of the
    rows, which are 2 K wide before a gated unit. `weights`, a number for each pair [P], with `pairs` [S] int32: times the row's. `gradient`: as any other here.
    """
    listed = None if tiles is None else tiles.tiles
    experts = 1 if tiles is None else len(tiles.offsets_E)
    made = _quantize_rows(x, weights, pairs, sources, listed, experts, activation, rows, columns)
    return RowCodes(*made[:2]), ColumnCodes(*made[2:])


@torch.library.custom_op("amfm::fp8_quantize_rows_triton", mutates_args=())
def _quantize_rows(
    x: Tensor,
    weights: Tensor | None,
    pairs: Tensor | None,
    sources: Tensor | None,
    tiles: Tensor | None,
    experts: int,
    activation: str,
    rows: bool,
    columns: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = x.contiguous()
    row_codes, row_scales, column_codes, column_scales = made = _empty_codes(
        x, sources, tiles, activation, rows, columns
    )
    size, width = rows_and_width(x, sources, activation)
    count = count_tiles(size, tiles)
    if size:
        grid = (count * triton.cdiv(width, RUN),)
        quantize_tiles_kernel[grid](
            x, weights, pairs, sources, tiles, row_codes, row_scales, column_codes,
            column_scales, experts, size, width,
            ACTIVATED=bool(activation), **unit_constants(activation), WEIGHTED=weights is not None,
            GATHER=sources is not None, TILED=tiles is not None, ROWS=rows, COLUMNS=columns, **QUANTIZE,
        )  # fmt: skip
    return made


def rows_and_width(x: Tensor, sources: Tensor | None, activation: str) -> tuple[int, int]:
    """Sorted rows, or those of each matrix, and numbers of each that are quantised."""
    of_row = 2 if unit_constants(activation)["SWIGLU"] else 1
    return (x.shape[-2] if sources is None else len(sources)), x.shape[-1] // of_row


def count_tiles(rows: int, tiles: Tensor | None) -> int:
    """Tiles of 128 rows: those that are listed, or those of all rows."""
    return -(-rows // RUN) if tiles is None else len(tiles)


def _empty_codes(
    x: Tensor, sources: Tensor | None, tiles: Tensor | None, activation: str, rows: bool, columns: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Memory for row codes, their scales, column codes and theirs; empty for those that were not asked for."""
    size, width = rows_and_width(x, sources, activation)
    count = count_tiles(size, tiles)
    return (
        x.new_empty((size, width) if rows else (0, width), dtype=torch.uint8),
        x.new_empty((-(-width // RUN), size) if rows else 0, dtype=torch.float32),
        x.new_empty((count, width, RUN) if columns else (0, width, RUN), dtype=torch.uint8),
        x.new_empty((count, width) if columns else 0, dtype=torch.float32),
    )


@fake_of(_quantize_rows)
def _(given: Any) -> tuple[Tensor, ...]:
    return _empty_codes(given.x, given.sources, given.tiles, given.activation, given.rows, given.columns)


def quantize_weight(weight: Tensor, *, transposed: bool = False) -> WeightCodes:
    """Codes of a weight [N, K], or of experts' [E, N, K]; `transposed`: of the transposes, [E, K, N].

    Where codes are kept (`keep_weights`), both are made in one pass over the weight.
    """
    keeps = keeps_weights()

    def make() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        check_matrix("weight", weight)
        matrices = weight if weight.dim() == 3 else weight[None]
        return _quantize_weight(matrices, keeps or not transposed, keeps or transposed)

    made = made_once(weight, "fp8_block codes", make)
    return WeightCodes(*made[2:]) if transposed else WeightCodes(*made[:2])


@torch.library.custom_op("amfm::fp8_quantize_weight_triton", mutates_args=())
def _quantize_weight(weight_ENK: Tensor, plain: bool, transposed: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes and scales, and those of the transposes; empty for those that were not asked for."""
    weight_ENK = weight_ENK.contiguous()
    experts, rows, columns = weight_ENK.shape
    codes, scales, transposed_codes, transposed_scales = made = _empty_weight(weight_ENK, plain, transposed)
    grid = (triton.cdiv(rows, RUN), triton.cdiv(columns, RUN), experts)
    quantize_weight_kernel[grid](
        weight_ENK, codes, transposed_codes, scales, transposed_scales, rows, columns,
        PLAIN=plain, TRANSPOSED=transposed, **QUANTIZE,
    )  # fmt: skip
    return made


def _empty_weight(weight_ENK: Tensor, plain: bool, transposed: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    experts, rows, columns = weight_ENK.shape
    down, across = -(-rows // RUN), -(-columns // RUN)
    return (
        weight_ENK.new_empty((experts, rows, columns) if plain else 0, dtype=torch.uint8),
        weight_ENK.new_empty((experts, down, across) if plain else 0, dtype=torch.float32),
        weight_ENK.new_empty((experts, columns, rows) if transposed else 0, dtype=torch.uint8),
        weight_ENK.new_empty((experts, across, down) if transposed else 0, dtype=torch.float32),
    )


@fake_of(_quantize_weight)
def _(given: Any) -> tuple[Tensor, ...]:
    return _empty_weight(given.weight_ENK, given.plain, given.transposed)


def product(
    rows: RowCodes, weight: WeightCodes, dtype: torch.dtype, tiles: Tiles | None = None, sources: Tensor | None = None
) -> Tensor:
    """Rows [S, K] times the transpose of their expert's matrix [N, K]: [S, N] in `dtype`, to the rows that `sources` names."""
    size, inner = rows.codes.shape
    if tiles is None and size and multiplies_by_library(rows.codes.device, inner):
        return multiply(*rows, *weight, dtype)
    listed = None if tiles is None else tiles.tiles
    return _product(*rows, *weight, listed, sources, dtype)


@torch.library.custom_op("amfm::fp8_product_triton", mutates_args=())
def _product(
    left: Tensor,
    left_scales: Tensor,
    right: Tensor,
    right_scales: Tensor,
    tiles: Tensor | None,
    sources: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    rows, (experts, columns, inner) = len(left), right.shape
    y = left.new_empty(rows, columns, dtype=dtype)
    if rows:
        fp8_product_kernel[(count_tiles(rows, tiles) * triton.cdiv(columns, PRODUCT["BLOCK_N"]),)](
            left.view(E4M3), left_scales, right.view(E4M3), right_scales, y, sources, tiles, experts, rows, columns, inner,
            TILED=tiles is not None, SCATTER=sources is not None, **PRODUCT,
        )  # fmt: skip
    return y


@fake_of(_product)
def _(given: Any) -> Tensor:
    y: Tensor = given.left.new_empty(len(given.left), given.right.shape[1], dtype=given.dtype)
    return y


def weight_gradient(
    left: tuple[Tensor, Tensor],
    right: tuple[Tensor, Tensor],
    rows: int,
    dtype: torch.dtype,
    total: GradientSum | None,
    tiles: Tiles | None = None,
) -> Tensor | None:
    """left^T right over each expert's rows, [E, N, K] in `dtype`, [N, K] without tiles; None if it lands in `total`."""
    if tiles is None and rows and multiplies_by_library(left[0].device, RUN):
        return multiply_outer(left, right, rows, dtype, total)
    place, adds = (None, False) if total is None else total.take()
    experts = 1 if tiles is None else len(tiles.offsets_E)
    wide = None if place is None else place.view(experts, left[0].shape[1], right[0].shape[1])
    offsets = None if tiles is None else tiles.offsets_E
    made = _outer(*left, *right, offsets, rows, dtype, wide, adds)
    if place is not None:
        return None
    return made[0] if tiles is None else made


@torch.library.custom_op("amfm::fp8_outer_triton", mutates_args=("place",))
def _outer(
    left: Tensor,
    left_scales: Tensor,
    right: Tensor,
    right_scales: Tensor,
    offsets_E: Tensor | None,
    rows: int,
    dtype: torch.dtype,
    place: Tensor | None,
    adds: bool,
) -> Tensor:
    experts = 1 if offsets_E is None else len(offsets_E)
    lefts, rights = left.shape[1], right.shape[1]
    result = left.new_empty(experts, lefts, rights, dtype=dtype) if place is None else place
    fp8_outer_kernel[(triton.cdiv(lefts, RUN), triton.cdiv(rights, OUTER["BLOCK_N"]), experts)](
        left.view(E4M3), left_scales, right.view(E4M3), right_scales, result, offsets_E, experts, rows, lefts, rights,
        EXPERTS=triton.next_power_of_2(experts), TILED=offsets_E is not None, ADD=adds, **OUTER,
    )  # fmt: skip
    return result if place is None else left.new_empty(0, dtype=dtype)


@fake_of(_outer)
def _(given: Any) -> Tensor:
    if given.place is not None:
        empty: Tensor = given.left.new_empty(0, dtype=given.dtype)
        return empty
    experts = 1 if given.offsets_E is None else len(given.offsets_E)
    made: Tensor = given.left.new_empty(experts, given.left.shape[1], given.right.shape[1], dtype=given.dtype)
    return made


@torch.library.custom_op("amfm::pack_rows_triton", mutates_args=())
def pack_rows(x_SD: Tensor) -> Tensor:
    """As `packed_rows.pack_rows`."""
    x_SD = x_SD.contiguous()
    rows, width = x_SD.shape
    packed = x_SD.new_empty(rows, packed_width(width), dtype=torch.uint8)
    if rows:
        grid = (triton.cdiv(rows, PACK["BLOCK_M"]), triton.cdiv(width, RUN))
        pack_rows_kernel[grid](x_SD, packed, rows, width, packed.shape[1], **PACK)
    return packed


@fake_of(pack_rows)
def _(given: Any) -> Tensor:
    rows, width = given.x_SD.shape
    packed: Tensor = given.x_SD.new_empty(rows, packed_width(width), dtype=torch.uint8)
    return packed


@torch.library.custom_op("amfm::unpack_rows_triton", mutates_args=("x_SD",))
def unpack_rows(packed: Tensor, x_SD: Tensor) -> None:
    """As `packed_rows.unpack_rows`."""
    rows, width = x_SD.shape
    if rows:
        grid = (triton.cdiv(rows, PACK["BLOCK_M"]), triton.cdiv(width, RUN))
        unpack_rows_kernel[grid](packed, x_SD, rows, width, packed.shape[1], **PACK)


@fake_of(unpack_rows)
def _(given: Any) -> None:
    return None
