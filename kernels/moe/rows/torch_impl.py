"""Rows by choice in PyTorch: index_select forward, and sums in a fixed order and a wide dtype backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def gather_rows(x_RD: Tensor, order_S: Tensor, top_k: int) -> Tensor:
    """Gather rows [S, D] of tokens by sorted choice: row s is of token order[s] // top_k; gradients add up in float32 at least.

    A place without a choice (order R * top_k) gets some row, whose gradient goes nowhere.
    """
    rows_SD: Tensor = _GatherChoices.apply(x_RD, order_S, top_k)
    return rows_SD


def combine_rows(rows_SD: Tensor, order_S: Tensor, weights_RK: Tensor) -> Tensor:
    """Sum each token's rows, found by `order`, by weight: [R, D]; a choice without a row adds nothing."""
    y_RD: Tensor = _CombineChoices.apply(rows_SD, order_S, weights_RK)
    return y_RD


def add_rows(rows_SD: Tensor, order_S: Tensor, tokens: int, top_k: int) -> Tensor:
    """Sum each token's rows, found by `order`: [R, D]; a choice without a row adds nothing."""
    y_RD: Tensor = _AddChoices.apply(rows_SD, order_S, (tokens, top_k))
    return y_RD


def reorder_rows(rows_SD: Tensor, order_S: Tensor) -> Tensor:
    """Permute rows: rows[order], for an order that names each row once."""
    ordered_SD: Tensor = _Reorder.apply(rows_SD, order_S)
    return ordered_SD


def invert(order_S: Tensor) -> Tensor:
    """Invert a permutation; by writing, which is cheaper than sorting it."""
    return torch.empty_like(order_S).index_copy_(0, order_S, torch.arange(len(order_S), device=order_S.device))


class _GatherChoices(torch.autograd.Function):
    """index_select whose backward sums in a fixed order and a wide dtype; torch's adds up in the dtype of the rows."""

    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, order_S: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(order_S)
        ctx.shape_RK = (x_RD.shape[0], top_k)
        return x_RD.index_select(0, _tokens_of(order_S, ctx.shape_RK))

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (order_S,) = ctx.saved_tensors
        return _sum_by_token(gradients[0], order_S, None, ctx.shape_RK), None, None


class _AddChoices(torch.autograd.Function):
    """Sum of rows by token, whose backward is a read: the opposite of `_GatherChoices`."""

    @staticmethod
    def forward(ctx: Any, rows_SD: Tensor, order_S: Tensor, shape_RK: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(order_S)
        ctx.shape_RK = shape_RK
        return _sum_by_token(rows_SD, order_S, None, shape_RK)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (order_S,) = ctx.saved_tensors
        return gradients[0].index_select(0, _tokens_of(order_S, ctx.shape_RK)), None, None


class _CombineChoices(torch.autograd.Function):
    """Weighted sum of rows by token; gradients of rows and of weights are read row by row, without a scatter-add."""

    @staticmethod
    def forward(ctx: Any, rows_SD: Tensor, order_S: Tensor, weights_RK: Tensor) -> Tensor:
        ctx.save_for_backward(rows_SD, order_S, weights_RK)
        return _sum_by_token(rows_SD, order_S, weights_RK, (weights_RK.shape[0], weights_RK.shape[1]))

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        rows_SD, order_S, weights_RK = ctx.saved_tensors
        wide = torch.promote_types(rows_SD.dtype, torch.float32)
        dy_SD = gradients[0].index_select(0, _tokens_of(order_S, weights_RK.shape))
        # One more for places without a choice: weight 0, and a gradient that goes nowhere.
        weights_S = torch.cat([weights_RK.flatten(), weights_RK.new_zeros(1)]).index_select(0, order_S)
        d_rows_SD = (dy_SD * weights_S[:, None]).to(rows_SD.dtype)
        d_weights_S = torch.linalg.vecdot(dy_SD.to(wide), rows_SD.to(wide)).to(weights_RK.dtype)
        d_weights_RK = weights_RK.new_zeros(weights_RK.numel() + 1).index_copy(0, order_S, d_weights_S)
        return d_rows_SD, None, d_weights_RK[:-1].view_as(weights_RK)


class _Reorder(torch.autograd.Function):
    """Permutation whose backward is the inverse permutation: a read, where index_select's own would add into zeros."""

    @staticmethod
    def forward(ctx: Any, rows_SD: Tensor, order_S: Tensor) -> Tensor:
        ctx.save_for_backward(order_S)
        return rows_SD.index_select(0, order_S)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (order_S,) = ctx.saved_tensors
        return gradients[0].index_select(0, invert(order_S)), None


def _sum_by_token(rows_SD: Tensor, order_S: Tensor, weights_RK: Tensor | None, shape_RK: tuple[int, int]) -> Tensor:
    """Sum rows [S, D] by token -> [R, D], choice by choice in a fixed order, so that results are reproducible.

    One read of R rows a choice, in float32 at least; a lost choice reads some row with factor 0.
    """
    tokens, top_k = shape_RK
    wide = torch.promote_types(rows_SD.dtype, torch.float32)
    total_RD = torch.zeros(tokens, rows_SD.shape[1], dtype=wide, device=rows_SD.device)
    if len(rows_SD) == 0:
        return total_RD.to(rows_SD.dtype)
    row_RK = torch.full((tokens * top_k + 1,), -1, device=order_S.device)
    row_RK.index_copy_(0, order_S, torch.arange(len(order_S), device=order_S.device))
    for column, row_R in enumerate(row_RK[:-1].view(tokens, top_k).unbind(1)):
        factor_R = (row_R >= 0).to(wide)
        if weights_RK is not None:
            factor_R = factor_R * weights_RK[:, column]
        total_RD.addcmul_(rows_SD.index_select(0, row_R.clamp(min=0)).to(wide), factor_R[:, None].to(wide))
    return total_RD.to(rows_SD.dtype)


def _tokens_of(order_S: Tensor, shape_RK: Sequence[int]) -> Tensor:
    """Token of each choice; some token for a place without one."""
    return (order_S // shape_RK[1]).clamp(max=max(0, shape_RK[0] - 1))
