"""Causal depthwise convolution with SiLU as W shifted multiply-adds over blocks of tokens, with a hand-written backward."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.shapes import drop_single_document

# Numbers of a block: enough that a call costs little beside its work, few enough to stay in the cache.
_NUMBERS = 1 << 16


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


class _Block(NamedTuple):
    """Some tokens of a row, or some whole rows: what is computed at once."""

    rows: slice
    start: int
    end: int

    def own(self, x_BT: Tensor) -> Tensor:
        """The block of a tensor of rows."""
        return x_BT[self.rows, self.start : self.end]

    def inputs(self, x_BTC: Tensor, W: int, dtype: torch.dtype) -> tuple[Tensor, int]:
        """What the block reads, in this dtype once for all taps, and where in the row that begins."""
        first = max(0, self.start - W + 1)
        return x_BTC[self.rows, first : self.end].to(dtype), first

    def documents(self, document_ids_BT: Tensor | None, W: int) -> Tensor | None:
        """The ids of whole rows; None where all that the block reads is known to be of one document."""
        if document_ids_BT is None:
            return None
        read_BT = document_ids_BT[self.rows, max(0, self.start - W + 1) : self.end]
        return None if drop_single_document(read_BT) is None else document_ids_BT

    def shifts(self, W: int) -> Iterator[tuple[int, slice, slice]]:
        """Each shift with the tokens of the row that read so far back, and those that they read."""
        for shift in range(1, min(W, self.end)):
            first = max(self.start, shift)
            yield shift, slice(first, self.end), slice(first - shift, self.end - shift)


def _cut_blocks(x_BTC: Tensor) -> list[_Block]:
    """Blocks of about `_NUMBERS` numbers, in order; one of all rows where the device is no processor with a cache."""
    B, T, C = x_BTC.shape
    numbers = _NUMBERS if x_BTC.device.type == "cpu" else x_BTC.numel()
    tokens, rows = max(1, min(T, numbers // C)), max(1, min(B, numbers // (T * C)))
    return [
        _Block(slice(row, min(row + rows, B)), start, min(start + tokens, T))
        for row in range(0, B, rows)
        for start in range(0, T, tokens)
    ]


class _Convolution(torch.autograd.Function):
    """Saves x and the sum before SiLU (float32): one more activation, so that backward does not convolve again.

    Goes through rows block by block: a temporary as long as a row would be fresh memory, whose pages cost more than the
    arithmetic, and would have left the cache by the next tap.
    """

    @staticmethod
    def forward(
        ctx: Any, x_BTC: Tensor, weight_CW: Tensor, bias_C: Tensor | None, document_ids_BT: Tensor | None
    ) -> Tensor:
        wide = _wide(x_BTC)
        W = weight_CW.shape[1]
        # One contiguous row of weights a tap: strided weights make the multiply-adds four times slower.
        taps = weight_CW.to(wide).t().contiguous()
        start = torch.zeros_like(taps[0]) if bias_C is None else bias_C.to(wide)
        totals = torch.empty(x_BTC.shape, dtype=wide, device=x_BTC.device)
        y_BTC = torch.empty_like(totals, dtype=x_BTC.dtype)
        for block in _cut_blocks(x_BTC):
            ids_BT = block.documents(document_ids_BT, W)
            x, first = block.inputs(x_BTC, W, wide)
            total = torch.addcmul(start, x[:, block.start - first :], taps[W - 1], out=block.own(totals))
            for shift, reading, read in block.shifts(W):
                source = x[:, read.start - first : read.stop - first]
                if ids_BT is not None:
                    source = source * _same_document(ids_BT[block.rows, read.start : reading.stop], shift, wide)
                totals[block.rows, reading].addcmul_(source, taps[W - 1 - shift])
            block.own(y_BTC).copy_(F.silu(total))
        ctx.save_for_backward(x_BTC, weight_CW, bias_C, document_ids_BT, totals)
        return y_BTC

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BTC: Tensor) -> tuple[Tensor | None, ...]:
        x_BTC, weight_CW, bias_C, document_ids_BT, totals = ctx.saved_tensors
        wide = totals.dtype
        W = weight_CW.shape[1]
        taps = weight_CW.to(wide).t().contiguous()
        dx_BTC = torch.empty_like(totals)
        d_taps = torch.zeros_like(taps)
        d_bias = torch.zeros_like(taps[0])
        for block in _cut_blocks(x_BTC):
            ids_BT = block.documents(document_ids_BT, W)
            x, first = block.inputs(x_BTC, W, wide)
            d_total = torch.ops.aten.silu_backward(block.own(dy_BTC).to(wide), block.own(totals))
            torch.mul(d_total, taps[W - 1], out=block.own(dx_BTC))
            if bias_C is not None:
                d_bias += d_total.sum((0, 1))
            d_taps[W - 1] += (d_total * x[:, block.start - first :]).sum((0, 1))
            for shift, reading, read in block.shifts(W):
                # What was read may lie in the block before, which has its own part by now.
                d_reading = d_total[:, reading.start - block.start :]
                if ids_BT is not None:
                    d_reading = d_reading * _same_document(ids_BT[block.rows, read.start : reading.stop], shift, wide)
                dx_BTC[block.rows, read].addcmul_(d_reading, taps[W - 1 - shift])
                d_taps[W - 1 - shift] += (d_reading * x[:, read.start - first : read.stop - first]).sum((0, 1))
        d_weight = d_taps.t().to(weight_CW.dtype)
        return dx_BTC.to(x_BTC.dtype), d_weight, None if bias_C is None else d_bias.to(bias_C.dtype), None
