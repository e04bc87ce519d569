"""Causal depthwise convolution with SiLU as W shifted multiply-adds over whole rows, with a hand-written backward."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def convolve(x_BTC: Tensor, weight_CW: Tensor, bias_C: Tensor | None, document_ids_BT: Tensor | None) -> Tensor:
    """Convolution of rows with nothing before them. Under torch.compile the plain composition runs, which fuses."""
    if torch.compiler.is_compiling():
        return compose_convolution(x_BTC, weight_CW, bias_C, document_ids_BT)
    return _Convolution.apply(x_BTC, weight_CW, bias_C, document_ids_BT)


def compose_convolution(
    x_BTC: Tensor, weight_CW: Tensor, bias_C: Tensor | None, document_ids_BT: Tensor | None
) -> Tensor:
    """The same as a plain composition of differentiable operations, for the compiler."""
    wide = _wide(x_BTC)
    x = x_BTC.to(wide)
    T, W = x.shape[1], weight_CW.shape[1]
    total = x * weight_CW[:, W - 1].to(wide)
    if bias_C is not None:
        total = total + bias_C.to(wide)
    for shift in range(1, min(W, T)):
        source = x[:, : T - shift]
        if document_ids_BT is not None:
            source = source * _same_document(document_ids_BT, shift, wide)
        total = total + F.pad(source * weight_CW[:, W - 1 - shift].to(wide), (0, 0, shift, 0))
    return F.silu(total).to(x_BTC.dtype)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _same_document(document_ids_BT: Tensor, shift: int, dtype: torch.dtype) -> Tensor:
    """1 where token t + shift lies in the document of token t, 0 elsewhere, [B, T - shift, 1]."""
    return (document_ids_BT[:, shift:] == document_ids_BT[:, :-shift]).to(dtype).unsqueeze(-1)


class _Convolution(torch.autograd.Function):
    """Saves x and the sum before SiLU (float32): one more activation, so that backward does not convolve again.

    Works a row at a time with one scratch row, because fresh memory costs more than the arithmetic.
    """

    @staticmethod
    def forward(
        ctx: Any, x_BTC: Tensor, weight_CW: Tensor, bias_C: Tensor | None, document_ids_BT: Tensor | None
    ) -> Tensor:
        wide = _wide(x_BTC)
        B, T, C = x_BTC.shape
        W = weight_CW.shape[1]
        # One contiguous row of weights a tap: strided weights make the multiply-adds four times slower.
        taps = weight_CW.to(wide).t().contiguous()
        start = torch.zeros_like(taps[0]) if bias_C is None else bias_C.to(wide)
        masks = _masks(document_ids_BT, min(W, T), wide)
        totals = torch.empty(B, T, C, dtype=wide, device=x_BTC.device)
        scratch = totals.new_empty(T, C)
        for row in range(B):
            x, total = x_BTC[row].to(wide), totals[row]
            torch.addcmul(start, x, taps[W - 1], out=total)
            for shift in range(1, min(W, T)):
                source = x[: T - shift]
                if masks is not None:
                    source = torch.mul(source, masks[shift - 1][row], out=scratch[: T - shift])
                total[shift:].addcmul_(source, taps[W - 1 - shift])
        ctx.save_for_backward(x_BTC, weight_CW, bias_C, document_ids_BT, totals)
        return F.silu(totals).to(x_BTC.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BTC: Tensor) -> tuple[Tensor | None, ...]:
        x_BTC, weight_CW, bias_C, document_ids_BT, totals = ctx.saved_tensors
        wide = totals.dtype
        B, T, C = x_BTC.shape
        W = weight_CW.shape[1]
        taps = weight_CW.to(wide).t().contiguous()
        masks = _masks(document_ids_BT, min(W, T), wide)
        dx_BTC = torch.empty_like(totals)
        d_taps = torch.zeros_like(taps)
        d_bias = torch.zeros_like(taps[0])
        scratch = totals.new_empty(T, C)
        for row in range(B):
            x, dx = x_BTC[row].to(wide), dx_BTC[row]
            d_total = torch.ops.aten.silu_backward(dy_BTC[row].to(wide), totals[row])
            torch.mul(d_total, taps[W - 1], out=dx)
            d_bias += d_total.sum(0)
            d_taps[W - 1] += torch.mul(d_total, x, out=scratch).sum(0)
            for shift in range(1, min(W, T)):
                reaching, product = d_total[shift:], scratch[: T - shift]
                if masks is not None:
                    reaching = torch.mul(reaching, masks[shift - 1][row], out=product)
                dx[: T - shift].addcmul_(reaching, taps[W - 1 - shift])
                d_taps[W - 1 - shift] += torch.mul(reaching, x[: T - shift], out=product).sum(0)
        d_weight = d_taps.t().to(weight_CW.dtype)
        return dx_BTC.to(x_BTC.dtype), d_weight, None if bias_C is None else d_bias.to(bias_C.dtype), None


def _masks(document_ids_BT: Tensor | None, shifts: int, dtype: torch.dtype) -> list[Tensor] | None:
    """`_same_document` for the shifts from 1 on; None where every row holds one document."""
    if document_ids_BT is None:
        return None
    return [_same_document(document_ids_BT, shift, dtype) for shift in range(1, shifts)]
