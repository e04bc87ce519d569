"""Routing and expert feed-forward, one token and one expert at a time: the meaning that the fast paths must keep."""

from __future__ import annotations

import torch
from torch import Tensor

from amfm.kernels.swiglu.gate import find_gate


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
