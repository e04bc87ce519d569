"""Products of a few rows that do not depend on how many others there are.

oneMKL multiplies one to three rows by another routine, which adds up in another order. A token's result would then depend, in its
last bit, on how many tokens of other documents chose its expert.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

STEADY_ROWS = 4  # from here on a row of a product does not depend on how many others there are


def steady_product(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """left [M, K] @ right [K, N], into `out` where there is one; very few rows as part of a larger product."""
    rows = len(left)
    if rows >= STEADY_ROWS:
        return torch.mm(left, right, out=out)
    product = torch.mm(functional.pad(left, (0, 0, 0, STEADY_ROWS - rows)), right)[:rows]
    return product if out is None else out.copy_(product)
