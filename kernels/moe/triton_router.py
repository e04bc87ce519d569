"""Routing as one Triton kernel each way: scores, group limits, the choice, weights and counts in one pass over logits.

How: a program takes some rows with all their experts on chip, and chooses by taking the largest score top_k
times, since k is small. Ties go to the lower id, as in the other backends. Experts are padded group by group to
powers of two, so that limits on groups are reductions over a reshaped tile.
"""

# Triton reads a kernel's parameters from the call: they carry no types.
# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: ANN201, ANN202

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from amfm.kernels.common.custom_op import differentiate, fake_of
from amfm.kernels.runtime.backend import INTERPRETED
from amfm.kernels.runtime.interpreter import dot_dtype


@triton.jit
def _take_first_largest(values, lane, BIG: tl.constexpr):
    """Lane of each row's largest value, the lowest of equal ones, and the values without it.

    [BLOCK] twice and the values [BLOCK, lanes]; BIG answers for rows without a largest value (NaN).
    """
    largest = tl.max(values, 1)
    chosen = tl.min(tl.where(values == largest[:, None], lane, BIG), 1)
    return largest, chosen, tl.where(lane == chosen[:, None], float("-inf"), values)


@triton.jit
def _limit_groups(
    appeal, num_groups, group_top_k,
    MERIT: tl.constexpr, BLOCK: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """-inf outside the groups whose MERIT best experts add up to most."""
    grouped = tl.reshape(appeal, (BLOCK, GROUPS, SIZE))
    lane = tl.arange(0, SIZE)[None, None, :]
    left = grouped
    merit = tl.zeros((BLOCK, GROUPS), tl.float32)
    for _ in tl.static_range(MERIT):
        best = tl.max(left, 2)
        merit += tl.where(best == float("-inf"), 0.0, best)  # a group may have fewer experts
        place = tl.min(tl.where(left == best[:, :, None], lane, SIZE), 2)
        left = tl.where(lane == place[:, :, None], float("-inf"), left)
    group = tl.arange(0, GROUPS)[None, :]
    merit = tl.where(group < num_groups, merit, float("-inf"))
    allowed = tl.zeros((BLOCK, GROUPS), tl.int32)
    for _ in range(group_top_k):
        _merit, chosen, merit = _take_first_largest(merit, group, GROUPS)
        allowed = tl.where(group == chosen[:, None], 1, allowed)
    grouped = tl.where(allowed[:, :, None] == 1, grouped, float("-inf"))
    return tl.reshape(grouped, (BLOCK, GROUPS * SIZE))


@triton.jit
def _sqrt_softplus(x):
    """Square root of log(1 + e^x), with e^x kept where 1 + e^x rounds to 1."""
    x = tl.maximum(x, -80.0)
    power = tl.exp(tl.minimum(x, 20.0))
    above = 1.0 + power
    # log(above) errs as above does from 1 + power; dividing by above - 1, which is exact, makes up for it.
    exact = tl.where(above == 1.0, power, tl.log(above) * (power / tl.where(above == 1.0, 1.0, above - 1.0)))
    return tl.sqrt(tl.where(x > 20.0, x, exact))


@triton.jit
def _sqrt_softplus_slope(score):
    """Derivative of `_sqrt_softplus` from its value s: sigmoid(x) / (2 s), where sigmoid(x) = 1 - e^-(s^2)."""
    plus = score * score
    series = 1.0 - plus / 2.0 * (1.0 - plus / 3.0 * (1.0 - plus / 4.0 * (1.0 - plus / 5.0 * (1.0 - plus / 6.0))))
    near = score / 2.0 * series
    return tl.where(plus < 0.1, near, (1.0 - tl.exp(-plus)) / (2.0 * tl.where(score > 0.0, score, 1.0)))


@triton.jit(do_not_specialize=["rows"])
def route_forward_kernel(
    logits, bias, scores, expert_ids, weights, counts, rows, experts, group_size, num_groups, group_top_k, top_k, scaling,
    SCORE: tl.constexpr, BIAS: tl.constexpr, LIMIT: tl.constexpr, NORMALIZE: tl.constexpr,
    MERIT: tl.constexpr, BLOCK: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr, CHOICES: tl.constexpr,
):  # fmt: skip
    """scores [R, E], expert ids and weights [R, K], counts [E] added up by integer atomics, whose order cannot matter.

    Lanes hold experts group by group, each group padded to SIZE, so that a lane's order is its expert's order.

    Grid: blocks of rows. Scores are computed in float32; groups have GROUPS * SIZE lanes.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    lane = tl.arange(0, GROUPS * SIZE)[None, :]
    expert = lane // SIZE * group_size + lane % SIZE
    exists = (lane // SIZE < num_groups) & (lane % SIZE < group_size)
    inside = (row[:, None] < rows) & exists
    place = row[:, None] * experts + expert
    x = tl.load(logits + place, mask=inside, other=float("-inf")).to(tl.float32)
    if SCORE == "softmax":
        # Rows beyond the last would be softmaxes of only -inf, which are NaN.
        x = tl.where(row[:, None] < rows, x, 0.0)
        share = tl.exp(x - tl.max(x, 1)[:, None])
        score = share / tl.sum(share, 1)[:, None]
    elif SCORE == "sigmoid":
        score = 1.0 / (1.0 + tl.exp(-x))
    else:
        score = _sqrt_softplus(x)
    tl.store(scores + place, score, mask=inside)
    # Logits decide where they can: probabilities of far-off logits are all zero, and would tie.
    appeal = x if SCORE == "softmax" and not BIAS and not LIMIT else score
    if BIAS:
        appeal += tl.load(bias + expert, mask=exists, other=0.0).to(tl.float32)
    appeal = tl.where(exists, appeal, float("-inf"))
    if LIMIT:
        appeal = _limit_groups(appeal, num_groups, group_top_k, MERIT, BLOCK, GROUPS, SIZE)
    choice = tl.arange(0, CHOICES)[None, :]
    ids = tl.zeros((BLOCK, CHOICES), tl.int32)
    chosen_scores = tl.zeros((BLOCK, CHOICES), tl.float32)
    hits = tl.zeros((GROUPS * SIZE,), tl.int32)
    for k in range(top_k):
        _, chosen, appeal = _take_first_largest(appeal, lane, GROUPS * SIZE - 1)
        mine = lane == chosen[:, None]
        value = tl.sum(tl.where(mine, score, 0.0), 1)
        # Rows of NaN choose nothing: their ids must still be experts.
        named = tl.minimum(chosen // SIZE * group_size + chosen % SIZE, experts - 1)
        ids = tl.where(choice == k, named[:, None], ids)
        chosen_scores = tl.where(choice == k, value[:, None], chosen_scores)
        hits += tl.sum((mine & (row[:, None] < rows)).to(tl.int32), 0)
    weight = chosen_scores * scaling
    if NORMALIZE:
        weight = chosen_scores / (tl.sum(chosen_scores, 1)[:, None] + 1e-20) * scaling
    written = (row[:, None] < rows) & (choice < top_k)
    tl.store(expert_ids + row[:, None] * top_k + choice, ids.to(tl.int64), mask=written)
    tl.store(weights + row[:, None] * top_k + choice, weight, mask=written)
    flat = tl.arange(0, GROUPS * SIZE)
    real = (flat // SIZE < num_groups) & (flat % SIZE < group_size)
    tl.atomic_add(counts + flat // SIZE * group_size + flat % SIZE, hits.to(tl.int64), mask=real & (hits > 0))


@triton.jit(do_not_specialize=["rows"])
def route_backward_kernel(
    scores, expert_ids, d_weights, d_scores, d_logits, rows, experts, top_k, scaling,
    SCORE: tl.constexpr, NORMALIZE: tl.constexpr, BLOCK: tl.constexpr, EXPERTS: tl.constexpr, CHOICES: tl.constexpr,
):  # fmt: skip
    """d_logits [R, E] from the gradients of weights (K of them not zero a row) and of scores.

    Grid: blocks of rows. The choice itself has no gradient. Weights are w_k = s_k / sum of the chosen s (where
    NORMALIZE) times scaling.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[:, None]
    expert = tl.arange(0, EXPERTS)[None, :]
    choice = tl.arange(0, CHOICES)[None, :]
    inside, given = (row < rows) & (expert < experts), (row < rows) & (choice < top_k)
    score = tl.load(scores + row * experts + expert, mask=inside, other=0.0)
    grad = tl.load(d_scores + row * experts + expert, mask=inside, other=0.0)
    ids = tl.load(expert_ids + row * top_k + choice, mask=given, other=0)
    d_weight = tl.load(d_weights + row * top_k + choice, mask=given, other=0.0) * scaling
    # Derivative of s_k / total: each chosen score also stands in the total.
    if NORMALIZE:
        chosen = tl.load(scores + row * experts + ids, mask=given, other=0.0)
        total = tl.sum(chosen, 1)[:, None] + 1e-20
        d_weight = (d_weight - tl.sum(d_weight * chosen, 1)[:, None] / total) / total
    for k in range(top_k):
        one = choice == k
        mine = tl.sum(tl.where(one, ids, 0), 1)[:, None]
        grad += tl.where(expert == mine, tl.sum(tl.where(one, d_weight, 0.0), 1)[:, None], 0.0)
    if SCORE == "softmax":
        grad = score * (grad - tl.sum(score * grad, 1)[:, None])
    elif SCORE == "sigmoid":
        grad = score * (1.0 - score) * grad
    else:
        grad = _sqrt_softplus_slope(score) * grad
    tl.store(d_logits + row * experts + expert, grad.to(d_logits.dtype.element_ty), mask=inside)


def rows_of_block(width: int) -> int:
    """Rows of a program: 16 at most, since 32 of 128 scores spill on sm_90, and tiles of at most 4096 scores."""
    return 16 if INTERPRETED else max(1, min(16, 4096 // width))


@torch.library.custom_op("amfm::route_triton", mutates_args=())
def _forward(
    logits_RE: Tensor,
    bias_E: Tensor | None,
    score: str,
    top_k: int,
    normalize: bool,
    scaling: float,
    num_groups: int,
    group_top_k: int,
    group_merit: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Expert ids [R, K], weights [R, K], counts [E], scores [R, E]."""
    logits_RE = logits_RE.contiguous()
    rows, experts = logits_RE.shape
    group_size = experts // num_groups
    blocks = {"GROUPS": triton.next_power_of_2(num_groups), "SIZE": triton.next_power_of_2(group_size)}
    block = rows_of_block(blocks["GROUPS"] * blocks["SIZE"])
    scores = logits_RE.new_empty(rows, experts, dtype=torch.float32)
    ids = logits_RE.new_empty(rows, top_k, dtype=torch.int64)
    weights = logits_RE.new_empty(rows, top_k, dtype=torch.float32)
    # Zeros, because programs add to them.
    counts = logits_RE.new_zeros(experts, dtype=torch.int64)
    if rows:
        route_forward_kernel[(triton.cdiv(rows, block),)](
            logits_RE, bias_E, scores, ids, weights, counts,
            rows, experts, group_size, num_groups, group_top_k, top_k, scaling,
            SCORE=score, BIAS=bias_E is not None, LIMIT=group_top_k < num_groups, NORMALIZE=normalize,
            MERIT=min(group_merit, group_size), BLOCK=block, CHOICES=triton.next_power_of_2(top_k), **blocks,
        )  # fmt: skip
    return ids, weights, counts, scores


@fake_of(_forward)
def _(given: Any) -> tuple[Tensor, ...]:
    logits, (rows, experts) = given.logits_RE, given.logits_RE.shape
    return (
        logits.new_empty(rows, given.top_k, dtype=torch.int64),
        logits.new_empty(rows, given.top_k, dtype=torch.float32),
        logits.new_empty(experts, dtype=torch.int64),
        logits.new_empty(rows, experts, dtype=torch.float32),
    )


@torch.library.custom_op("amfm::route_triton_backward", mutates_args=())
def _backward(
    d_weights: Tensor,
    d_scores: Tensor,
    scores: Tensor,
    expert_ids: Tensor,
    logits_RE: Tensor,
    score: str,
    normalize: bool,
    scaling: float,
) -> Tensor:
    """Gradient of the logits [R, E]; the logits give only dtype and shape."""
    rows, experts = scores.shape
    top_k = expert_ids.shape[1]
    d_logits = torch.empty_like(logits_RE, memory_format=torch.contiguous_format)
    width = triton.next_power_of_2(experts)
    block = rows_of_block(width)
    if rows:
        route_backward_kernel[(triton.cdiv(rows, block),)](
            scores, expert_ids, d_weights.contiguous(), d_scores.contiguous(), d_logits, rows, experts, top_k, scaling,
            SCORE=score, NORMALIZE=normalize, BLOCK=block, EXPERTS=width, CHOICES=triton.next_power_of_2(top_k),
        )  # fmt: skip
    return d_logits


differentiate(_forward, _backward, outputs=("expert_ids", "weights", "counts", "scores"), gradients=("logits_RE",))


def route_triton(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Expert ids, weights, counts and scores as `route_reference`, for float32, bfloat16 and float16 logits."""
    dot_dtype(logits_RE.dtype)  # rejects float64
    groups = num_groups, group_top_k, group_merit
    return _forward(logits_RE, expert_bias_E, score, top_k, normalize, scaling, *groups)
