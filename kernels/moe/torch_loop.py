"""Expert feed-forward, one expert after the other: rows, activations and gradients of one fit a processor's cache.

Whole tensors of sorted rows would pass through memory between steps, and their pages be mapped again each time. What is
kept: the hidden rows before the activation, in sorted order. Where products are taken in another dtype than the tensors
have, weights and their gradients are converted an expert at a time too, and rows once, before they are gathered.

oneDNN, which multiplies bf16 on a CPU, compiles code for each number of rows that it meets, and experts have new ones in
every step. So there zeros fill an expert's rows up to one of few numbers (`filled`). Their products are zeros where the next
expert's rows belong, which that one writes afterwards: memory of sorted rows is as long as the last product needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate, repeat
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from amfm.kernels.common.gemm_precision import steady_product
from amfm.kernels.moe.grouping import sort_stably
from amfm.kernels.swiglu.gate import GELUS, find_gate, gelu_backward, plain_unit_of

# Writes left^T right over its third argument.
Outer = Callable[[Tensor, Tensor, Tensor], object]


def loop_forward(
    x_RD: Tensor,
    weights_S: Tensor | None,
    token_ids_S: Tensor | None,
    offsets_E: Tensor,
    up_EFD: Tensor,
    down_EDF: Tensor,
    activation: str,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Output rows in sorted order [S, D] in `dtype`, that of the products, and hidden rows [S, F] in that of x.

    Rows without an expert do not exist; an expert without rows is skipped.
    """
    counts = count_rows(offsets_E)
    sizes = [filled(count, x_RD.device, dtype) for count in counts]
    y_SD = empty_rows(counts, sizes, x_RD.shape[1], x_RD, dtype)
    hidden_SF = empty_rows(counts, sizes, up_EFD.shape[1], x_RD, x_RD.dtype)
    for count, up, down, rows, weights, kept, y in zip(
        counts,
        up_EFD.unbind(0),
        down_EDF.unbind(0),
        take_rows(x_RD.to(dtype), token_ids_S, counts, sizes),
        take_weights(weights_S, counts),
        windows(hidden_SF, counts, sizes),
        windows(y_SD, counts, sizes),
        strict=True,
    ):
        if count == 0:
            continue
        hidden = kept if kept.dtype == dtype else torch.empty_like(kept, dtype=dtype)
        steady_product(rows, up.to(dtype).T, hidden)
        active = activate(hidden, activation)
        if weights is not None:
            active[:count].mul_(weights)
        steady_product(active, down.to(dtype).T, y)
        if hidden is not kept:
            kept.copy_(hidden)
    return y_SD[: sum(counts)], hidden_SF[: sum(counts)]


class BackwardInputs(NamedTuple):
    """What a backward pass of experts is given: the output's gradient [R, D], and what forward took and kept."""

    dy_RD: Tensor
    x_RD: Tensor
    hidden_SF: Tensor
    weights_S: Tensor | None
    token_ids_S: Tensor | None
    offsets_E: Tensor
    up_EFD: Tensor
    down_EDF: Tensor
    activation: str


def loop_backward(
    given: BackwardInputs,
    dtype: torch.dtype,
    *,
    into: Sequence[Tensor] | None = None,
    later: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x in sorted order [S, D] in `dtype`, of weights [S] (empty without them), of up and of down.

    `into`: what those of up and down are written over, if not over new tensors. `later`: for up and down their factors, gradient of the hidden rows and weighted activations [S, F] in `dtype`, from
    which `loop_weight_gradients` makes them.

    With v = dy down: d_weight = <v, activation>, and weight * v goes through the activation's gradient. So the
    output before weighting is not needed.
    """
    dy_RD, x_RD, hidden_SF, weights_S, token_ids_S, offsets_E, up_EFD, down_EDF, activation = given
    wide = torch.promote_types(dtype, torch.float32)
    counts = count_rows(offsets_E)
    sizes = [filled(count, x_RD.device, dtype) for count in counts]
    dx_SD = empty_rows(counts, sizes, x_RD.shape[1], x_RD, dtype)
    d_weights_S = x_RD.new_empty(0) if weights_S is None else torch.empty_like(weights_S)
    if later:
        d_up_EFD = torch.empty_like(hidden_SF, dtype=dtype)
        d_down_EDF = x_RD.new_empty(hidden_SF.shape[0], down_EDF.shape[2], dtype=dtype)
    else:
        d_up_EFD, d_down_EDF = into or (torch.empty_like(up_EFD), torch.empty_like(down_EDF))
    for count, up, down, rows, dy, weights, kept, dx, d_weights, d_up, d_down in zip(
        counts,
        up_EFD.unbind(0),
        down_EDF.unbind(0),
        take_rows(x_RD.to(dtype), token_ids_S, counts, sizes),
        take_rows(dy_RD.to(dtype), token_ids_S, counts, sizes),
        take_weights(weights_S, counts),
        take_rows(hidden_SF, None, counts, sizes),
        windows(dx_SD, counts, sizes),
        repeat(None) if weights_S is None else d_weights_S.split(counts),
        d_up_EFD.split(counts) if later else d_up_EFD.unbind(0),
        d_down_EDF.split(counts) if later else d_down_EDF.unbind(0),
    ):
        if count == 0:
            # Its memory is not cleared otherwise.
            d_up.zero_()
            d_down.zero_()
            continue
        hidden = kept.to(dtype)
        active, factor = open_activation(hidden, activation)
        d_active = steady_product(dy, down.to(dtype), torch.empty_like(active))
        if weights is not None and d_weights is not None:
            own, own_active = d_active[:count], active[:count]
            d_weights.copy_(torch.linalg.vecdot(own.to(wide), own_active.to(wide)))
            own.mul_(weights)
            own_active.mul_(weights)
        if later:
            d_down.copy_(active[:count])
        else:
            _multiply_outer(dy, active, d_down)
        d_hidden = activation_backward(d_active, hidden, factor, activation)
        if later:
            d_up.copy_(d_hidden[:count])
        else:
            _multiply_outer(d_hidden, rows, d_up)
        steady_product(d_hidden, up.to(dtype), dx)
    return dx_SD[: len(hidden_SF)], d_weights_S, d_up_EFD, d_down_EDF


def loop_weight_gradients(
    dy_RD: Tensor,
    x_RD: Tensor,
    d_hidden_SF: Tensor,
    active_SF: Tensor,
    token_ids_S: Tensor | None,
    offsets_E: Tensor,
    into: Sequence[Tensor],
    *,
    outer: tuple[Outer, Outer] | None = None,
) -> None:
    """Write gradients over `into`, those of up and down, from what `loop_backward` gives with `later`.

    `outer`: how up's and how down's are multiplied, if not as they are (low_precision.py). Zeros for an expert without rows.
    """
    counts = count_rows(offsets_E)
    sizes = counts if outer else [filled(count, x_RD.device, active_SF.dtype) for count in counts]
    d_up_EFD, d_down_EDF = into
    outer_up, outer_down = outer or (_multiply_outer, _multiply_outer)
    for rows, dy, d_hidden, active, d_up, d_down in zip(
        take_rows(x_RD.to(active_SF.dtype), token_ids_S, counts, sizes),
        take_rows(dy_RD.to(active_SF.dtype), token_ids_S, counts, sizes),
        take_rows(d_hidden_SF, None, counts, sizes),
        take_rows(active_SF, None, counts, sizes),
        d_up_EFD.unbind(0),
        d_down_EDF.unbind(0),
    ):
        if rows.shape[0] == 0:
            d_up.zero_()
            d_down.zero_()
            continue
        outer_down(dy, active, d_down)
        outer_up(d_hidden, rows, d_up)


def return_rows(rows_SD: Tensor, token_ids_S: Tensor | None, like_RD: Tensor) -> Tensor:
    """Sorted rows where those of `like_RD` came from and in their dtype: summed by token where there are ids."""
    rows_RD = rows_SD if token_ids_S is None else sum_by_token(rows_SD, token_ids_S, len(like_RD))
    return rows_RD.to(like_RD.dtype)


def sum_by_token(rows_SD: Tensor, token_ids_S: Tensor, tokens: int) -> Tensor:
    """Add each token's rows: [R, D] in the dtype of the rows, sums in float32 at least; zeros for a token without one."""
    order_S = sort_stably(token_ids_S, tokens)
    every_R = torch.arange(tokens, device=rows_SD.device)
    begins_R = torch.searchsorted(token_ids_S.index_select(0, order_S), every_R)
    return F.embedding_bag(order_S, rows_SD, begins_R, mode="sum")


def activate(hidden_RF: Tensor, activation: str) -> Tensor:
    """A gated unit of [gate, up], or a plain one."""
    unit = find_gate(activation)
    if unit is None:
        return plain_unit_of(hidden_RF, activation)
    gate, up = unit.limited(*hidden_RF.chunk(2, dim=-1))
    return unit.factor(gate).mul_(up)


def open_activation(hidden_SF: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """The activation again, and the factor of it that its gradient needs: silu(gate), max(x, 0), or for GELU room for it."""
    unit = find_gate(activation)
    if unit is not None:
        gate, up = unit.limited(*hidden_SF.chunk(2, dim=-1))
        factor = unit.factor(gate)
        return factor * up, factor
    factor = torch.empty_like(hidden_SF) if activation in GELUS else F.relu(hidden_SF)
    return (plain_unit_of(hidden_SF, activation) if activation in GELUS else factor.square()), factor


def activation_backward(d_active: Tensor, hidden_SF: Tensor, factor: Tensor, activation: str) -> Tensor:
    """Gradient of the hidden rows; overwrites `d_active` and `factor`."""
    unit = find_gate(activation)
    if activation in GELUS:
        return factor.copy_(gelu_backward(d_active, hidden_SF, GELUS[activation]))
    if unit is None:
        return factor.mul_(d_active).mul_(2)
    raw_gate, raw_up = hidden_SF.chunk(2, dim=-1)
    gate, up = unit.limited(raw_gate, raw_up)
    grad = torch.empty_like(hidden_SF)
    d_gate, d_up = grad.chunk(2, dim=-1)
    torch.mul(d_active, factor, out=d_up)
    torch.ops.aten.silu_backward.grad_input(d_active.mul_(up), unit.steep(gate), grad_input=d_gate)
    unit.pass_limits(d_gate, d_up, raw_gate, raw_up)
    return grad


def count_rows(offsets_E: Tensor) -> list[int]:
    """Rows of each expert."""
    ends = offsets_E.tolist()
    return [end - begin for begin, end in zip([0, *ends], ends, strict=False)]


def filled(count: int, device: torch.device, dtype: torch.dtype) -> int:
    """Rows of a product for `count` of an expert: in bf16 on a CPU at most an eighth or 15 more, one of eight numbers an octave."""
    if device.type != "cpu" or dtype != torch.bfloat16:
        return count
    multiple = max(16, 1 << count.bit_length() >> 4)
    return -(-count // multiple) * multiple


def empty_rows(counts: list[int], sizes: list[int], width: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    """Memory of sorted rows, with as many after the last one as products of these sizes write there."""
    room = max((end - count + size for end, count, size in zip(accumulate(counts), counts, sizes)), default=0)
    return like.new_empty(room, width, dtype=dtype)


def windows(rows_SF: Tensor, counts: list[int], sizes: list[int]) -> Iterator[Tensor]:
    """Where each expert's product is written, experts in order."""
    for end, count, size in zip(accumulate(counts), counts, sizes):
        yield rows_SF[end - count : end - count + size]


def take_rows(
    x_RD: Tensor, token_ids_S: Tensor | None, counts: list[int], sizes: list[int] | None = None
) -> Iterator[Tensor]:
    """Each expert's rows, gathered when it is their turn, with zeros up to its size."""
    parts = (x_RD if token_ids_S is None else token_ids_S).split(counts)
    for part, size in zip(parts, sizes or counts, strict=True):
        if size == len(part):
            yield part if token_ids_S is None else x_RD.index_select(0, part)
            continue
        rows = x_RD.new_empty(size, x_RD.shape[1])
        if token_ids_S is None:
            rows[: len(part)] = part
        else:
            torch.index_select(x_RD, 0, part, out=rows[: len(part)])
        rows[len(part) :] = 0
        yield rows


def take_weights(weights_S: Tensor | None, counts: list[int]) -> Iterable[Tensor | None]:
    """Each expert's weights as a column."""
    return repeat(None, len(counts)) if weights_S is None else weights_S.unsqueeze(1).split(counts)


def _multiply_outer(left: Tensor, right: Tensor, out: Tensor) -> None:
    """left.T @ right into `out`, which may have a narrower dtype."""
    if out.dtype == left.dtype:
        torch.mm(left.T, right, out=out)
    else:
        out.copy_(torch.mm(left.T, right))
