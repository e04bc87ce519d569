"""Mixture of experts: choose experts, group tokens by expert, run the experts, sum their weighted outputs.

How: three steps that can be used apart. `route` chooses experts and their weights; `group_by_expert` sorts
(token, choice) pairs so that an expert's rows are together; the feed-forward runs over sorted rows as grouped
products. `expert_feed_forward` joins the last two and gathers rows inside the product, without a sorted copy of
x; `grouped_feed_forward` takes rows that expert parallelism has already sorted and exchanged, `only_expert_feed_forward` those
of a rank with one expert, whose products need no groups. No ranks communicate here. Ties go to the lower id in every backend, so that all choose alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from amfm.kernels.common.inputs import check_float, check_matrix, check_shape
from amfm.kernels.low_precision.products import multiplies_codes
from amfm.kernels.low_precision.recipe import recipes_of
from amfm.kernels.moe.grouping import Grouping, count_experts, group_by_expert
from amfm.kernels.moe.rows.op import combine_choices, gather_choices, sort_choices
from amfm.kernels.moe.rows.torch_impl import invert, reorder_rows
from amfm.kernels.moe.torch_impl import (
    expert_feed_forward_reference,
    expert_feed_forward_torch,
    grouped_feed_forward_reference,
    grouped_feed_forward_torch,
    route_reference,
    route_torch,
    weigh_choices,
)
from amfm.kernels.runtime.backend import resolve_backend
from amfm.kernels.swiglu.gate import find_gate

__all__ = [
    "Grouping",
    "Routing",
    "expert_feed_forward",
    "group_by_expert",
    "grouped_feed_forward",
    "only_expert_feed_forward",
    "route",
]

SCORES = ("softmax", "sigmoid", "sqrt_softplus")


@dataclass(frozen=True)
class Routing:
    """What the router decided.

    `expert_ids_RK` int64, best first. `weights_RK` float32, differentiable. `counts_E` int64: choices of each expert.
    `scores_RE` float32, differentiable, without the bias: for auxiliary losses. `bound`: ids may be E, for no expert, and no more
    than this many are not; None: none is E. `losses`: values a token [R] that the router itself adds to the loss, by name.

    Ids and counts carry no gradient; weights and scores do.
    """

    expert_ids_RK: Tensor
    weights_RK: Tensor
    counts_E: Tensor
    scores_RE: Tensor
    bound: int | None = None
    losses: Mapping[str, Tensor] = field(default_factory=dict)


def route(
    logits_RE: Tensor,
    expert_bias_E: Tensor | None,
    *,
    score: str,
    top_k: int,
    normalize: bool,
    scaling: float,
    num_groups: int = 1,
    group_top_k: int = 1,
    group_merit: int = 2,
    choices_RK: Tensor | None = None,
    backend: str = "torch",
) -> Routing:
    """Choose `top_k` experts for each token and weigh them.

    Scores are the softmax or sigmoid of the logits in float32, or the square root of their softplus, which is 0 in its
    gradient below -80. The experts with the largest score + bias are chosen; equal ones go to the lower id. Weights are
    the scores (never the bias) of the chosen, divided by their sum when `normalize`, times `scaling`. With groups, only
    experts of the `group_top_k` groups whose `group_merit` best experts add up to most may be chosen: 2 in DeepSeek-V3,
    1 in DeepSeek-V2. Softmax, normalized, equals the softmax over the chosen logits.

    `choices_RK` replays choices that were made elsewhere, such as those of a rollout (Ma et al. 2025, arXiv 2510.11370): neither
    bias nor groups have a part then, and weights and their gradients are those of a router that chose them itself.

    Shapes: logits [R, E]; bias [E] or None; choices [R, K] integers -> Routing. float64 logits keep float64.
    Raises ValueError for wrong shapes, an unknown score, limits that leave fewer than `top_k` experts, or, on CPUs, a choice
    that is not an expert.
    Source: DeepSeek-V3 (arXiv 2412.19437), section 2.1.2; DeepSeek-V2 (arXiv 2405.04434), section 2.2.2, for groups by
    their best expert; Wang et al. 2024 (arXiv 2408.15664) for the bias.
    """
    _check_route(logits_RE, expert_bias_E, score, top_k, num_groups, group_top_k)
    if group_merit < 1:
        raise ValueError(f"group_merit={group_merit} must be at least 1")
    if choices_RK is not None:
        _check_choices(choices_RK, logits_RE, top_k)
        scores_RE, weights_RK = weigh_choices(logits_RE, choices_RK, score, normalize, scaling)
        return Routing(choices_RK, weights_RK, count_experts(choices_RK, logits_RE.shape[1]), scores_RE)
    # All groups allowed is not a limit: spare the pass over groups.
    if group_top_k == num_groups:
        num_groups = group_top_k = 1
    if num_groups == 1 and backend == "native":
        from amfm.kernels.common.few_rows import route_rows, takes_few_rows

        if takes_few_rows(logits_RE, *([] if expert_bias_E is None else [expert_bias_E])):
            return Routing(*route_rows(logits_RE, expert_bias_E, score, top_k, normalize, scaling))
    backend = resolve_backend(backend, logits_RE.device, "router")
    settings: dict[str, Any] = {
        "score": score,
        "top_k": top_k,
        "normalize": normalize,
        "scaling": scaling,
        "num_groups": num_groups,
        "group_top_k": group_top_k,
        "group_merit": group_merit,
    }
    if backend == "triton":
        from amfm.kernels.moe.triton_router import route_triton

        return Routing(*route_triton(logits_RE, expert_bias_E, **settings))
    implementation = route_torch if backend == "torch" else route_reference
    expert_ids_RK, weights_RK, scores_RE = implementation(logits_RE, expert_bias_E, **settings)
    return Routing(expert_ids_RK, weights_RK, count_experts(expert_ids_RK, logits_RE.shape[1]), scores_RE)


def _check_choices(choices_RK: Tensor, logits_RE: Tensor, top_k: int) -> None:
    """Raise ValueError for choices that a router of these logits cannot have made; values are read only on CPUs."""
    check_shape("choices_RK", choices_RK, (len(logits_RE), top_k), logits_RE)
    if choices_RK.dtype != torch.int64:
        raise ValueError(f"choices_RK must be int64; got {choices_RK.dtype}")
    if choices_RK.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = (int(value) for value in choices_RK.aminmax()) if choices_RK.numel() else (0, 0)
        if low < 0 or high >= logits_RE.shape[1]:
            raise ValueError(f"choices_RK has experts {low} to {high}; the router has 0 to {logits_RE.shape[1] - 1}")


def grouped_feed_forward(
    x_RD: Tensor,
    counts_E: Tensor,
    up_EFD: Tensor,
    down_EDF: Tensor,
    *,
    activation: str,
    sources_R: Tensor | None = None,
    backend: str = "torch",
) -> Tensor:
    """Feed-forward of rows that are sorted by expert: down_e(activation(up_e(x))).

    Rows in another order come with `sources_R`, the row at each sorted place (`amfm.kernels.moe.rows.op.sort_rows`); results keep
    their order. Triton reads and writes them where they are.

    Shapes: x [R, D]; counts [E] integers that add up to R; up [E, F, D] with F = 2 * hidden for gated units (gate rows
    first) and hidden for "squared_relu"; down [E, D, hidden] -> [R, D]. Experts without rows get zero gradients.
    `activation`: a word of `amfm.kernels.swiglu.gate`. Products accumulate in float32. Raises ValueError for wrong shapes, dtypes, or an unknown activation.
    """
    _check_experts(x_RD, up_EFD, down_EDF, activation)
    check_shape("counts_E", counts_E, (up_EFD.shape[0],), x_RD)
    if counts_E.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"counts_E must be int32 or int64; got {counts_E.dtype}")
    if x_RD.device.type == "cpu" and not torch.compiler.is_compiling() and int(counts_E.sum()) != x_RD.shape[0]:
        raise ValueError(f"counts_E must add up to the {x_RD.shape[0]} rows of x_RD; got {int(counts_E.sum())}")
    backend = resolve_backend(backend, x_RD.device, "moe")
    recipes = recipes_of(up_EFD, down_EDF)
    if recipes is not None and multiplies_codes(recipes.up, x_RD.device):
        from amfm.kernels.moe import triton_codes

        offsets_E = counts_E.cumsum(0).to(torch.int32)
        return triton_codes.grouped(x_RD, sources_R, offsets_E, up_EFD, down_EDF, activation, recipes)
    if recipes is not None or (backend == "triton" and _multiplies_by_torch(x_RD, up_EFD, down_EDF, len(x_RD))):
        backend = "torch"
    if sources_R is not None:
        check_shape("sources_R", sources_R, (x_RD.shape[0],), x_RD)
        if backend != "triton":
            sorted_RD = reorder_rows(x_RD, sources_R)
            y_RD = grouped_feed_forward(sorted_RD, counts_E, up_EFD, down_EDF, activation=activation, backend=backend)
            return reorder_rows(y_RD, invert(sources_R))
    if backend == "reference":
        return grouped_feed_forward_reference(x_RD, counts_E, up_EFD, down_EDF, activation=activation)
    offsets_E = counts_E.cumsum(0).to(torch.int32)
    if backend == "triton":
        from amfm.kernels.moe.triton_experts import grouped_feed_forward_triton

        return grouped_feed_forward_triton(x_RD, sources_R, offsets_E, up_EFD, down_EDF, activation)
    if recipes is not None:
        from amfm.kernels.moe import low_precision

        return low_precision.feed_forward(x_RD, None, None, offsets_E, up_EFD, down_EDF, activation, recipes)
    return grouped_feed_forward_torch(x_RD, offsets_E, up_EFD, down_EDF, activation)


def expert_feed_forward(
    x_RD: Tensor,
    expert_ids_RK: Tensor,
    weights_RK: Tensor,
    up_EFD: Tensor,
    down_EDF: Tensor,
    *,
    activation: str,
    count: int | None = None,
    is_bound: bool = False,
    backend: str = "torch",
) -> Tensor:
    """Sum over each token's K chosen experts of weight times feed-forward.

    Shapes: x [R, D]; expert ids [R, K] integers in [0, E); weights [R, K]; up and down as `grouped_feed_forward` ->
    [R, D]. Saves x and the hidden rows before the activation for backward; no sorted copy, no output before weighting.
    `count`: ids may be E too, a choice that adds nothing, and `count` of them are not; None: none is E. `is_bound`: no more than
    `count` are not, and how many, only the device knows; such choices need weights of 0, and what they get for a gradient of
    the weight is not to be read. Of more than `count`, a choice may add nothing.
    Raises ValueError for wrong shapes, dtypes, or an unknown activation.
    """
    _check_experts(x_RD, up_EFD, down_EDF, activation)
    check_shape("expert_ids_RK", expert_ids_RK, (x_RD.shape[0], -1), x_RD)
    check_shape("weights_RK", weights_RK, tuple(expert_ids_RK.shape), x_RD)
    recipes = recipes_of(up_EFD, down_EDF)
    if recipes is None and count is None and backend == "native":
        from amfm.kernels.common.few_rows import expert_feed_forward_rows, takes_few_rows
        from amfm.kernels.moe.torch_loop import activate

        if takes_few_rows(x_RD, weights_RK, up_EFD, down_EDF):
            activated = partial(activate, activation=activation)
            return expert_feed_forward_rows(x_RD, expert_ids_RK, weights_RK, up_EFD, down_EDF, activated)
    backend = resolve_backend(backend, x_RD.device, "moe")
    if backend == "reference" and recipes is None:
        return expert_feed_forward_reference(x_RD, expert_ids_RK, weights_RK, up_EFD, down_EDF, activation=activation)
    # Lost choices are one expert more, which sorts last.
    num_experts = up_EFD.shape[0]
    num_sorted, rows = (num_experts, expert_ids_RK.numel()) if count is None else (num_experts + 1, count)
    by_codes = recipes is not None and multiplies_codes(recipes.up, x_RD.device)
    if by_codes or (backend == "triton" and recipes is None):
        from amfm.kernels.moe.counting_sort import sort_pairs
        from amfm.kernels.moe.triton_experts import expert_feed_forward_triton

        if not by_codes and _multiplies_by_torch(x_RD, up_EFD, down_EDF, rows):
            choices = sort_choices(expert_ids_RK, num_sorted, backend=backend)
            rows_SD = gather_choices(x_RD, choices, rows, expert_ids_RK.shape[1])
            offsets_E = choices.counts_E[:num_experts].cumsum(0).to(torch.int32)
            offsets_E = _fill_up(offsets_E, rows) if is_bound else offsets_E
            y_SD = grouped_feed_forward_torch(rows_SD, offsets_E, up_EFD, down_EDF, activation)
            return combine_choices(y_SD, choices, weights_RK)
        pairs = sort_pairs(expert_ids_RK, num_sorted)
        if is_bound:
            is_lost_S = expert_ids_RK.flatten() == num_experts
            places_S = pairs.places.masked_fill(is_lost_S, rows)  # or results of rows that no one writes would be added
            pairs = replace(pairs, places=places_S, offsets_E=pairs.offsets_E.clamp(max=rows))
        if recipes is not None:
            from amfm.kernels.moe import triton_codes

            return triton_codes.chosen(x_RD, weights_RK, pairs, rows, up_EFD, down_EDF, activation, recipes)
        return expert_feed_forward_triton(x_RD, weights_RK, pairs, rows, up_EFD, down_EDF, activation)
    groups = group_by_expert(expert_ids_RK, num_sorted)
    offsets_E = groups.offsets_E[:num_experts]
    if is_bound and (x_RD.device.type == "cpu" or recipes is not None):
        rows = int(offsets_E[-1])  # which a CPU reads without waiting, and emulated recipes read anyway
    elif is_bound:
        offsets_E = _fill_up(offsets_E, rows)
    weights_S = weights_RK.reshape(-1).index_select(0, groups.order[:rows])
    places = groups.token_ids[:rows], offsets_E
    if recipes is not None:
        from amfm.kernels.moe import low_precision

        return low_precision.feed_forward(x_RD, weights_S, *places, up_EFD, down_EDF, activation, recipes)
    return expert_feed_forward_torch(x_RD, weights_S, *places, up_EFD, down_EDF, activation)


def only_expert_feed_forward(
    x_SD: Tensor, weights_S: Tensor, up_EFD: Tensor, down_EDF: Tensor, *, activation: str, backend: str = "torch"
) -> Tensor:
    """weight * feed-forward of each row by the only expert that there is: products of whole matrices, of rows as they are.

    Shapes: x [S, D]; weights [S]; up [1, F, D] and down [1, D, hidden] as `grouped_feed_forward` -> [S, D]. Saves x and the hidden
    rows before the activation. Without rows weights get zero gradients. Raises ValueError for wrong shapes, dtypes, or an unknown
    activation.
    """
    _check_experts(x_SD, up_EFD, down_EDF, activation)
    check_shape("up_EFD", up_EFD, (1, *up_EFD.shape[1:]), x_SD)
    check_shape("weights_S", weights_S, (len(x_SD),), x_SD)
    recipes = recipes_of(up_EFD, down_EDF)
    backend = resolve_backend(backend, x_SD.device, "moe")
    if recipes is not None and multiplies_codes(recipes.up, x_SD.device):
        from amfm.kernels.moe import triton_codes

        return triton_codes.only(x_SD, weights_S[:, None], up_EFD, down_EDF, activation, recipes)
    if recipes is None and backend == "triton":
        from amfm.kernels.moe.triton_only_expert import only_expert_triton

        return only_expert_triton(x_SD, weights_S[:, None], up_EFD, down_EDF, activation)
    if recipes is None and backend == "reference":
        first_S1 = torch.zeros(len(x_SD), 1, dtype=torch.int64, device=x_SD.device)
        given = x_SD, first_S1, weights_S[:, None], up_EFD, down_EDF
        return expert_feed_forward_reference(*given, activation=activation)
    end_1 = torch.full((1,), len(x_SD), dtype=torch.int32, device=x_SD.device)
    if recipes is not None:
        from amfm.kernels.moe import low_precision

        return low_precision.feed_forward(x_SD, weights_S, None, end_1, up_EFD, down_EDF, activation, recipes)
    return expert_feed_forward_torch(x_SD, weights_S, None, end_1, up_EFD, down_EDF, activation)


def _fill_up(offsets_E: Tensor, rows: int) -> Tensor:
    """Give the last expert all rows up to `rows`, for products that take no rows without an expert; their weights are 0."""
    is_last_E = torch.arange(len(offsets_E), device=offsets_E.device) == len(offsets_E) - 1
    return offsets_E.clamp(max=rows).masked_fill(is_last_E, rows)


def _multiplies_by_torch(x_RD: Tensor, up_EFD: Tensor, down_EDF: Tensor, rows: int) -> bool:
    """Whether PyTorch's grouped product takes `rows` rows of experts on the Triton backend."""
    from amfm.kernels.moe.torch_grouped import multiplies_by_torch
    from amfm.kernels.moe.triton_products import product_tile

    return multiplies_by_torch(x_RD, up_EFD, down_EDF, product_tile(rows, len(up_EFD))["BLOCK_M"])


def _check_route(
    logits_RE: Tensor, expert_bias_E: Tensor | None, score: str, top_k: int, num_groups: int, group_top_k: int
) -> None:
    """Raise ValueError for shapes, or for settings of scores and groups that cannot choose `top_k` experts."""
    check_shape("logits_RE", logits_RE, (-1, -1))
    check_float("logits_RE", logits_RE)
    num_experts = logits_RE.shape[1]
    if expert_bias_E is not None:
        check_shape("expert_bias_E", expert_bias_E, (num_experts,), logits_RE)
        check_float("expert_bias_E", expert_bias_E)
    if score not in SCORES:
        raise ValueError(f"score must be one of {', '.join(SCORES)}; got {score!r}")
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k={top_k} must be between 1 and the {num_experts} experts")
    if num_groups < 1 or num_experts % num_groups:
        raise ValueError(f"num_groups={num_groups} must divide the {num_experts} experts")
    if not 1 <= group_top_k <= num_groups:
        raise ValueError(f"group_top_k={group_top_k} must be between 1 and num_groups={num_groups}")
    if group_top_k * (num_experts // num_groups) < top_k:
        raise ValueError(
            f"group_top_k={group_top_k} groups of {num_experts // num_groups} experts hold fewer than top_k={top_k}; "
            "raise group_top_k or lower top_k"
        )


def _check_experts(x_RD: Tensor, up_EFD: Tensor, down_EDF: Tensor, activation: str) -> None:
    """Raise ValueError unless x [R, D], up [E, F, D] and down [E, D, hidden] fit each other and the activation."""
    is_gated = find_gate(activation) is not None
    check_shape("x_RD", x_RD, (-1, -1))
    check_float("x_RD", x_RD)
    check_shape("up_EFD", up_EFD, (-1, -1, x_RD.shape[1]), x_RD)
    experts, width, model = up_EFD.shape
    if is_gated and width % 2:
        raise ValueError(f"up_EFD must have an even number of rows for {activation} (gate, then up); got {width}")
    check_shape("down_EDF", down_EDF, (experts, model, width // 2 if is_gated else width), x_RD)
    check_float("up_EFD", up_EFD, x_RD)
    check_float("down_EDF", down_EDF, x_RD)
    check_matrix("up_EFD", up_EFD)


def feed_forward_flops(pairs: int, model: int, hidden: int, activation: str) -> int:
    """Floating point operations of one forward for `pairs` (token, choice) rows; backward takes twice as many.

    Gated units have three matrices an expert (gate, up, down), the squared ReLU two.
    """
    return 2 * pairs * model * hidden * (2 if find_gate(activation) is None else 3)


def feed_forward_bytes(
    tokens: int, top_k: int, model: int, hidden: int, experts: int, activation: str, size: int
) -> int:
    """Least bytes of one forward: x read, weights read, hidden and activation written and read, rows summed, y written."""
    pairs, inner = tokens * top_k, hidden * (1 if find_gate(activation) is None else 2)
    weights = experts * model * (inner + hidden)
    return size * (tokens * model + weights + pairs * (inner + 2 * hidden + 2 * model) + tokens * model)


def route_bytes(tokens: int, experts: int, top_k: int) -> int:
    """Least bytes of routing: float32 logits read, scores written, ids (int64) and weights (float32) written."""
    return tokens * (8 * experts + 12 * top_k)
