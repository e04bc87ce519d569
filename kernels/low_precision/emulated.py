"""The three products of a weight with quantised operands, decoded and multiplied wide: on any device, and what kernels
are compared with.

Each operand is quantised along the dimension that the product sums over, from the wide numbers, never from codes:

    y  = x W^T      x in runs along the inputs,    W along the inputs
    dx = dy W       dy in runs along the outputs,  W^T along the outputs
    dW = dy^T x     both in runs along the tokens

nvfp4 rounds gradients at random, and turns both operands of dW by a Hadamard matrix along the tokens. A weight whose blocks are
square has the same numbers in both directions. Codes times their blocks' scales are bfloat16 exactly, so what differs from
tensor cores is the order of sums.
"""

from __future__ import annotations

import torch
from torch import Tensor

from amfm.kernels.common.gemm_precision import gemm_dtype, steady_product
from amfm.kernels.low_precision.formats import TURNED, Quantized, draw_noise, quantize, turn
from amfm.kernels.low_precision.recipe import Recipe, made_once, note_operands

# By which the roundings of one gradient for its two products are drawn apart.
INPUT_DRAW, WEIGHT_DRAW = 1, 2


def output(x_RI: Tensor, weight_OI: Tensor, recipe: Recipe) -> Tensor:
    """x W^T, [R, O] float32."""
    note_operands(recipe, input=x_RI, weight=weight_OI)
    return multiply(quantize(x_RI, recipe.name), _quantize_weight(weight_OI, recipe, transposed=False))


def input_gradient(grad_RO: Tensor, weight_OI: Tensor, recipe: Recipe) -> Tensor:
    """dy W, [R, I] float32."""
    note_operands(recipe, gradient=grad_RO)
    noise = draw_noise(grad_RO, recipe.seed, INPUT_DRAW) if recipe.name == "nvfp4" else None
    rows = quantize(grad_RO, recipe.name, noise=noise)
    return multiply(rows, _quantize_weight(weight_OI, recipe, transposed=True))


def _quantize_weight(weight_OI: Tensor, recipe: Recipe, *, transposed: bool) -> Quantized:
    """The weight, or its transpose, in a weight's blocks."""
    return made_once(
        weight_OI,
        f"{recipe.name} {transposed}",
        lambda: quantize(weight_OI.t() if transposed else weight_OI, recipe.name, weight=True),
    )


def weight_gradient(grad_RO: Tensor, columns: Quantized, recipe: Recipe) -> Tensor:
    """dy^T x, [O, I] float32, from what `quantize_columns` gives of x."""
    return multiply(quantize_gradient_columns(grad_RO, recipe), columns)


def quantize_gradient_columns(grad_RO: Tensor, recipe: Recipe) -> Quantized:
    """The transpose [O, R] of dy in runs along the tokens."""
    if recipe.name != "nvfp4":
        return quantize_columns(grad_RO, recipe)
    rows = -(-len(grad_RO) // TURNED) * TURNED
    return quantize_columns(grad_RO, recipe, noise=draw_noise(grad_RO, recipe.seed, WEIGHT_DRAW, rows).t())


def quantize_columns(x_RI: Tensor, recipe: Recipe, *, noise: Tensor | None = None) -> Quantized:
    """The transpose [I, R] of rows in runs along them: all that the weight's gradient needs of them."""
    columns = turn(x_RI.t(), recipe.seed) if recipe.name == "nvfp4" else x_RI.t()
    return quantize(columns, recipe.name, noise=noise)


def multiply(left: Quantized, right: Quantized) -> Tensor:
    """left [M, K] times the transpose of right [N, K]: [M, N] float32, sums in float32.

    On a CPU an expert's rows are what they are, however many rows of zeros a layout puts after them.
    """
    a, b = (_to_product(operand.decode()) for operand in (left, right))
    is_wide = a.dtype == torch.float32
    product = steady_product(a, b.t()) if is_wide else torch.mm(a, b.t(), out_dtype=torch.float32)
    for operand in (left, right):
        if operand.whole is not None:
            product.mul_(operand.whole)
    return product


def _to_product(numbers: Tensor) -> Tensor:
    """Decoded numbers as this machine multiplies them: bfloat16 on a GPU, where its sums are float32."""
    return numbers.bfloat16() if numbers.device.type == "cuda" else numbers.to(gemm_dtype(numbers))
