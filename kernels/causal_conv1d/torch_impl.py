"""Causal depthwise convolution, with SiLU or without, as one convolution of PyTorch's, with a hand-written backward.

oneDNN convolves rows whose channels are together in one pass, at a tenth of what W multiply-adds cost; what it knows
nothing of, documents and the gradient of the weight, is done here.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from amfm.kernels.common.custom_op import differentiate, fake_of
from amfm.kernels.common.inputs import drop_single_document

# Numbers of a block of `_correlate`: enough that a call costs little compared with its work, few enough to stay in the
# cache.
_NUMBERS = 1 << 18


def convolve(
    x_BTC: Tensor, weight_CW: Tensor, bias_C: Tensor | None, document_ids_BT: Tensor | None, silu: bool = True
) -> Tensor:
    """Convolution of rows with nothing before them; one operation for the compiler, whose own fusion is slower.

    x [B, T, C] -> [B, T, C] in its dtype; sums are float32 (float64 for float64).
    """
    return _forward(x_BTC, weight_CW, bias_C, document_ids_BT, silu)[0]


def _wide(x: Tensor) -> torch.dtype:
    """Dtype of sums: float32, or float64 for float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _slide(x_BTC: Tensor, weight_CW: Tensor, bias_C: Tensor | None, *, num_zeros: int = 0) -> Tensor:
    """bias + sum_w weight[:, w] x_(t+w) at each of the places where a window fits into a row with zeros on both sides.

    [B, T + 2 num_zeros - W + 1, C]
    """
    B, T, C = x_BTC.shape
    W = weight_CW.shape[1]
    if x_BTC.device.type == "cpu" and x_BTC.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        image_BC1T = x_BTC.reshape(B, 1, T, C).permute(0, 3, 1, 2)  # in memory as it was: "channels last"
        weight_C11W = weight_CW.reshape(C, 1, 1, W)
        # By its own name: conv2d keeps small images from oneDNN, channel by channel and rounded otherwise.
        out_BC1P = torch.ops.aten.mkldnn_convolution(image_BC1T, weight_C11W, bias_C, [0, num_zeros], [1, 1], [1, 1], C)
        return out_BC1P.permute(0, 2, 3, 1).reshape(B, -1, C)
    x_BTC = F.pad(x_BTC, (0, 0, num_zeros, num_zeros))
    places = x_BTC.shape[1] - W + 1
    # One contiguous row of weights a tap: strided weights make the multiply-adds four times slower.
    taps = weight_CW.t().contiguous()
    start = torch.zeros_like(taps[0]) if bias_C is None else bias_C
    out_BPC = torch.addcmul(start, x_BTC[:, W - 1 :], taps[W - 1])
    for place in range(W - 1):
        out_BPC.addcmul_(x_BTC[:, place : place + places], taps[place])
    return out_BPC


def _repair_edges(
    out_BTC: Tensor, x_BTC: Tensor, weight_CW: Tensor, bias_C: Tensor | None, document_ids_BT: Tensor, step: int
) -> None:
    """Make again, only from their own documents, the sums of tokens whose window reaches into another document.

    step: -1 where a token's window is before it, 1 where it is after it; the weight's last column meets the token.
    """
    T, W = document_ids_BT.shape[1], weight_CW.shape[1]
    crossing_BT = torch.zeros_like(document_ids_BT, dtype=torch.bool)
    for shift in range(1, min(W, T)):
        token = slice(shift, None) if step < 0 else slice(None, -shift)
        crossing_BT[:, token] |= document_ids_BT[:, shift:] != document_ids_BT[:, :-shift]
    # Only the W - 1 tokens around a boundary are made again, a vanishing share of a row.
    row_N, token_N = crossing_BT.nonzero(as_tuple=True)
    document_N = document_ids_BT[row_N, token_N]
    total_NC = torch.zeros_like(out_BTC[row_N, token_N]) if bias_C is None else bias_C.expand(len(row_N), -1)
    for shift in range(W):
        place_N = token_N + step * shift
        read_N = place_N.clamp(0, T - 1)
        own_N = (place_N == read_N) & (document_ids_BT[row_N, read_N] == document_N)
        source_NC = x_BTC[row_N, read_N].to(out_BTC.dtype).masked_fill(~own_N.unsqueeze(-1), 0)
        total_NC = torch.addcmul(total_NC, source_NC, weight_CW[:, W - 1 - shift])
    out_BTC[row_N, token_N] = total_NC


def _correlate(d_padded_BSC: Tensor, x_BTC: Tensor, W: int, document_ids_BT: Tensor | None) -> Tensor:
    """Gradient of the weight [C, W]: sums over tokens of d_(t+s) x_t, s = W - 1 for the first column.

    Blocks add to one block of products a tap, which is summed at the end: half the passes of sums block by block.
    """
    B, T, C = x_BTC.shape
    numbers = _NUMBERS if x_BTC.device.type == "cpu" else x_BTC.numel()
    tokens, rows = max(1, min(T, numbers // C)), max(1, min(B, numbers // (T * C)))
    # [W, rows, tokens, C]: one running product for each tap.
    products = d_padded_BSC.new_zeros(W, rows, tokens, C)
    for row, start in product(range(0, B, rows), range(0, T, tokens)):
        own = slice(row, min(row + rows, B))
        x = x_BTC[own, start : start + tokens].to(d_padded_BSC.dtype)
        ids_BT = None if document_ids_BT is None else document_ids_BT[own, start : start + tokens + W - 1]
        ids_BT = drop_single_document(ids_BT)
        for shift in range(min(W, T - start)):
            num_tokens = min(tokens, T - start - shift)
            d_reader, read = d_padded_BSC[own, start + shift : start + shift + num_tokens], x[:, :num_tokens]
            if ids_BT is not None and shift:
                same_BT = ids_BT[:, shift : shift + num_tokens] == ids_BT[:, :num_tokens]
                read = read * same_BT.unsqueeze(-1)
            products[W - 1 - shift, : len(read), :num_tokens].addcmul_(d_reader, read)
    return products.flatten(1, 2).sum(1).t().contiguous()


@torch.library.custom_op("amfm::causal_conv1d_torch", mutates_args=())
def _forward(
    x_BTC: Tensor, weight_CW: Tensor, bias_C: Tensor | None, document_ids_BT: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    """Output, and the sums before SiLU (float32): one more activation, so that backward does not convolve again.

    The sums have W - 1 places more than a row; those after its end belong to no token. Without SiLU they are empty.
    """
    T, W, wide = x_BTC.shape[1], weight_CW.shape[1], _wide(x_BTC)
    weight, bias = weight_CW.to(wide), None if bias_C is None else bias_C.to(wide)
    longer = _slide(x_BTC.to(wide), weight, bias, num_zeros=W - 1)
    totals = longer[:, :T]
    if document_ids_BT is not None:
        _repair_edges(totals, x_BTC, weight, bias, document_ids_BT, step=-1)
    y_BTC = x_BTC.new_empty(x_BTC.shape)
    if not silu:
        return y_BTC.copy_(totals), longer.new_empty(0)
    if x_BTC.dtype == wide:
        torch.ops.aten.silu.out(totals, out=y_BTC)
    else:
        y_BTC.copy_(F.silu(totals))
    return y_BTC, longer


@fake_of(_forward)
def _(given: Any) -> tuple[Tensor, ...]:
    x, W = given.x_BTC, given.weight_CW.shape[1]
    B, T, C = x.shape
    kept = (B, T + W - 1, C) if given.silu else (0,)
    return x.new_empty(x.shape), x.new_empty(kept, dtype=_wide(x))


@torch.library.custom_op("amfm::causal_conv1d_torch_backward", mutates_args=())
def _backward(
    d_y: Tensor, x_BTC: Tensor, weight_CW: Tensor, bias_C: Tensor | None, document_ids_BT: Tensor | None,
    silu: bool, longer: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, of the weight and of a bias."""
    T, W, wide = x_BTC.shape[1], weight_CW.shape[1], longer.dtype
    weight = weight_CW.to(wide)
    padded = longer.new_empty(len(x_BTC), T + W - 1, x_BTC.shape[2])
    padded[:, T:] = 0
    if silu:
        d_totals = torch.ops.aten.silu_backward.grad_input(d_y.to(wide), longer[:, :T], grad_input=padded[:, :T])
    else:
        d_totals = padded[:, :T].copy_(d_y)
    # The gradient of a convolution is one with the taps in reverse order, over the tokens after instead of
    # before.
    dx_BTC = _slide(padded, weight.flip(1), None)
    if document_ids_BT is not None:
        _repair_edges(dx_BTC, d_totals, weight, None, document_ids_BT, step=1)
    d_weight = _correlate(padded, x_BTC, W, document_ids_BT).to(weight_CW.dtype)
    d_bias = x_BTC.new_empty(0) if bias_C is None else padded.flatten(0, 1).sum(0).to(bias_C.dtype)
    return dx_BTC.to(x_BTC.dtype), d_weight, d_bias


differentiate(_forward, _backward, outputs=("y", "longer"), gradients=("x_BTC", "weight_CW", "bias_C"))
