"""The dtype in which matrix products run on this machine.

Projections, attention, decay scans, experts and the head ask here, so that one rule decides for all of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Asked once: torch.compile can't look into the question, and would cut a block's graph at every product.
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
