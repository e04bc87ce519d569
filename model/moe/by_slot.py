"""Rows by slot: under a capacity factor every sender has as many slots for each expert, so nothing need be counted.

No expert takes more than this many rows of a sender: splits of the all-to-alls are equal and known beforehand, counts stay on
the device, and nothing waits. A slot that no choice fills carries a row that no one adds up. A row goes for each
choice; with one expert a rank that is one per rank too. Results go home as they are and are summed by weight there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from amfm.kernels.moe.op import grouped_feed_forward
from amfm.kernels.moe.rows.op import combine_choices, gather_choices, put_in_slots, sort_choices, sort_rows
from amfm.model.moe.transfer import HeldExperts, exchange_counts, sum_over_width_ranks


class RowsBySlot:
    """Tokens [R, D] on their way to the experts of their choices and back, in parts of which each travels on its own.

    expert ids [R, K] and weights [R, K] as in `RowsByRank`; slots: of each rank for each expert, at least as many as it has
    choices of one. Parts have an equal share of every expert's slots. Making it sends all parts. Every rank of `groups.ep` and
    `groups.expt_tp` must call everything here.
    """

    def __init__(
        self,
        x_RD: Tensor,
        expert_ids_RK: Tensor,
        weights_RK: Tensor,
        experts: HeldExperts,
        num_parts: int,
        slots: int,
    ) -> None:
        ranks, num_local = experts.groups.ep.size(), len(experts.up_eFD)
        num_experts, width = ranks * num_local, -(-slots // num_parts)
        # Lost choices are one expert more, which sorts last.
        choices = sort_choices(expert_ids_RK, num_experts + 1, backend=experts.backend)
        counts_Pe = choices.counts_E[:num_experts].view(ranks, num_local)
        arrived_Xe = exchange_counts(counts_Pe, experts.groups).flatten(0, 1)
        self.choices = put_in_slots(choices, expert_ids_RK, num_parts * width, num_parts)
        self.weights_RK = weights_RK
        rows_SD = gather_choices(x_RD, self.choices, num_experts * num_parts * width, expert_ids_RK.shape[1])
        self.parts = [
            _Part(part_SD, (arrived_Xe - number * width).clamp(0, width), width, experts)
            for number, part_SD in enumerate(rows_SD.chunk(num_parts))
        ]

    def collect(self) -> Tensor:
        """Sum of each token's experts by weight, [R, D]."""
        rows = [part.collect() for part in self.parts]
        return combine_choices(rows[0] if len(rows) == 1 else torch.cat(rows), self.choices, self.weights_RK)


class _Part:
    """Rows [ep * e * slots, D], `slots` for each expert; made, they are under way.

    counts_Xe [expt_tp * ep, e]: filled slots, which come first, by sender and expert of this rank.
    """

    def __init__(self, rows_SD: Tensor, counts_Xe: Tensor, slots: int, experts: HeldExperts) -> None:
        self.experts, self.counts_Xe, self.slots = experts, counts_Xe, slots
        splits = [counts_Xe.shape[1] * slots] * experts.groups.ep.size()
        self.transfer = experts.transfer(splits, splits)
        self.under_way = self.transfer.start(rows_SD)

    def compute(self) -> None:
        """Wait for the rows, compute their experts, and send the results home."""
        rows_SD = self.transfer.finish(self.under_way)
        group = self.experts.groups.expt_tp
        y_SD = sum_over_width_ranks(self._feed_forward, [rows_SD], [len(rows_SD)] * group.size(), group)
        self.home = self.transfer.back()
        self.under_way = self.home.start(y_SD)

    def _feed_forward(self, rows_SD: Tensor) -> Tensor:
        """Feed-forward of rows [S, D] sorted by sender and then by expert; the result [S, D] keeps their order.

        The products take rows by expert alone, so that each expert is one product of a grouped matrix multiplication however
        many ranks sent to it. The sums are partial where `expt_tp` has several ranks.
        """
        counts_Xe, backend = self.counts_Xe, self.experts.backend
        num_local = counts_Xe.shape[1]
        experts_e = torch.arange(num_local, device=rows_SD.device)
        counts_e = counts_Xe.sum(0)
        # Empty slots sort last. Kernels leave rows beyond the counts alone; else they are the last expert's.
        is_filled_XeN = torch.arange(self.slots, device=rows_SD.device) < counts_Xe[:, :, None]
        expert_S = torch.where(is_filled_XeN, experts_e[:, None], num_local).flatten()
        if backend != "triton" or rows_SD.device.type == "cpu":
            counts_e = counts_e + (experts_e == num_local - 1) * (len(rows_SD) - counts_e.sum())
        return grouped_feed_forward(
            rows_SD,
            counts_e,
            self.experts.up_eFD,
            self.experts.down_eDF,
            activation=self.experts.activation,
            sources_R=sort_rows(expert_S, num_local + 1, backend=backend),
            backend=backend,
        )

    def collect(self) -> Tensor:
        """Wait for the results."""
        return self.home.finish(self.under_way)
