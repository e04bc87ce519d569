"""Tensors that an operation is given: checked, and packed where its kernel needs it.

A wrong shape, dtype or device is a ValueError, never a wrong number. Checks of shape and dtype read metadata only, so they cost
nothing on a device. Values are looked at only on CPU.

Inputs are often slices of one wide projection. Kernels take such slices as they are, with the strides of the outer
dimensions, and only what does not fit is copied.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def agreed(*sizes: tuple[int, ...]) -> tuple[int, ...]:
    """The sizes that two of several tensors have, so that the odd one is named where they differ; of none, the first's."""
    for place, one in enumerate(sizes):
        if one in sizes[place + 1 :]:
            return one
    return sizes[0]


def check_shape(
    name: str, tensor: Tensor, expected: tuple[int, ...], like: Tensor | None = None, fits: str = ""
) -> None:
    """Raise ValueError unless `tensor` has the expected shape (-1 allows any size) and is on the device of `like`.

    The message names the argument with its shape letters, the expected sizes and those it got; fits: the argument that
    some of the expected sizes are from, which may be the wrong one of the two.
    """
    shape = tuple(tensor.shape)
    if len(shape) != len(expected) or any(want not in (-1, got) for want, got in zip(expected, shape)):
        wanted = ", ".join("any" if size == -1 else str(size) for size in expected)
        raise ValueError(
            f"{name} must have shape [{wanted}]; got {list(shape)}{f', which does not fit {fits}' if fits else ''}"
        )
    if like is not None and tensor.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, with the other inputs; got {tensor.device}")


def check_float(name: str, tensor: Tensor, like: Tensor | None = None) -> None:
    """Raise ValueError unless `tensor` is floating point, and of the dtype of `like` where that is given."""
    if like is not None and tensor.dtype != like.dtype:
        raise ValueError(f"{name} must be {like.dtype}, as the first input is; got {tensor.dtype}")
    if tensor.dtype not in FLOATS:
        raise ValueError(f"{name} must be floating point (float32, bfloat16, float16 or float64); got {tensor.dtype}")


def check_matrix(name: str, weight: Tensor) -> None:
    """Raise ValueError if a matrix of a weight [..., N, K] has 2^31 numbers: kernels compute places in one in 32 bits."""
    if weight.shape[-2:].numel() >= 2**31:
        raise ValueError(f"{name} has a matrix of {weight.shape[-2]} x {weight.shape[-1]} numbers, not below 2^31")


def check_documents(
    document_ids_BT: Tensor | None, batch: int, tokens: int, like: Tensor, *, name: str = "document_ids_BT"
) -> None:
    """Raise ValueError unless the document ids are integers of shape [B, T] on the device of `like`."""
    if document_ids_BT is None:
        return
    check_shape(name, document_ids_BT, (batch, tokens), like)
    if document_ids_BT.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} must be int32 or int64; got {document_ids_BT.dtype}")


def check_row(
    document_ids_BT: Tensor | None,
    initial_state: Tensor | None,
    state_shape: tuple[int, ...],
    chunk_size: int,
    like: Tensor,
) -> None:
    """Raise ValueError unless the rows of a scan, `like` [B, T, ...], have tokens, and documents, state and chunk size fit."""
    B, T = like.shape[:2]
    if T == 0:
        raise ValueError("a scan needs at least 1 token a row; got 0")
    check_documents(document_ids_BT, B, T, like)
    if initial_state is not None:
        check_shape("the initial state", initial_state, state_shape, like)
        check_float("the initial state", initial_state)
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1; got {chunk_size}")


def drop_single_document(document_ids_BT: Tensor | None) -> Tensor | None:
    """None if no row has a boundary, so that the form without masks runs.

    Looks at the values on CPU only, if there are any: on a GPU that would wait for the device, so callers there pass
    None themselves.
    """
    if document_ids_BT is None or document_ids_BT.device.type != "cpu" or torch.compiler.is_compiling():
        return document_ids_BT
    # A tensor without values, from tracing or memory estimates: keep the general form.
    if isinstance(document_ids_BT, FakeTensor):
        return document_ids_BT
    return document_ids_BT if bool((document_ids_BT[:, 1:] != document_ids_BT[:, :-1]).any()) else None


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
