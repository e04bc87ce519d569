"""Causal depthwise convolution with SiLU as W shifted multiply-adds over blocks of tokens, with a hand-written backward."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.shapes import drop_single_document

# Numbers of a block: enough that a call costs little beside its work, few enough to stay in the cache.
_NUMBERS = 1 << 16


def convolve(x_BTC: Tensor, weight_CW: Tensor, bias_C: Tensor | None, document_ids_BT: Tensor | None) -> Tensor:
    """Convolution of rows with nothing before them; one operation for the compiler, whose own fusion is slower."""
    return _forward(x_BTC, weight_CW, bias_C, document_ids_BT)[0]


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


@torch.library.custom_op("amfm::causal_conv1d_torch", mutates_args=())
def _forward(
    x_BTC: Tensor, weight_CW: Tensor, bias_C: Tensor | None, document_ids_BT: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Output, and the sums before SiLU (float32): one more activation, so that backward does not convolve again.

    Goes through rows block by block: a temporary as long as a row would be fresh memory, whose pages cost more than the
    arithmetic, and would have left the cache by the next tap.
    """
    wide = _wide(x_BTC)
    W = weight_CW.shape[1]
    # One contiguous row of weights a tap: strided weights make the multiply-adds four times slower.
    taps = weight_CW.to(wide).t().contiguous()
    start = torch.zeros_like(taps[0]) if bias_C is None else bias_C.to(wide)
    totals = x_BTC.new_empty(x_BTC.shape, dtype=wide)
    y_BTC = x_BTC.new_empty(x_BTC.shape)
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
    return y_BTC, totals


@_forward.register_fake
def _(x_BTC: Tensor, weight_CW: Tensor, bias_C: Tensor | None, document_ids_BT: Tensor | None) -> tuple[Tensor, Tensor]:
    return x_BTC.new_empty(x_BTC.shape), x_BTC.new_empty(x_BTC.shape, dtype=_wide(x_BTC))


@torch.library.custom_op("amfm::causal_conv1d_torch_backward", mutates_args=())
def _backward(
    dy_BTC: Tensor, x_BTC: Tensor, weight_CW: Tensor, bias_C: Tensor | None, document_ids_BT: Tensor | None,
    totals: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, of the weight and of a bias."""
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
    d_weight = d_taps.t().contiguous().to(weight_CW.dtype)
    return dx_BTC.to(x_BTC.dtype), d_weight, d_bias.to(weight_CW.dtype if bias_C is None else bias_C.dtype)


@_backward.register_fake
def _(
    dy_BTC: Tensor, x_BTC: Tensor, weight_CW: Tensor, bias_C: Tensor | None, document_ids_BT: Tensor | None,
    totals: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    d_bias = (weight_CW if bias_C is None else bias_C).new_empty(weight_CW.shape[:1])
    return x_BTC.new_empty(x_BTC.shape), weight_CW.new_empty(weight_CW.shape), d_bias


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.has_bias = inputs[2] is not None
    ctx.save_for_backward(*inputs, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dy_BTC: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if dy_BTC is None:
        return None, None, None, None
    dx_BTC, d_weight, d_bias = _backward(dy_BTC, *ctx.saved_tensors)
    return dx_BTC, d_weight, d_bias if ctx.has_bias else None, None


_forward.register_autograd(_differentiate, setup_context=_save)
