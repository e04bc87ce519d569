"""Routing and expert feed-forward in PyTorch: the path of production on CPU, with its gradients written out.

Experts run one after the other (`torch_loop.py`), on a GPU as grouped products where PyTorch has them
(`torch_grouped.py`).

The choice's weight multiplies the activation (F wide) instead of the output (D wide), so that backward gets the
weight's gradient as a row sum of two tensors it has anyway, and the output before weighting is never kept.

The definition, one token and one expert at a time, ends the file: the meaning that the fast paths must keep.
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
from amfm.kernels.moe.torch_grouped import (
    grouped_backward,
    grouped_forward,
    grouped_input_gradients,
    grouped_weight_gradients,
    takes_grouped,
)
from amfm.kernels.moe.torch_loop import BackwardInputs, loop_backward, loop_forward, loop_weight_gradients, return_rows
from amfm.kernels.swiglu.gate import find_gate


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


def route_reference(
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
    """Choose experts token by token; returns expert ids [R, K], weights [R, K] and scores [R, E] in the logits' dtype.

    Source: DeepSeek-V3 (arXiv 2412.19437), section 2.1.2, equations 14 to 16.

    Ids are found on the host by sorting pairs of (-appeal, id), which is the rule for ties written down.
    """
    scores_RE = score_logits(logits_RE, score)
    plain = score == "softmax" and expert_bias_E is None and num_groups == 1
    rows: list[list[int]] = []
    for row, logits in zip(scores_RE.detach().tolist(), logits_RE.detach().tolist()):
        bias = [0.0] * len(row) if expert_bias_E is None else expert_bias_E.tolist()
        # Probabilities of far-off logits are all zero; the logits themselves still have an order.
        appeal = logits if plain else torch.add(torch.tensor(row, dtype=scores_RE.dtype), torch.tensor(bias)).tolist()
        allowed = _experts_of_best_groups(appeal, num_groups, group_top_k, group_merit)
        rows.append(sorted(allowed, key=lambda expert: (-appeal[expert], expert))[:top_k])
    expert_ids_RK = torch.tensor(rows, dtype=torch.int64, device=logits_RE.device).reshape(-1, top_k)
    weights_RK = scores_RE.gather(1, expert_ids_RK)
    if normalize:
        weights_RK = weights_RK / (weights_RK.sum(-1, keepdim=True) + 1e-20)
    return expert_ids_RK, weights_RK * scaling, scores_RE


def score_logits(logits_RE: Tensor, score: str) -> Tensor:
    """Softmax, sigmoid, or the square root of the softplus, of logits [R, E] in their dtype."""
    if score == "softmax":
        return logits_RE.softmax(-1)
    if score == "sigmoid":
        return logits_RE.sigmoid()
    # From -104 on softplus is 0 in float32, where the root has no gradient.
    return torch.nn.functional.softplus(logits_RE.clamp(min=-80.0)).sqrt()


def _experts_of_best_groups(appeal: list[float], num_groups: int, group_top_k: int, group_merit: int) -> list[int]:
    """Experts of the groups whose best experts add up to most, this many of each; ties go to the lower group."""
    size = len(appeal) // num_groups
    merits = [sum(sorted(appeal[group * size : (group + 1) * size])[-group_merit:]) for group in range(num_groups)]
    best = sorted(range(num_groups), key=lambda group: (-merits[group], group))[:group_top_k]
    return [group * size + inner for group in best for inner in range(size)]


def activate_reference(hidden_RF: Tensor, activation: str) -> Tensor:
    """A gated unit of [gate, up], or a plain one."""
    from amfm.kernels.swiglu.op import plain_unit_reference, swiglu_reference

    unit = find_gate(activation)
    return plain_unit_reference(hidden_RF, activation) if unit is None else swiglu_reference(hidden_RF, unit)


def grouped_feed_forward_reference(
    x_RD: Tensor, counts_E: Tensor, up_EFD: Tensor, down_EDF: Tensor, *, activation: str
) -> Tensor:
    """Feed-forward of rows that are sorted by expert: counts_E[0] rows of expert 0, and so on."""
    outputs = []
    for expert, rows in enumerate(x_RD.split(counts_E.tolist())):
        outputs.append(activate_reference(rows @ up_EFD[expert].T, activation) @ down_EDF[expert].T)
    return torch.cat(outputs)


def expert_feed_forward_reference(
    x_RD: Tensor, expert_ids_RK: Tensor, weights_RK: Tensor, up_EFD: Tensor, down_EDF: Tensor, *, activation: str
) -> Tensor:
    """Sum over each token's chosen experts of weight times feed-forward, expert by expert.

    Shapes as in `amfm.kernels.moe.op.expert_feed_forward`; every expert is run, with no rows where none chose it.
    """
    y_RD = torch.zeros_like(x_RD)
    for expert in range(up_EFD.shape[0]):
        rows, choices = torch.where(expert_ids_RK == expert)
        hidden = activate_reference(x_RD[rows] @ up_EFD[expert].T, activation)
        weighted = (hidden @ down_EDF[expert].T) * weights_RK[rows, choices, None].to(x_RD.dtype)
        y_RD = y_RD.index_add(0, rows, weighted)
    return y_RD
