"""Copies of tokens sorted by expert, ready to be sent, and their weighted sum by token when they have come back.

How: the torch backend indexes and adds choice by choice; Triton copies a token's row to all its places from one read, adds
up by token, and in backward takes gradients of rows and weights from one read of the token's gradient. Sums are made in the
order of a token's choices in float32 at least, so results do not depend on the order of arrival.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from amfm.kernels.common.inputs import check_shape
from amfm.kernels.moe.grouping import group_by_expert
from amfm.kernels.moe.rows.torch_impl import add_rows, combine_rows, gather_rows
from amfm.kernels.runtime.backend import resolve_backend


@dataclass(frozen=True)
class SortedChoices:
    """Choices of R tokens sorted by expert: how many each expert got, and where each stands.

    `counts_E` int64. `order` int64, the choice (token * K + number) at each sorted place, R * K at one without a choice, for
    the torch backend; `places` [R * K] int32, the place of each choice, for Triton, and `gaps` [S] bool, the places without a
    choice, None if there are none.
    """

    counts_E: Tensor
    order: Tensor | None
    places: Tensor | None
    gaps: Tensor | None = None


def choose_ranks(expert_ids_RK: Tensor, experts_a_rank: int, num_ranks: int) -> Tensor:
    """Ranks [R, J] that hold experts of each token, each once, in their order; `num_ranks` if there are fewer than J.

    J: as many as choices or ranks there are, whichever is less. Ids from `experts_a_rank * num_ranks` on are lost choices.
    """
    ranks_RK = (expert_ids_RK // experts_a_rank).clamp(max=num_ranks)
    is_chosen_RP = ranks_RK.new_zeros(len(ranks_RK), num_ranks + 1, dtype=torch.bool).scatter_(1, ranks_RK, True)
    every_P = torch.arange(num_ranks, device=ranks_RK.device)
    ranks_RP = torch.where(is_chosen_RP[:, :num_ranks], every_P, num_ranks).sort(1).values
    return ranks_RP[:, : ranks_RK.shape[1]]


def sort_choices(expert_ids_RK: Tensor, num_experts: int, *, backend: str = "torch") -> SortedChoices:
    """Sort choices by expert id in [0, num_experts), ties in their first order. No host synchronisation."""
    backend = resolve_backend(backend, expert_ids_RK.device, "moe")
    if backend == "triton":
        from amfm.kernels.moe.counting_sort import sort_pairs

        pairs = sort_pairs(expert_ids_RK, num_experts)
        return SortedChoices(pairs.counts_E, None, pairs.places)
    groups = group_by_expert(expert_ids_RK, num_experts)
    return SortedChoices(groups.counts_E, groups.order, None)


def put_in_slots(choices: SortedChoices, expert_ids_RK: Tensor, slots: int, parts: int = 1) -> SortedChoices:
    """The same choices with `slots` places for each expert, of which the last may be without a choice.

    Slots are at least as many as an expert has choices. The last expert has none: its choices, which are lost, stand after
    all slots. With several `parts`, which divide the slots, each expert's first slots stand in the first part, and so on.
    """
    counts_E = choices.counts_E
    begins_E = counts_E.cumsum(0) - counts_E
    num_experts, width = len(counts_E) - 1, slots // parts
    number_N = torch.arange(slots, device=expert_ids_RK.device)
    if choices.places is not None:
        flat_S = expert_ids_RK.flatten()
        number_S = choices.places - begins_E[flat_S]
        part_S = number_S // width
        place_S = (part_S * num_experts + flat_S) * width + number_S - part_S * width
        lost_S = num_experts * slots + number_S
        places = torch.where(flat_S < num_experts, place_S, lost_S).to(torch.int32)
        is_gap_EN = number_N >= counts_E[:-1, None]
        return SortedChoices(counts_E, None, places, _by_part(is_gap_EN, parts))
    assert choices.order is not None, "choices are sorted for one of the backends"
    order_S = choices.order
    places_EN = (number_N + begins_E[:-1, None]).clamp(max=len(order_S) - 1)
    filled_EN = torch.where(number_N < counts_E[:-1, None], order_S[places_EN], len(order_S))
    return SortedChoices(counts_E, _by_part(filled_EN, parts), None)


def _by_part(slots_EN: Tensor, parts: int) -> Tensor:
    """What is given for each slot of each expert, in the order in which slots stand: [S]."""
    return slots_EN.unflatten(1, (parts, -1)).transpose(0, 1).flatten()


def gather_choices(x_RD: Tensor, choices: SortedChoices, count: int, top_k: int) -> Tensor:
    """Rows [count, D] of the first `count` places, each a copy of its token's row; their gradients add up by token.

    A place without a choice has some row, whose gradient goes nowhere.
    """
    if choices.places is None:
        assert choices.order is not None, "choices are sorted for one of the backends"
        return gather_rows(x_RD, choices.order[:count], top_k)
    check_shape("places", choices.places, (x_RD.shape[0] * top_k,), x_RD)
    from amfm.kernels.moe.rows.triton_impl import spread_rows_triton

    return spread_rows_triton(x_RD, choices.places, count, top_k, choices.gaps)


def combine_choices(rows_SD: Tensor, choices: SortedChoices, weights_RK: Tensor) -> Tensor:
    """Sum each token's rows by weight: [R, D] in the dtype of the rows; a choice without a row, from S on, adds nothing."""
    if choices.places is None:
        assert choices.order is not None, "choices are sorted for one of the backends"
        return combine_rows(rows_SD, choices.order[: rows_SD.shape[0]], weights_RK)
    check_shape("places", choices.places, (weights_RK.numel(),), rows_SD)
    from amfm.kernels.moe.rows.triton_impl import combine_rows_triton

    return combine_rows_triton(rows_SD, choices.places, weights_RK, choices.gaps)


def add_choices(rows_SD: Tensor, choices: SortedChoices, tokens: int, top_k: int) -> Tensor:
    """Sum each token's rows as they are: [R, D] in the dtype of the rows; a choice without a row, from S on, adds nothing."""
    if choices.places is None:
        assert choices.order is not None, "choices are sorted for one of the backends"
        return add_rows(rows_SD, choices.order[: rows_SD.shape[0]], tokens, top_k)
    check_shape("places", choices.places, (tokens * top_k,), rows_SD)
    from amfm.kernels.moe.rows.triton_impl import add_rows_triton

    return add_rows_triton(rows_SD, choices.places, tokens, top_k, choices.gaps)


def sort_rows(expert_S: Tensor, num_experts: int, *, backend: str = "torch") -> Tensor:
    """Row at each sorted place of rows with these expert ids [S], for `grouped_feed_forward`: what its backend takes."""
    if resolve_backend(backend, expert_S.device, "moe") == "triton":
        from amfm.kernels.moe.counting_sort import sort_pairs

        return sort_pairs(expert_S[:, None], num_experts).pairs
    return expert_S.argsort(stable=True)


def row_bytes(tokens: int, rows: int, width: int, *, value_bytes: int = 2) -> int:
    """Least bytes of one pass over the rows that are sent and come back: tokens read, rows written, rows read, tokens written."""
    return 2 * value_bytes * width * (tokens + rows)
