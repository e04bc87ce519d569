"""fp8_block's products of whole matrices by cuBLASLt on Hopper, of the codes that our kernels make.

torch's `scaled_mm` takes scales of 1 x 128 and of 128 x 128 with CUDA 12.9, on compute capability 9.0 and no other. For A [M, K] times
the transpose of B [N, K] it wants float32 scales with these strides (cuBLAS, "Scaling factors layouts"; pytorch#166752):

    of A and B by row          [M, blocks of K], strides (1, M), M a multiple of 4
    of B by blocks of a weight [blocks of K filled up to 4, blocks of N], strides (1, that many)

Scales of rows are stored so here, those of a weight lack the filling. Codes along columns are stored tile by tile, and are copied into
one matrix, 2 bytes per code.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from amfm.kernels.common.weight_gradients import GradientSum
from amfm.kernels.runtime.compiling import assume_constant
from amfm.kernels.runtime.product_backend import chooses_torch

RUN, BLOCKS, ROWS = 128, 4, 4  # of a scale; what cuBLASLt wants multiples of
# A sum to which it adds begins at a multiple of this; our sums are end to end, so any may begin elsewhere.
PLACE_BYTES = 16
FIRST_CUDA = (12, 9)


@assume_constant
def multiplies_by_library(device: torch.device, inner: int) -> bool:
    """Whether cuBLASLt multiplies such codes here: by `kernels.experts`, or where it was verified and faster on this GPU.

    inner: numbers that a product sums over; cuBLASLt gets whole blocks of them, and others stay ours. Raises ValueError if it was told
    to and this GPU or torch has no such products.
    """
    if device.type == "meta" or inner % RUN:  # a plan sees our kernels
        return False
    needs = f"compute capability 9 and torch 2.15 for CUDA {FIRST_CUDA[0]}.{FIRST_CUDA[1]} with low_precision.recipe=fp8_block"
    return chooses_torch("fp8_block", (), device, "" if takes_codes(device) else needs)


def takes_codes(device: torch.device) -> bool:
    """Whether this GPU and this release of torch have products with scales of blocks of 128."""
    cuda = tuple(map(int, (torch.version.cuda or "0").split(".")[:2]))
    is_known = cuda >= FIRST_CUDA and hasattr(functional, "scaled_addmm_")
    return is_known and device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def multiply(left: Tensor, left_scales: Tensor, right: Tensor, right_scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of codes [S, K] times the transpose of a weight's [1, N, K]: [S, N] in `dtype`; scales as `triton_impl` has them."""
    rows, missing = len(left), -len(left) % ROWS
    if missing:
        left, left_scales = functional.pad(left, (0, 0, 0, missing)), functional.pad(left_scales, (0, missing))
    filled = functional.pad(right_scales[0], (0, -right_scales.shape[-1] % BLOCKS))
    kind = functional.ScalingType.BlockWise128x128
    given = _arguments((left, left_scales), (right[0], filled), kind)
    return functional.scaled_mm(**given, output_dtype=dtype)[:rows]


def multiply_outer(
    left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor], rows: int, dtype: torch.dtype, total: GradientSum | None
) -> Tensor | None:
    """left^T right of `rows` rows as column codes [tiles, N, 128] and [tiles, K, 128]: [N, K] in `dtype`; None if it lands in `total`.

    There may be more tiles than rows need, in which nothing was written.
    """
    tiles = -(-rows // RUN)
    sides = [(codes[:tiles].transpose(0, 1).flatten(1), scales[:tiles]) for codes, scales in (left, right)]
    given = _arguments(sides[0], sides[1], functional.ScalingType.BlockWise1x128)
    if total is None:
        return functional.scaled_mm(**given, output_dtype=dtype)
    place, adds = total.take()
    place = place.view(len(sides[0][0]), -1)
    if int(place.storage_offset()) * place.element_size() % PLACE_BYTES:
        made = functional.scaled_mm(**given, output_dtype=place.dtype)
        place.copy_(place + made if adds else made)
        return None
    matrices = {"mat1": given.pop("mat_a"), "mat2": given.pop("mat_b")}
    functional.scaled_addmm_(place, **matrices, **given, beta=float(adds))
    return None


def _arguments(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor], kind: Any) -> dict[str, Any]:
    """What torch's scaled products take of codes and of scales whose rows are blocks of the sum; `kind`: of the right ones.

    A weight's scales come as blocks of rows instead, which is the layout that is asked for.
    """
    e4m3, by_row = torch.float8_e4m3fn, functional.ScalingType.BlockWise1x128
    return {
        "mat_a": left[0].view(e4m3),
        "mat_b": right[0].view(e4m3).t(),
        "scale_a": left[1].t(),
        "scale_recipe_a": by_row,
        "scale_b": right[1].t(),
        "scale_recipe_b": kind,
    }
