"""Rows by rank: a token's row goes once to each rank that holds one of its experts, and one row comes back from there.

A token of 22 choices among 512 experts on 8 ranks goes to 7.6 of them on average, so a third of the rows are sent that one a
choice would be. With a row go the weights and the numbers of its token's choices, and the rank that gets them sums its
experts' results by weight; on its own rank a token's sums of all ranks are added up, in the order of the ranks whatever arrives
first. How many rows go where follows from the router: ranks tell each other, which waits for the device once per layer. With room
(model/parallel/groups.py) rows are in places whose number follows from sizes, some of them empty, and nothing waits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from amfm.kernels.moe.grouping import count_experts
from amfm.kernels.moe.op import expert_feed_forward, only_expert_feed_forward
from amfm.kernels.moe.rows.op import (
    SortedChoices,
    add_choices,
    choose_ranks,
    gather_choices,
    put_in_slots,
    sort_choices,
)
from amfm.model.moe.transfer import HeldExperts, RowTransfer, exchange_counts, sum_over_width_ranks
from amfm.model.parallel.groups import RowCapacity, count_places


class RowsByRank:
    """Tokens [R, D] on their way to the ranks of their experts and back, in parts of which each is sent on its own.

    expert ids [R, K] in the numbering of all experts, where the number of experts itself marks a lost choice, which sends
    nothing; weights [R, K]. Making it sends all parts. Every rank of `groups.ep` and `groups.expt_tp` must call everything here.
    """

    def __init__(
        self, x_RD: Tensor, expert_ids_RK: Tensor, weights_RK: Tensor, experts: HeldExperts, num_parts: int
    ) -> None:
        sizes = [len(x_RD) - len(x_RD) // 2, len(x_RD) // 2] if num_parts == 2 else [len(x_RD)]
        x, ids, weights = (tensor.split(sizes) for tensor in (x_RD, expert_ids_RK, weights_RK))
        routes = [Destinations.of(ids_RK, experts) for ids_RK in ids]
        capacity = experts.groups.row_capacity
        plans = (
            plan_places(routes, experts, capacity)
            if capacity is not None and capacity.is_used
            else plan_parts(routes, experts)
        )
        self.parts = [_Part(x[part], ids[part], weights[part], plans[part], experts) for part in range(len(sizes))]

    def collect(self) -> Tensor:
        """Sum of each token's experts by weight, [R, D]."""
        sums = [part.collect() for part in self.parts]
        return sums[0] if len(sums) == 1 else torch.cat(sums)


@dataclass(frozen=True)
class Destinations:
    """Where tokens go: ranks [R, J] of each, `rows` sorts these pairs by rank; choices [R, K] of experts, by rank too."""

    sent_RJ: Tensor
    rows: SortedChoices
    choices_RK: Tensor

    @classmethod
    def of(cls, expert_ids_RK: Tensor, experts: HeldExperts) -> Destinations:
        """Each token's ranks, from the experts [R, K] that it chose; lost choices go to one rank more, which is not one."""
        num_local, num_ranks = len(experts.up_eFD), experts.groups.ep.size()
        sent_RJ = choose_ranks(expert_ids_RK, num_local, num_ranks)
        rows = sort_choices(sent_RJ, num_ranks + 1, backend=experts.backend)
        return cls(sent_RJ, rows, expert_ids_RK // num_local)

    def count(self, num_ranks: int) -> Tensor:
        """Rows and choices that go to each rank, [P, 2] int64."""
        choices_P = count_experts(self.choices_RK, num_ranks + 1)[:num_ranks]
        return torch.stack([self.rows.counts_E[:num_ranks], choices_P], 1)


@dataclass(frozen=True)
class RankPlan:
    """How many rows of a part go where, on the host, where the splits of an all-to-all must be.

    rows: where they stand when sent. sent, received [ep]: rows to and from each expert rank. received_beside [expt_tp]: rows that
    each rank with the same experts got from `ep`. num_choices: choices of all these rows that are experts of this rank. Under
    room they are places, and is_filled_S says which of all the received ones hold a row.
    """

    rows: SortedChoices
    sent: list[int]
    received: list[int]
    received_beside: list[int]
    num_choices: int
    is_filled_S: Tensor | None = None


def plan_parts(routes: list[Destinations], experts: HeldExperts) -> list[RankPlan]:
    """Tell every rank how many rows of each part come to it. Waits for the device once.

    Every rank of `groups.ep` and `groups.expt_tp` must call.
    """
    own_NP2 = torch.stack([route.count(experts.groups.ep.size()) for route in routes])
    arrived_XPN2 = exchange_counts(own_NP2.transpose(0, 1), experts.groups)
    # All numbers that the host needs in one copy: each copy would wait for the device.
    own_counts, *arrived = torch.cat([own_NP2[None], arrived_XPN2.transpose(1, 2)]).tolist()
    plans = []
    for route, own_part, *arrived_parts in zip(routes, own_counts, *arrived, strict=True):
        received = [[rows for rows, _ in counts] for counts in arrived_parts]
        plans.append(
            RankPlan(
                rows=route.rows,
                sent=[rows for rows, _ in own_part],
                received=received[experts.groups.expt_tp.rank()],
                received_beside=[sum(rows) for rows in received],
                num_choices=sum(choices for counts in arrived_parts for _, choices in counts),
            )
        )
    capacity = experts.groups.row_capacity
    if capacity is not None and capacity.is_open:
        for route, plan in zip(routes, plans):
            rows, choices = _places(route, experts, capacity)
            if max(plan.sent) > rows or plan.num_choices > choices:
                capacity.note(torch.ones_like(capacity.missed))
    return plans


def plan_places(routes: list[Destinations], experts: HeldExperts, capacity: RowCapacity) -> list[RankPlan]:
    """Give the rows of each part places, and tell every rank which are filled; nothing waits.

    Every rank of `groups.ep` and `groups.expt_tp` must call, with as many tokens.
    """
    ranks, beside = experts.groups.ep.size(), experts.groups.expt_tp.size()
    counts_NP = torch.stack([route.rows.counts_E[:ranks] for route in routes])
    arrived_XPN = exchange_counts(counts_NP.T, experts.groups)
    plans = []
    for number, route in enumerate(routes):
        rows, choices = _places(route, experts, capacity)
        capacity.note((counts_NP[number] > rows).any())
        every_N = torch.arange(rows, device=counts_NP.device)
        plans.append(
            RankPlan(
                rows=put_in_slots(route.rows, route.sent_RJ, rows),
                sent=[rows] * ranks,
                received=[rows] * ranks,
                received_beside=[rows * ranks] * beside,
                num_choices=choices,
                is_filled_S=(every_N < arrived_XPN[..., number, None]).flatten(),
            )
        )
    return plans


def _places(route: Destinations, experts: HeldExperts, capacity: RowCapacity) -> tuple[int, int]:
    """Places for a part's rows to each rank, and for the choices of its experts in all rows that a rank gets."""
    ranks, beside = experts.groups.ep.size(), experts.groups.expt_tp.size()
    tokens, top_k = route.choices_RK.shape
    rows, choices = count_places(capacity.shares, tokens, top_k, experts.sent_share, ranks, len(experts.up_eFD))
    return rows, beside * choices


class _Part:
    """One part's rows and details, [rows, 2K] numbers of weights and ids; made, they are under way."""

    def __init__(
        self,
        x_RD: Tensor,
        expert_ids_RK: Tensor,
        weights_RK: Tensor,
        plan: RankPlan,
        experts: HeldExperts,
    ) -> None:
        self.experts, self.plan = experts, plan
        self.num_tokens, self.top_k = expert_ids_RK.shape
        assert weights_RK.dtype.itemsize >= 4, "the router's weights are float32 at least, which holds ids exactly"
        details_RC = torch.cat([weights_RK, expert_ids_RK.to(weights_RK.dtype)], 1)
        self.most = min(self.top_k, experts.groups.ep.size())  # rows that a token sends
        details = RowTransfer(experts.groups.ep, plan.sent, plan.received)
        self.transfers = [experts.transfer(plan.sent, plan.received), details]
        self.in_transit = [
            transfer.start(gather_choices(given, plan.rows, sum(plan.sent), self.most))
            for transfer, given in zip(self.transfers, (x_RD, details_RC))
        ]

    def compute(self) -> None:
        """Wait for the rows, compute their experts, and send the sums back."""
        rows_SD, details_SC = (
            transfer.finish(rows) for transfer, rows in zip(self.transfers, self.in_transit, strict=True)
        )
        y_SD = sum_over_width_ranks(
            self._sum_experts, [rows_SD, details_SC], self.plan.received_beside, self.experts.groups.expt_tp
        )
        self.home = self.transfers[0].back()
        self.in_transit = [self.home.start(y_SD)]

    def _sum_experts(self, rows_SD: Tensor, details_SC: Tensor) -> Tensor:
        """Sum [S, D] over each row's choices that are experts of this rank, by weight; partial where `expt_tp` has several."""
        up_eFD, num_local = self.experts.up_eFD, len(self.experts.up_eFD)
        weights_SK, ids_SK = details_SC.split(self.top_k, 1)
        local_SK = ids_SK.detach().long() - self.experts.groups.ep.rank() * num_local
        is_here_SK = (local_SK >= 0) & (local_SK < num_local)
        is_filled_S, capacity = self.plan.is_filled_S, self.experts.groups.row_capacity
        if is_filled_S is not None:
            assert capacity is not None, "places are made if there is room"
            is_here_SK = is_here_SK & is_filled_S[:, None]
            capacity.note(is_here_SK.sum() > self.plan.num_choices)
            # What an empty place has for a weight, and for its gradient, is anything.
            weights_SK = torch.where(is_here_SK, weights_SK, 0.0)
        if num_local == 1:
            # All rows are this expert's, each for one choice; empty places have a weight of 0.
            weights_S = torch.where(is_here_SK, weights_SK, 0.0).sum(1)
            return only_expert_feed_forward(
                rows_SD,
                weights_S,
                up_eFD,
                self.experts.down_eDF,
                activation=self.experts.activation,
                backend=self.experts.backend,
            )
        return expert_feed_forward(
            rows_SD,
            torch.where(is_here_SK, local_SK, num_local),
            weights_SK,
            up_eFD,
            self.experts.down_eDF,
            activation=self.experts.activation,
            count=self.plan.num_choices,
            is_bound=is_filled_S is not None,
            backend=self.experts.backend,
        )

    def collect(self) -> Tensor:
        """Wait for the sums of other ranks, and add them up by token."""
        (y_SD,) = self.in_transit
        return add_choices(self.home.finish(y_SD), self.plan.rows, self.num_tokens, self.most)
