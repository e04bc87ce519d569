"""Matrix products on this machine: the dtype in which they run, and products of very few rows.

Projections, attention, decay scans, experts and the head ask here, so that one rule decides for all of them. oneMKL multiplies
one to three rows by another routine, which adds up in another order: a token's result would then depend, in its last bit, on how
many tokens of other documents chose its expert.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

# Asked once: torch.compile cannot look into the question, and would cut a block's graph at every product.
_MULTIPLIES_BF16 = torch.cpu._is_avx512_bf16_supported()


def gemm_dtype(tensor: Tensor) -> torch.dtype:
    """Dtype for the operands of matrix products on `tensor`: its own where the machine multiplies it natively, else float32.

    Processors without AVX512-BF16 or AMX emulate bfloat16 products, ten times slower than float32 (8 against 81 GFLOP/s
    on one Zen 3 core at 4096 x 256 x 512), so there the operands are widened, which also rounds less.
    """
    if tensor.dtype in (torch.float32, torch.float64) or tensor.device.type != "cpu":
        return tensor.dtype
    if tensor.dtype == torch.bfloat16 and _MULTIPLIES_BF16:
        return tensor.dtype
    return torch.float32


STEADY_ROWS = 4  # from here on a row of a product does not depend on how many others there are


def steady_product(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """left [M, K] @ right [K, N], into `out` if there is one; very few rows as part of a larger product."""
    rows = len(left)
    if rows >= STEADY_ROWS:
        return torch.mm(left, right, out=out)
    product = torch.mm(functional.pad(left, (0, 0, 0, STEADY_ROWS - rows)), right)[:rows]
    return product if out is None else out.copy_(product)
