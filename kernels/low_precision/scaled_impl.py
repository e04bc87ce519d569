"""mxfp8 and nvfp4 on Blackwell: operands as codes, and the three products.

Operands of all kinds are `Codes`; scaled_kernels.py says where codes and scales are. Products of whole matrices are torch's `scaled_mm`, which
takes them by cuBLASLt, and add to float32 sums by `scaled_addmm_`; those of experts, whose rows do not begin where torch's
grouped product wants them, are ours, and so is all in Triton's interpreter.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from amfm.kernels.common.custom_op import fake_of
from amfm.kernels.common.inputs import check_matrix
from amfm.kernels.common.weight_gradients import GradientSum
from amfm.kernels.low_precision.formats import E2M1_MAX, E4M3_MAX, RUN, SMALLEST_SCALE
from amfm.kernels.low_precision.recipe import Recipe, keeps_weights, made_once
from amfm.kernels.low_precision.scaled_kernels import measure_kernel, quantize_scaled_kernel
from amfm.kernels.low_precision.scaled_products import scaled_outer_kernel, scaled_product_kernel
from amfm.kernels.low_precision.triton_impl import Tiles, count_tiles, rows_and_width
from amfm.kernels.runtime.backend import INTERPRETED
from amfm.kernels.runtime.interpreter import replace_methods
from amfm.kernels.swiglu.gate import unit_constants

TILE, PIECE = 128, 512
# With 128 columns a program of nvfp4 spills.
MEASURE = {"BLOCK": 64, "num_warps": 8}
QUANTIZE = {"BLOCK": 64, "num_warps": 8}
PRODUCT = {"BLOCK_N": 128, "num_warps": 8, "num_stages": 4}
OUTER = {"BLOCK_N": 128, "num_warps": 8, "num_stages": 4}
# What measure_kernel finds of each matrix: its largest number, the largest turned one, a sum of its bits.
MEASURED = 3


class Codes(NamedTuple):
    """Codes [.., M, K] uint8, of e2m1 two a byte; scales [.., blocks of 128 rows, pieces of four runs, 512] uint8.

    `largest` [E]: bits of the largest number of each matrix, from which nvfp4's factor of the whole follows; empty for mxfp8.
    """

    codes: Tensor
    scales: Tensor
    largest: Tensor


@dataclass(frozen=True)
class BlockScaled:
    """The products of a weight with recipe mxfp8 or nvfp4, as triton_impl.py has those of fp8_block."""

    recipe: Recipe

    @property
    def is_fp4(self) -> bool:
        """Whether codes are e2m1."""
        return self.recipe.name == "nvfp4"

    def quantize_rows(
        self,
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
    ) -> tuple[Codes, Codes]:
        """Codes of rows x [R, K] along rows and along columns, empty for those that were not asked for.

        As `triton_impl.quantize_rows`. `gradient`: nvfp4 rounds at random.
        """
        listed, offsets = (None, None) if tiles is None else tiles
        made = _quantize(
            x, weights, pairs, sources, listed, offsets, activation, rows, columns, self.is_fp4, False,
            gradient and self.is_fp4, self.recipe.seed,
        )  # fmt: skip
        return _operands(made)

    def quantize_weight(self, weight: Tensor, *, transposed: bool = False) -> Codes:
        """Codes of a weight [N, K], or of experts' [E, N, K]; `transposed`: of the transposes. Kept where codes are kept."""
        keeps = keeps_weights()

        def make() -> tuple[Codes, Codes]:
            check_matrix("weight", weight)
            matrices = weight if weight.dim() == 3 else weight[None]
            flags = keeps or not transposed, keeps or transposed, self.is_fp4, True, False, 0
            return _operands(_quantize(matrices, None, None, None, None, None, "", *flags))

        return made_once(weight, f"{self.recipe.name} codes", make)[int(transposed)]

    def product(
        self,
        rows: Codes,
        weight: Codes,
        dtype: torch.dtype,
        tiles: Tiles | None = None,
        sources: Tensor | None = None,
    ) -> Tensor:
        """Rows [S, K] times the transpose of their expert's matrix [N, K]: [S, N] in `dtype`, to the rows that `sources` names."""
        if tiles is None and rows.codes.device.type == "cuda":
            left, right = self._torch_operand(rows), self._torch_operand(weight)
            return functional.scaled_mm(**_arguments(left, right), output_dtype=dtype)
        return _product(*rows, *weight, None if tiles is None else tiles.tiles, sources, dtype, self.is_fp4)

    def weight_gradient(
        self,
        left: Codes,
        right: Codes,
        rows: int,
        dtype: torch.dtype,
        total: GradientSum | None,
        tiles: Tiles | None = None,
    ) -> Tensor | None:
        """left^T right over each expert's rows, [E, N, K] in `dtype`, [N, K] without tiles; None if it lands in `total`."""
        left, right = Codes(*left), Codes(*right)
        place, adds = (None, False) if total is None else total.take()
        if tiles is None and left.codes.device.type == "cuda":
            given = _arguments(self._torch_operand(left), self._torch_operand(right))
            if place is None:
                return functional.scaled_mm(**given, output_dtype=dtype)
            given = {"mat1": given.pop("mat_a"), "mat2": given.pop("mat_b"), **given}
            functional.scaled_addmm_(place, **given, beta=float(adds))
            return None
        offsets = None if tiles is None else tiles.offsets_E
        experts = 1 if offsets is None else len(offsets)
        wide = None if place is None else place.view(experts, left.codes.shape[-2], right.codes.shape[-2])
        made = _outer(*left, *right, offsets, rows, dtype, wide, adds, self.is_fp4)
        if place is not None:
            return None
        return made[0] if tiles is None else made

    def _torch_operand(self, given: Codes) -> tuple[Tensor, list[Tensor], list[Any], list[Any]]:
        """A matrix's codes, scales, and how torch is to take these."""
        kinds, orders = functional.ScalingType, functional.SwizzleType
        codes = given.codes.flatten(0, -2)
        if not self.is_fp4:
            scales = given.scales.view(torch.float8_e8m0fnu).flatten()
            return codes.view(torch.float8_e4m3fn), [scales], [kinds.BlockWise1x32], [orders.SWIZZLE_32_4_4]
        whole = (given.largest.view(torch.float32) / (E4M3_MAX * E2M1_MAX)).clamp(min=SMALLEST_SCALE)
        scales = given.scales.view(torch.float8_e4m3fn).flatten()
        how = [kinds.BlockWise1x16, kinds.TensorWise], [orders.SWIZZLE_32_4_4, orders.NO_SWIZZLE]
        return codes.view(torch.float4_e2m1fn_x2), [scales, whole], *how


def _arguments(left: Any, right: Any) -> dict[str, Any]:
    """What torch's scaled products take of two operands, of which the second is transposed."""
    sides = {"mat_a": left[0], "mat_b": right[0].t()}
    for side, (_, scales, kinds, orders) in (("a", left), ("b", right)):
        sides |= {f"scale_{side}": scales, f"scale_recipe_{side}": kinds, f"swizzle_{side}": orders}
    return sides


def _operands(made: tuple[Tensor, ...]) -> tuple[Codes, Codes]:
    row_codes, row_scales, column_codes, column_scales, largest, turned = made
    return Codes(row_codes, row_scales, largest), Codes(column_codes, column_scales, turned)


@torch.library.custom_op("amfm::scaled_quantize_triton", mutates_args=())
def _quantize(
    x: Tensor,
    weights: Tensor | None,
    pairs: Tensor | None,
    sources: Tensor | None,
    tiles: Tensor | None,
    offsets_E: Tensor | None,
    activation: str,
    rows: bool,
    columns: bool,
    is_fp4: bool,
    is_weight: bool,
    random: bool,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Codes and scales along rows, the same along columns, and the largest number of each matrix for either."""
    x = x.contiguous()
    made = _empty_codes(x, sources, tiles, offsets_E, activation, rows, columns, is_fp4, is_weight)
    row_codes, row_scales, column_codes, column_scales, *_ = made
    size, width = rows_and_width(x, sources, activation)
    matrices = len(x) if is_weight else 1
    experts = matrices if offsets_E is None else len(offsets_E)
    run, count = RUN[_name(is_fp4)], count_tiles(size, tiles)
    flags = {"ACTIVATED": bool(activation), **unit_constants(activation), "WEIGHTED": weights is not None}
    flags |= {"GATHER": sources is not None, "TILED": tiles is not None, "RANDOM": random}
    flags |= {"TURN": is_fp4 and columns and not is_weight}
    measured = x.new_zeros(MEASURED, experts if is_fp4 else 0, dtype=torch.int32)
    given = x, weights, pairs, sources, tiles, offsets_E, measured
    if size and is_fp4:
        grid = (count * triton.cdiv(width, MEASURE["BLOCK"]), matrices)
        measure_kernel[grid](*given, experts, size, width, seed, **flags, **MEASURE)
    if size:
        grid = (count * triton.cdiv(width, 4 * run) * (4 * run // QUANTIZE["BLOCK"]), matrices)
        stride = column_codes.shape[-1]
        quantize_scaled_kernel[grid](
            *given, row_codes, row_scales, column_codes, column_scales,
            experts, size, width, stride, column_scales.shape[-2] if columns else 0, seed,
            **flags, ROWS=rows, COLUMNS=columns, RUN=run, FP4=is_fp4, SQUARE=is_fp4 and is_weight, **QUANTIZE,
        )  # fmt: skip
    if not is_fp4:
        return made
    turned = measured[0 if is_weight else 1].clone()
    return row_codes, row_scales, column_codes, column_scales, measured[0].clone(), turned


def _name(is_fp4: bool) -> Any:
    return "nvfp4" if is_fp4 else "mxfp8"


def _empty_codes(
    x: Tensor,
    sources: Tensor | None,
    tiles: Tensor | None,
    offsets_E: Tensor | None,
    activation: str,
    rows: bool,
    columns: bool,
    is_fp4: bool,
    is_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Memory for what `_quantize` makes; empty for what was not asked for."""
    size, width = rows_and_width(x, sources, activation)
    count, packed, numbers = count_tiles(size, tiles), 2 if is_fp4 else 1, 4 * RUN[_name(is_fp4)]
    matrices, summed = ((len(x),), size) if is_weight else ((), count * TILE)
    experts = (len(x) if is_weight else 1) if offsets_E is None else len(offsets_E)

    def empty(asked: bool, *shape: int) -> Tensor:
        return x.new_empty((*matrices, *shape) if asked else (0, *shape[1:]), dtype=torch.uint8)

    return (
        empty(rows, size, width // packed),
        empty(rows, count, -(-width // numbers), PIECE),
        empty(columns, width, summed // packed),
        empty(columns, -(-width // TILE), -(-summed // numbers), PIECE),
        x.new_empty(experts if is_fp4 else 0, dtype=torch.int32),
        x.new_empty(experts if is_fp4 else 0, dtype=torch.int32),
    )


@fake_of(_quantize)
def _(given: Any) -> tuple[Tensor, ...]:
    return _empty_codes(
        given.x, given.sources, given.tiles, given.offsets_E, given.activation, given.rows, given.columns,
        given.is_fp4, given.is_weight,
    )  # fmt: skip


@torch.library.custom_op("amfm::scaled_product_triton", mutates_args=())
def _product(
    left: Tensor,
    left_scales: Tensor,
    left_largest: Tensor,
    right: Tensor,
    right_scales: Tensor,
    right_largest: Tensor,
    tiles: Tensor | None,
    sources: Tensor | None,
    dtype: torch.dtype,
    is_fp4: bool,
) -> Tensor:
    rows, (experts, columns, stride) = len(left), right.shape
    y = left.new_empty(rows, columns, dtype=dtype)
    if rows:
        with _interpreted_scales():
            scaled_product_kernel[(count_tiles(rows, tiles) * triton.cdiv(columns, PRODUCT["BLOCK_N"]),)](
                _bytes(left, is_fp4), left_scales, left_largest, _bytes(right, is_fp4), right_scales, right_largest, y,
                sources, tiles, experts, rows, columns, stride * (2 if is_fp4 else 1),
                TILED=tiles is not None, SCATTER=sources is not None, FP4=is_fp4, **PRODUCT,
            )  # fmt: skip
    return y


@fake_of(_product)
def _(given: Any) -> Tensor:
    y: Tensor = given.left.new_empty(len(given.left), given.right.shape[1], dtype=given.dtype)
    return y


@torch.library.custom_op("amfm::scaled_outer_triton", mutates_args=("place",))
def _outer(
    left: Tensor,
    left_scales: Tensor,
    left_largest: Tensor,
    right: Tensor,
    right_scales: Tensor,
    right_largest: Tensor,
    offsets_E: Tensor | None,
    rows: int,
    dtype: torch.dtype,
    place: Tensor | None,
    adds: bool,
    is_fp4: bool,
) -> Tensor:
    experts = 1 if offsets_E is None else len(offsets_E)
    lefts, rights = len(left), len(right)
    result = left.new_empty(experts, lefts, rights, dtype=dtype) if place is None else place
    with _interpreted_scales():
        scaled_outer_kernel[(triton.cdiv(lefts, TILE), triton.cdiv(rights, OUTER["BLOCK_N"]), experts)](
            _bytes(left, is_fp4), left_scales, left_largest, _bytes(right, is_fp4), right_scales, right_largest, result,
            offsets_E, experts, rows, lefts, rights, left.shape[1],
            EXPERTS=triton.next_power_of_2(experts), TILED=offsets_E is not None, ADD=adds, FP4=is_fp4, **OUTER,
        )  # fmt: skip
    return result if place is None else left.new_empty(0, dtype=dtype)


@fake_of(_outer)
def _(given: Any) -> Tensor:
    if given.place is not None:
        empty: Tensor = given.left.new_empty(0, dtype=given.dtype)
        return empty
    experts = 1 if given.offsets_E is None else len(given.offsets_E)
    made: Tensor = given.left.new_empty(experts, len(given.left), len(given.right), dtype=given.dtype)
    return made


def _bytes(codes: Tensor, is_fp4: bool) -> Tensor:
    """Codes as kernels load them: e2m1 as bytes of two."""
    return codes if is_fp4 else codes.view(torch.float8_e4m3fn)


def _interpreted_scales() -> Any:
    """Inside, Triton's interpreter reads scales in e4m3 as such: 3.9 takes each byte for e8m0."""
    if not INTERPRETED:
        return nullcontext()
    from triton.runtime import interpreter

    decode = interpreter._dot_scaled_scale_to_f32

    def of_either(scale: Any, compute_type: Any) -> Any:
        if scale.dtype.scalar != tl.float8e4nv:
            return decode(scale, compute_type)
        return torch.from_numpy(scale.data.copy()).view(torch.float8_e4m3fn).float().numpy()

    return replace_methods(interpreter, {"_dot_scaled_scale_to_f32": of_either})
