"""Memory layout of a kernel's inputs: which dimensions must be packed, and the strides of the others.

Inputs are often slices of one wide projection. Kernels take such slices as they are, with the strides of the outer
dimensions, and only what does not fit is copied.

Document boundaries as kernels take them: where a token's document begins.
"""

from __future__ import annotations

import torch
from torch import Tensor


def first_tokens(document_ids_BT: Tensor) -> Tensor:
    """Place of the first token of each token's document, [B, T] int32: a document is a run of equal ids.

    No host synchronisation. An id that returns after another one begins a new document.
    """
    place_T = torch.arange(document_ids_BT.shape[1], device=document_ids_BT.device)
    begins_BT = torch.ones_like(document_ids_BT, dtype=torch.bool)
    begins_BT[:, 1:] = document_ids_BT[:, 1:] != document_ids_BT[:, :-1]
    return place_T.where(begins_BT, 0).cummax(1).values.to(torch.int32)


def pack_inner(x: Tensor, dims: int = 1) -> Tensor:
    """Return `x` with its last `dims` dimensions contiguous, copied only where they are not; outer ones may be apart.

    A copy costs a pass over the tensor; slices of a projection are packed in their own heads and channels and
    pass.
    """
    packed = 1
    for dim in range(x.dim() - 1, x.dim() - 1 - dims, -1):
        if x.stride(dim) != packed:
            return x.contiguous()
        packed *= x.shape[dim]
    return x


def pack_tokens(x_BTX: Tensor) -> Tensor:
    """The tensor itself if its channels are packed and its tokens one distance apart over all rows, else a copy."""
    is_even = len(x_BTX) == 1 or x_BTX.stride(0) == x_BTX.shape[1] * x_BTX.stride(1)
    return x_BTX if x_BTX.stride(2) == 1 and is_even else x_BTX.contiguous()


def stride_unit(*strides: int) -> int:
    """The largest of 16, 8, 4, 2 and 1 that divides all strides.

    Triton knows of an argument that 16 divides it, or nothing. A projection of 24 heads' dt next to its channels has
    rows that 8 divides, which is enough for loads of 16 bytes: kernels take strides in this unit and multiply.
    """
    return next(unit for unit in (16, 8, 4, 2, 1) if not any(stride % unit for stride in strides))


def outer_strides(*tensors: Tensor, dims: int = 2) -> list[int]:
    """List the strides of the first `dims` dimensions, tensor by tensor: the scalars that a launch passes on."""
    return [stride for tensor in tensors for stride in tensor.stride()[:dims]]


def pack(x: Tensor | None) -> Tensor | None:
    """As `x.contiguous()`, for a tensor that may be absent."""
    return None if x is None else x.contiguous()


def token_stride(x: Tensor, dim: int = 1) -> int:
    """The one distance of tokens over all rows of x [..., B, T, ...], `dim` being that of T.

    The stride of a dimension of one token says nothing, and views give it any number; that of rows holds then.
    """
    return x.stride(dim if x.shape[dim] > 1 else dim - 1)
