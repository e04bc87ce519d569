"""The gradient of a weight [O, I] from wide operands, as a separate tensor or in its sum
(kernels/common/weight_gradients.py).
"""

from __future__ import annotations

from torch import Tensor

from amfm.kernels.common.gemm_precision import gemm_dtype
from amfm.kernels.common.weight_gradients import GradientSum, add_outer


def weight_gradient(x: Tensor, weight_OI: Tensor, grad: Tensor, total: GradientSum | None) -> Tensor | None:
    """grad^T x over all tokens of grad [..., O] and x [..., I], or None if it was added to `total`."""
    if total is not None:
        place, adds = total.take()
        add_outer(place, adds, grad.flatten(0, -2), x.flatten(0, -2))
        return None
    dtype = gemm_dtype(x)
    product: Tensor = grad.flatten(0, -2).to(dtype).t() @ x.flatten(0, -2).to(dtype)
    return product.to(weight_OI.dtype)
