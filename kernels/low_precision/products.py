"""The three products of a weight with a recipe, by codes on a GPU that multiplies them, else emulated.

A GPU without `emulate` that cannot multiply a recipe's codes is an error: nothing falls back silently. A CPU emulates,
but for Triton's interpreter, which runs what a GPU would.
"""

from __future__ import annotations

import torch
from torch import Tensor

from amfm.kernels.common.gradient_sum import GradientSum, land_product
from amfm.kernels.low_precision import emulated
from amfm.kernels.low_precision.formats import Quantized
from amfm.kernels.low_precision.recipe import FIRST_CAPABILITY, KERNELS, Recipe
from amfm.kernels.low_precision.watch import note_operands
from amfm.kernels.runtime.backend import INTERPRETED, resolve_backend

# What one matrix was made into for the gradient of a weight: codes, scales, and nvfp4's factor of the whole.
Kept = tuple[Tensor | None, ...]


def multiplies_codes(recipe: Recipe, device: torch.device) -> bool:
    """Whether kernels multiply codes here; the emulation does otherwise.

    Raises ValueError for a GPU that was not told to emulate and cannot multiply them.
    """
    if recipe.emulate or (device.type == "cpu" and not INTERPRETED) or device.type == "meta":
        return False
    if recipe.name not in KERNELS:
        raise ValueError(f"no kernel multiplies by {recipe.name} yet; use low_precision.emulate=true, or {KERNELS[0]}")
    if device.type == "cuda":
        needed, found = FIRST_CAPABILITY[recipe.name], torch.cuda.get_device_capability(device)
        if found < needed:
            raise ValueError(
                f"low_precision.recipe={recipe.name} needs compute capability {needed[0]}.{needed[1]}; this GPU has "
                f"{found[0]}.{found[1]}. Use low_precision.emulate=true, or recipe: none"
            )
    resolve_backend("triton", device, "low_precision")
    return True


def output(x_RI: Tensor, weight_OI: Tensor, recipe: Recipe, *, keep: bool) -> tuple[Tensor, Kept]:
    """x W^T, [R, O] in the dtype of x, and what the gradient of W needs of x if it is to be kept."""
    if multiplies_codes(recipe, x_RI.device):
        from amfm.kernels.low_precision import triton_impl as codes

        note_operands(recipe, input=x_RI, weight=weight_OI)
        rows, columns = codes.quantize_rows(x_RI, rows=True, columns=keep)
        return codes.product(rows, codes.quantize_weight(weight_OI), x_RI.dtype), columns if keep else ()
    return emulated.output(x_RI, weight_OI, recipe).to(x_RI.dtype), keep_columns(x_RI, recipe) if keep else ()


def keep_columns(x_RI: Tensor, recipe: Recipe) -> Kept:
    """What the gradient of W needs of x."""
    if multiplies_codes(recipe, x_RI.device):
        from amfm.kernels.low_precision import triton_impl as codes

        return codes.quantize_rows(x_RI, columns=True)[1]
    made = emulated.quantize_columns(x_RI, recipe)
    return made.codes, made.scales, made.whole


def input_gradient(grad_RO: Tensor, weight_OI: Tensor, recipe: Recipe, *, keep: bool) -> tuple[Tensor, Kept]:
    """dy W, [R, I] in the dtype of dy, and what the gradient of W needs of dy if it is to be kept."""
    if multiplies_codes(recipe, grad_RO.device):
        from amfm.kernels.low_precision import triton_impl as codes

        note_operands(recipe, gradient=grad_RO)
        rows, columns = codes.quantize_rows(grad_RO, rows=True, columns=keep)
        weight = codes.quantize_weight(weight_OI, transposed=True)
        return codes.product(rows, weight, grad_RO.dtype), columns if keep else ()
    dx_RI = emulated.input_gradient(grad_RO, weight_OI, recipe).to(grad_RO.dtype)
    return dx_RI, keep_gradient(grad_RO, recipe) if keep else ()


def keep_gradient(grad_RO: Tensor, recipe: Recipe) -> Kept:
    """What the gradient of W needs of dy."""
    if multiplies_codes(recipe, grad_RO.device):
        return keep_columns(grad_RO, recipe)
    made = emulated.quantize_gradient_columns(grad_RO, recipe)
    return made.codes, made.scales, made.whole


def weight_gradient(
    grad: Kept, x: Kept, rows: int, dtype: torch.dtype, recipe: Recipe, total: GradientSum | None
) -> Tensor | None:
    """dy^T x over `rows` tokens, [O, I] in `dtype`, from what was kept of both; None where it lands in `total`."""
    (left, left_scales, *left_whole), (right, right_scales, *right_whole) = grad, x
    assert left is not None and left_scales is not None and right is not None and right_scales is not None
    if multiplies_codes(recipe, left.device):
        from amfm.kernels.low_precision import triton_impl as codes

        columns = codes.ColumnCodes(left, left_scales), codes.ColumnCodes(right, right_scales)
        return codes.weight_gradient(*columns, rows, dtype, total)
    product = emulated.multiply(
        Quantized.of_rows(recipe.name, left, left_scales, *left_whole),
        Quantized.of_rows(recipe.name, right, right_scales, *right_whole),
    )
    if total is not None:
        land_product(total, product)
        return None
    return product.to(dtype)
