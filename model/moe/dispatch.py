"""Expert parallelism: sends tokens to the ranks that hold their experts and back, over `groups.ep` and `groups.expt_tp`.

Every rank comes with its own tokens and their choices. Rows are sent to the ranks of `groups.ep` that hold the experts,
where each rank of `groups.expt_tp` with the same experts gets the rows of all, computes its part of the inner width,
and returns sums, which are sent back. Without a capacity a row goes to each rank that a token has chosen an expert of
(`by_rank.py`), and nothing is dropped or computed in vain; under a capacity factor rows are in slots whose number is
known, and nothing waits. An expert, or a rank, that gets nothing is not an exception. Results do not
depend on the order of arrival.

What runs meanwhile: the caller's work `while_out` is done while rows are on their way out, `while_home` while results
return. With `groups.overlap_experts` tokens, or slots, are cut in two halves: experts compute the first while the
second is sent out, and the second while the first returns. And a caller may do other work wherever rows have set out
(`dispatch_steps`; model/mtp.py lets the other half of a micro-batch's rows pass blocks there). Backward mirrors it,
because a transfer's gradient starts where the transfer ended.

The module is left out of compiled graphs: the number of rows differs at each call. Every rank of both groups must call, forward
and backward.

Rows by slot: under a capacity factor every sender has as many slots for each expert, so nothing need be counted.

No expert takes more than this many rows of a sender: splits of the all-to-alls are equal and known beforehand, counts stay on
the device, and nothing waits. A slot that no choice fills carries a row that no one adds up. A row goes for each
choice; with one expert a rank that is one per rank too. Results return as they are and are summed by weight there.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any, NotRequired, TypedDict, Unpack

import torch
from torch import Tensor

from amfm.kernels.moe.op import grouped_feed_forward
from amfm.kernels.moe.rows.op import combine_choices, gather_choices, put_in_slots, sort_choices, sort_rows
from amfm.kernels.runtime.compiling import disable_compile
from amfm.model.moe.by_rank import RowsByRank
from amfm.model.moe.transfer import HeldExperts, exchange_counts, sum_over_width_ranks


class RowsBySlot:
    """Tokens [R, D] on their way to the experts of their choices and back, in parts of which each is sent on its own.

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
        self.in_transit = self.transfer.start(rows_SD)

    def compute(self) -> None:
        """Wait for the rows, compute their experts, and send the results back."""
        rows_SD = self.transfer.finish(self.in_transit)
        group = self.experts.groups.expt_tp
        y_SD = sum_over_width_ranks(self._feed_forward, [rows_SD], [len(rows_SD)] * group.size(), group)
        self.home = self.transfer.back()
        self.in_transit = self.home.start(y_SD)

    def _feed_forward(self, rows_SD: Tensor) -> Tensor:
        """Feed-forward of rows [S, D] sorted by sender and then by expert; the result [S, D] keeps their order.

        The products take rows only by expert, so that each expert is one product of a grouped matrix multiplication however
        many ranks sent to it. The sums are partial where `expt_tp` has several ranks.
        """
        counts_Xe, backend = self.counts_Xe, self.experts.backend
        num_local = counts_Xe.shape[1]
        experts_e = torch.arange(num_local, device=rows_SD.device)
        counts_e = counts_Xe.sum(0)
        # Empty slots sort last. Kernels do not touch rows beyond the counts; else they are the last expert's.
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
        return self.home.finish(self.in_transit)


class DispatchArguments(TypedDict):
    """What is sent and what is done meanwhile.

    x [R, D], only of this rank; expert ids [R, K] in the numbering of all experts, where the number of experts itself marks a
    lost choice, which sends nothing; weights [R, K]. `while_home` gets what `while_out` gave. `slots`: of each rank for each
    expert, at least as many as it has choices of one; None: rows go by rank.
    """

    x_RD: Tensor
    expert_ids_RK: Tensor
    weights_RK: Tensor
    experts: HeldExperts
    while_out: Callable[[], Any]
    while_home: Callable[[Any], Any]
    slots: NotRequired[int | None]


@disable_compile
def dispatch_feed_forward(**arguments: Unpack[DispatchArguments]) -> tuple[Tensor, Any]:
    """Sum weight times expert over each token's choices, [R, D], and call the other work while rows are sent; returns both.

    Sums are in float32 at least. Four all-to-alls of rows at most, each once more in backward: out over `ep`, over `expt_tp` and
    back, home over `ep`.
    """
    steps = dispatch_steps(**arguments)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            done: tuple[Tensor, Any] = end.value
            return done


def dispatch_steps(
    x_RD: Tensor,
    expert_ids_RK: Tensor,
    weights_RK: Tensor,
    experts: HeldExperts,
    while_out: Callable[[], Any],
    while_home: Callable[[Any], Any],
    slots: int | None = None,
) -> Generator[None, None, tuple[Tensor, Any]]:
    """The same, pausing when rows have set out, and when sums have set out back: whoever calls may do more there."""
    num_parts = 2 if experts.groups.overlap_experts else 1
    given = x_RD, expert_ids_RK, weights_RK, experts, num_parts
    rows: RowsByRank | RowsBySlot = RowsByRank(*given) if slots is None else RowsBySlot(*given, slots)
    half = while_out()
    yield
    for part in rows.parts:
        part.compute()
    other = while_home(half)
    yield
    return rows.collect(), other
