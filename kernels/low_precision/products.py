"""The three products of a weight with a recipe, by codes on a GPU that multiplies them, else emulated.

A GPU without `emulate` that cannot multiply a recipe's codes is an error: nothing falls back silently. A CPU emulates,
but for Triton's interpreter, which runs what a GPU would.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from amfm.kernels.common.weight_gradients import GradientSum, accumulate_product
from amfm.kernels.low_precision import emulated
from amfm.kernels.low_precision.formats import Quantized
from amfm.kernels.low_precision.recipe import FIRST_CAPABILITY, Recipe, note_operands
from amfm.kernels.runtime.backend import INTERPRETED, resolve_backend

# What one matrix was made into for the gradient of a weight: codes, scales, and nvfp4's factor of the whole.
Kept = tuple[Tensor | None, ...]


def multiplies_codes(recipe: Recipe, device: torch.device) -> bool:
    """Whether kernels multiply codes here; the emulation does otherwise.

    Raises ValueError for a GPU that was not told to emulate and cannot multiply them.
    """
    if recipe.emulate or (device.type == "cpu" and not INTERPRETED):
        return False
    if device.type == "meta":  # as a GPU that has them, for plans of its memory
        return True
    if device.type == "cuda":
        needed, found = FIRST_CAPABILITY[recipe.name], torch.cuda.get_device_capability(device)
        if found < needed:
            raise ValueError(
                f"low_precision.recipe={recipe.name} needs compute capability {needed[0]}.{needed[1]}; this GPU has "
                f"{found[0]}.{found[1]}. Use low_precision.emulate=true, or recipe: none"
            )
    resolve_backend("triton", device, "low_precision")
    return True


def codes_of(recipe: Recipe) -> Any:
    """Who quantises and multiplies codes of a recipe: `triton_impl` of fp8_block, `BlockScaled` of others, which have the same calls."""
    from amfm.kernels.low_precision import scaled_impl, triton_impl

    return triton_impl if recipe.name == "fp8_block" else scaled_impl.BlockScaled(recipe)


def output(x_RI: Tensor, weight_OI: Tensor, recipe: Recipe, *, keep: bool) -> tuple[Tensor, Kept]:
    """x W^T, [R, O] in the dtype of x, and what the gradient of W needs of x if it is to be kept."""
    if multiplies_codes(recipe, x_RI.device):
        codes = codes_of(recipe)
        note_operands(recipe, input=x_RI, weight=weight_OI)
        rows, columns = codes.quantize_rows(x_RI, rows=True, columns=keep)
        return codes.product(rows, codes.quantize_weight(weight_OI), x_RI.dtype), columns if keep else ()
    return emulated.output(x_RI, weight_OI, recipe).to(x_RI.dtype), keep_columns(x_RI, recipe) if keep else ()


def keep_columns(x_RI: Tensor, recipe: Recipe) -> Kept:
    """What the gradient of W needs of x."""
    if multiplies_codes(recipe, x_RI.device):
        columns: Kept = codes_of(recipe).quantize_rows(x_RI, columns=True)[1]
        return columns
    made = emulated.quantize_columns(x_RI, recipe)
    return made.codes, made.scales, made.whole


def input_gradient(grad_RO: Tensor, weight_OI: Tensor, recipe: Recipe, *, keep: bool) -> tuple[Tensor, Kept]:
    """dy W, [R, I] in the dtype of dy, and what the gradient of W needs of dy if it is to be kept."""
    if multiplies_codes(recipe, grad_RO.device):
        codes = codes_of(recipe)
        note_operands(recipe, gradient=grad_RO)
        rows, columns = codes.quantize_rows(grad_RO, rows=True, columns=keep, gradient=True)
        weight = codes.quantize_weight(weight_OI, transposed=True)
        return codes.product(rows, weight, grad_RO.dtype), columns if keep else ()
    dx_RI = emulated.input_gradient(grad_RO, weight_OI, recipe).to(grad_RO.dtype)
    return dx_RI, keep_gradient(grad_RO, recipe) if keep else ()


def keep_gradient(grad_RO: Tensor, recipe: Recipe) -> Kept:
    """What the gradient of W needs of dy."""
    if multiplies_codes(recipe, grad_RO.device):
        columns: Kept = codes_of(recipe).quantize_rows(grad_RO, columns=True, gradient=True)[1]
        return columns
    made = emulated.quantize_gradient_columns(grad_RO, recipe)
    return made.codes, made.scales, made.whole


def weight_gradient(
    grad: Kept, x: Kept, rows: int, dtype: torch.dtype, recipe: Recipe, total: GradientSum | None
) -> Tensor | None:
    """dy^T x over `rows` tokens, [O, I] in `dtype`, from what was kept of both; None if it lands in `total`."""
    assert grad[0] is not None and grad[1] is not None and x[0] is not None and x[1] is not None
    if multiplies_codes(recipe, grad[0].device):
        found: Tensor | None = codes_of(recipe).weight_gradient(grad, x, rows, dtype, total)
        return found
    left = Quantized.of_rows(recipe.name, grad[0], grad[1], *grad[2:])
    product = emulated.multiply(left, Quantized.of_rows(recipe.name, x[0], x[1], *x[2:]))
    if total is not None:
        accumulate_product(total, product)
        return None
    return product.to(dtype)
