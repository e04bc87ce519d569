"""Expert feed-forward, one expert after the other: rows, activations and gradients of one fit a processor's cache.

Whole tensors of sorted rows would pass through memory between steps, and their pages be mapped anew each time. What is
kept: the hidden rows before the activation, in sorted order.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

STEADY_ROWS = 4  # from here on a row of a product does not depend on how many others there are


def loop_forward(
    x_RD: Tensor,
    weights_S: Tensor | None,
    token_ids_S: Tensor | None,
    offsets_E: Tensor,
    up_EFD: Tensor,
    down_EDF: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """Output rows in sorted order [S, D] and hidden rows [S, F], in the dtype of the weights."""
    rows = x_RD.shape[0] if token_ids_S is None else token_ids_S.shape[0]
    y_SD, hidden_SF = up_EFD.new_empty(rows, x_RD.shape[1]), up_EFD.new_empty(rows, up_EFD.shape[1])
    for expert, part in _experts(offsets_E):
        hidden = _multiply(_take(x_RD, token_ids_S, part, up_EFD.dtype), up_EFD[expert].T, hidden_SF[part])
        active = _activate(hidden, activation)
        if weights_S is not None:
            active.mul_(weights_S[part, None])
        _multiply(active, down_EDF[expert].T, y_SD[part])
    return y_SD, hidden_SF


def loop_backward(
    dy_RD: Tensor,
    x_RD: Tensor,
    hidden_SF: Tensor,
    weights_S: Tensor | None,
    token_ids_S: Tensor | None,
    offsets_E: Tensor,
    up_EFD: Tensor,
    down_EDF: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x in sorted order [S, D], of weights [S] (empty without them), of up and of down."""
    dtype = up_EFD.dtype
    wide = torch.promote_types(dtype, torch.float32)
    dx_SD = up_EFD.new_empty(hidden_SF.shape[0], x_RD.shape[1])
    d_weights_S = x_RD.new_empty(0) if weights_S is None else torch.empty_like(weights_S)
    d_up_EFD, d_down_EDF = torch.zeros_like(up_EFD), torch.zeros_like(down_EDF)
    for expert, part in _experts(offsets_E):
        dy, rows = (_take(each, token_ids_S, part, dtype) for each in (dy_RD, x_RD))
        hidden = hidden_SF[part].to(dtype)
        active, factor = _open_activation(hidden, activation)
        d_active = _multiply(dy, down_EDF[expert], dy.new_empty(dy.shape[0], down_EDF.shape[2]))
        if weights_S is not None:
            weight = weights_S[part, None]
            d_weights_S[part] = torch.linalg.vecdot(d_active.to(wide), active.to(wide)).to(weights_S.dtype)
            d_active.mul_(weight)
            active.mul_(weight)
        torch.mm(dy.T, active, out=d_down_EDF[expert])
        d_hidden = _activation_backward(d_active, hidden, factor, activation)
        torch.mm(d_hidden.T, rows, out=d_up_EFD[expert])
        _multiply(d_hidden, up_EFD[expert], dx_SD[part])
    return dx_SD, d_weights_S, d_up_EFD, d_down_EDF


def sum_by_token(rows_SD: Tensor, token_ids_S: Tensor, tokens: int) -> Tensor:
    """Add each token's rows, which are equally many: [R, D] in the dtype of the rows, sums in float32 at least."""
    order_S = token_ids_S.argsort(stable=True)
    choices = max(1, rows_SD.shape[0] // max(1, tokens))
    begins_R = torch.arange(0, rows_SD.shape[0], choices, device=rows_SD.device)
    return F.embedding_bag(order_S, rows_SD, begins_R, mode="sum")


def _activate(hidden_RF: Tensor, activation: str) -> Tensor:
    """SwiGLU of [gate, up], or the squared ReLU."""
    if activation == "swiglu":
        gate, up = hidden_RF.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)
    return F.relu(hidden_RF).square_()


def _open_activation(hidden_SF: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """The activation again, and the factor of it that its gradient needs: silu(gate), or max(x, 0)."""
    if activation == "swiglu":
        gate, up = hidden_SF.chunk(2, dim=-1)
        factor = F.silu(gate)
        return factor * up, factor
    factor = F.relu(hidden_SF)
    return factor.square(), factor


def _activation_backward(d_active: Tensor, hidden_SF: Tensor, factor: Tensor, activation: str) -> Tensor:
    """Gradient of the hidden rows; overwrites `d_active` and `factor`."""
    if activation != "swiglu":
        return factor.mul_(d_active).mul_(2)
    gate, up = hidden_SF.chunk(2, dim=-1)
    grad = torch.empty_like(hidden_SF)
    d_gate, d_up = grad.chunk(2, dim=-1)
    torch.mul(d_active, factor, out=d_up)
    torch.ops.aten.silu_backward.grad_input(d_active.mul_(up), gate, grad_input=d_gate)
    return grad


def _experts(offsets_E: Tensor) -> Iterator[tuple[int, slice]]:
    """Each expert that has rows, and where they lie."""
    begin = 0
    for expert, end in enumerate(offsets_E.tolist()):
        if end > begin:
            yield expert, slice(begin, end)
        begin = end


def _take(x_RD: Tensor, token_ids_S: Tensor | None, part: slice, dtype: torch.dtype) -> Tensor:
    """Rows of one expert."""
    return (x_RD[part] if token_ids_S is None else x_RD.index_select(0, token_ids_S[part])).to(dtype)


def _multiply(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """left @ right into `out`; very few rows as part of a larger product.

    oneMKL multiplies one to three rows by another routine, which adds up in another order. A token's result would then
    depend, in its last bit, on how many tokens of other documents chose its expert.
    """
    rows = left.shape[0]
    if rows >= STEADY_ROWS:
        return torch.mm(left, right, out=out)
    return out.copy_(torch.mm(F.pad(left, (0, 0, 0, STEADY_ROWS - rows)), right)[:rows])
