"""Routing and expert feed-forward in PyTorch: the path of production on CPU, with its gradients written out.

Experts run one after the other (`torch_loop.py`), on a GPU as grouped products where PyTorch has them
(`torch_grouped.py`).

The choice's weight multiplies the activation (F wide) instead of the output (D wide), so that backward gets the
weight's gradient as a row sum of two tensors it has anyway, and the output before weighting is never kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from amfm.kernels.common.custom_op import fake_of, gradients_like
from amfm.kernels.common.gemm_precision import gemm_dtype
from amfm.kernels.common.weight_gradients import (
    GradientSum,
    accumulate,
    compute_later,
    gradient_sums_of,
    is_split,
    make_or_accumulate,
)
from amfm.kernels.moe.reference import score_logits
from amfm.kernels.moe.torch_grouped import (
    grouped_backward,
    grouped_forward,
    grouped_input_gradients,
    grouped_weight_gradients,
    takes_grouped,
)
from amfm.kernels.moe.torch_loop import BackwardInputs, loop_backward, loop_forward, loop_weight_gradients, return_rows


def choose_experts(appeal_RE: Tensor, top_k: int, num_groups: int, group_top_k: int, group_merit: int = 2) -> Tensor:
    """Ids [R, K] of the most appealing experts, best first; equal appeal goes to the lower id. Not differentiable.

    With groups, a group's merit is the sum of its `group_merit` best; experts of other groups are set to -inf.
    """
    appeal_RE = appeal_RE.detach()
    if group_top_k < num_groups:
        grouped = appeal_RE.unflatten(1, (num_groups, -1))
        merit = grouped.topk(min(group_merit, grouped.shape[2]), dim=-1).values.sum(-1)
        allowed = torch.zeros_like(merit, dtype=torch.bool).scatter_(1, _first_largest(merit, group_top_k), True)
        appeal_RE = grouped.masked_fill(~allowed[:, :, None], -torch.inf).flatten(1)
    return _first_largest(appeal_RE, top_k)


def _first_largest(values_RE: Tensor, count: int) -> Tensor:
    """Columns of the `count` largest entries of each row, equal ones in order; NaN counts as largest, to be seen.

    topk breaks ties at random and argmax is not vectorized on CPU (64 columns: 240 us a round against 100): a column's
    place from the end, kept where the column holds the row's largest value, is largest for the first such column.
    """
    left = values_RE.nan_to_num(torch.inf, torch.inf, -torch.inf)
    width = left.shape[1]
    from_end_E = torch.arange(width, 0, -1, dtype=left.dtype, device=left.device)
    is_largest, columns = torch.empty_like(left), []
    for _ in range(count):
        torch.eq(left, left.amax(-1, keepdim=True), out=is_largest)
        column = (width - is_largest.mul_(from_end_E).amax(-1, keepdim=True)).long()
        columns.append(column)
        left.scatter_(1, column, -torch.inf)
    return torch.cat(columns, dim=1)


def route_torch(
    logits_RE: Tensor,
    expert_bias_E: Tensor | None,
    *,
    score: str,
    top_k: int,
    normalize: bool,
    scaling: float,
    num_groups: int,
    group_top_k: int,
    group_merit: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `route_reference`, all tokens at once, scores in float32 (float64 for float64 logits)."""
    logits_RE = logits_RE if logits_RE.dtype == torch.float64 else logits_RE.float()
    scores_RE = score_logits(logits_RE, score)
    if score == "softmax" and expert_bias_E is None and num_groups == 1:
        # Softmax keeps the order of logits, so those may decide.
        appeal_RE = logits_RE  # probabilities of far-off logits are all zero; the logits still have an order
    else:
        appeal_RE = scores_RE if expert_bias_E is None else scores_RE + expert_bias_E
    expert_ids_RK = choose_experts(appeal_RE, top_k, num_groups, group_top_k, group_merit)
    return expert_ids_RK, _weigh(scores_RE, expert_ids_RK, normalize, scaling), scores_RE


def weigh_choices(
    logits_RE: Tensor, choices_RK: Tensor, score: str, normalize: bool, scaling: float
) -> tuple[Tensor, Tensor]:
    """Scores [R, E] and weights [R, K] of choices that were made elsewhere."""
    scores_RE = score_logits(logits_RE if logits_RE.dtype == torch.float64 else logits_RE.float(), score)
    return scores_RE, _weigh(scores_RE, choices_RK, normalize, scaling)


def _weigh(scores_RE: Tensor, expert_ids_RK: Tensor, normalize: bool, scaling: float) -> Tensor:
    weights_RK = scores_RE.gather(1, expert_ids_RK)
    if normalize:
        weights_RK = weights_RK / (weights_RK.sum(-1, keepdim=True) + 1e-20)
    return weights_RK * scaling


@torch.library.custom_op("amfm::expert_feed_forward_torch", mutates_args=())
def _forward(
    x_RD: Tensor,
    weights_S: Tensor | None,
    token_ids_S: Tensor | None,
    offsets_E: Tensor,
    up_EFD: Tensor,
    down_EDF: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """Output [R, D] and hidden [S, F] before the activation; S sorted rows. Without token ids the rows are x itself."""
    given = (x_RD, weights_S, token_ids_S, offsets_E, up_EFD, down_EDF, activation)
    if takes_grouped(x_RD, up_EFD, down_EDF):
        y_SD, hidden_SF = grouped_forward(*given)
    else:
        y_SD, hidden_SF = loop_forward(*given, gemm_dtype(x_RD))
    return return_rows(y_SD, token_ids_S, x_RD), hidden_SF


@fake_of(_forward)
def _(given: Any) -> tuple[Tensor, ...]:
    x, ids = given.x_RD, given.token_ids_S
    return x.new_empty(x.shape), x.new_empty(len(x) if ids is None else len(ids), given.up_EFD.shape[1])


@torch.library.custom_op("amfm::expert_feed_forward_torch_backward", mutates_args=())
def _backward(
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
    """Gradients of x [R, D], weights [S] (empty without weights), up [E, F, D] and down [E, D, F]."""
    given = BackwardInputs(dy_RD, x_RD, hidden_SF, weights_S, token_ids_S, offsets_E, up_EFD, down_EDF, activation)
    if takes_grouped(x_RD, up_EFD, down_EDF):
        dx_SD, d_weights_S, d_up_EFD, d_down_EDF = grouped_backward(given)
    else:
        dx_SD, d_weights_S, d_up_EFD, d_down_EDF = loop_backward(given, gemm_dtype(x_RD))
    return return_rows(dx_SD, token_ids_S, x_RD), d_weights_S, d_up_EFD, d_down_EDF


gradients_like(_backward, ("x_RD", "weights_S", "up_EFD", "down_EDF"))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Keep x and the hidden rows, an output only so that it can be kept."""
    x_RD, weights_S, token_ids_S, offsets_E, up_EFD, down_EDF, ctx.activation = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x_RD, output[1], weights_S, token_ids_S, offsets_E, up_EFD, down_EDF)
    # PyTorch's grouped product on a GPU rounds its result and cannot add to one.
    ctx.totals = gradient_sums_of(up_EFD, down_EDF) if x_RD.device.type == "cpu" else None


def _differentiate(ctx: Any, dy_RD: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of x, weights, up and down; None throughout where the output took no gradient."""
    if dy_RD is None:
        return (None,) * 7
    given = BackwardInputs._make((dy_RD.contiguous(), *ctx.saved_tensors, ctx.activation))
    d_up_EFD: Tensor | None = None
    d_down_EDF: Tensor | None = None
    if is_split(given.up_EFD, given.down_EDF):
        dx_RD, d_weights_S = _leave_weights(ctx.totals, given)
    elif ctx.totals is not None:
        dx_RD, d_weights_S = _accumulate_weights(ctx.totals, given)
    else:
        dx_RD, d_weights_S, d_up_EFD, d_down_EDF = _backward(*given)
    return dx_RD, None if given.weights_S is None else d_weights_S, None, None, d_up_EFD, d_down_EDF, None


def _leave_weights(totals: Sequence[GradientSum] | None, given: BackwardInputs) -> tuple[Tensor, Tensor]:
    """Gradients of x [R, D] and of weights [S]; those of up and down are computed later (kernels/common/weight_gradients.py)."""
    x_RD, weights, places = given.x_RD, [given.up_EFD, given.down_EDF], (given.token_ids_S, given.offsets_E)
    weights_half: Callable[[], Sequence[Tensor | None]]
    if takes_grouped(x_RD, *weights):
        dx_SD, d_weights_S, active_SF, d_hidden_SF = grouped_input_gradients(given)
        weights_half = partial(grouped_weight_gradients, given.dy_RD, x_RD, active_SF, d_hidden_SF, *places)
    else:
        dx_SD, d_weights_S, d_hidden_SF, active_SF = loop_backward(given, gemm_dtype(x_RD), later=True)
        write = partial(loop_weight_gradients, given.dy_RD, x_RD, d_hidden_SF, active_SF, *places)
        weights_half = partial(make_or_accumulate, totals, weights, write)
    compute_later(weights, weights_half)
    return return_rows(dx_SD, given.token_ids_S, x_RD), d_weights_S


def _accumulate_weights(totals: Sequence[GradientSum], given: BackwardInputs) -> tuple[Tensor, Tensor]:
    """Gradients of x [R, D] and of weights [S]; those of up and down land in their sums, expert by expert."""
    found: list[Tensor] = []

    def write(into: Sequence[Tensor]) -> None:
        found.extend(loop_backward(given, gemm_dtype(given.x_RD), into=into)[:2])

    accumulate(totals, write)
    dx_SD, d_weights_S = found
    return return_rows(dx_SD, given.token_ids_S, given.x_RD), d_weights_S


_forward.register_autograd(_differentiate, setup_context=_save)


def grouped_feed_forward_torch(
    x_RD: Tensor, offsets_E: Tensor, up_EFD: Tensor, down_EDF: Tensor, activation: str
) -> Tensor:
    """Feed-forward of rows sorted by expert: [R, D].

    x [R, D], offsets [E] (row after each expert's last).
    """
    return _forward(x_RD, None, None, offsets_E, up_EFD, down_EDF, activation)[0]


def expert_feed_forward_torch(
    x_RD: Tensor,
    weights_S: Tensor,
    token_ids_S: Tensor | None,
    offsets_E: Tensor,
    up_EFD: Tensor,
    down_EDF: Tensor,
    activation: str,
) -> Tensor:
    """Weighted sum of each token's experts: [R, D]; weights and token ids in sorted order, without ids of rows that are sorted."""
    return _forward(x_RD, weights_S, token_ids_S, offsets_E, up_EFD, down_EDF, activation)[0]
