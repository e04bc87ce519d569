"""Expert parallelism: sends tokens to the ranks that hold their experts and back, over `groups.ep` and `groups.expt_tp`.

Every rank comes with tokens of its own and their choices. Rows (one a token and choice) travel sorted by expert, after
their numbers: to the rank of `groups.ep` that holds the expert, where each rank of `groups.expt_tp` with the same experts
gets the rows of all, computes its part of the inner width, and gives back sums; then home, where each token adds up its
rows by weight. Splits are as uneven as the router makes them; an expert, or a rank, that gets nothing is no exception.

Without a capacity rows are sent without padding: the counts are exchanged first, which waits for the device once a layer,
and nothing is dropped or computed in vain. Under a capacity factor no expert takes more than so many rows of a sender, so
every sender has as many slots for each expert (`slots`): splits are equal and known beforehand, counts stay on the device,
and nothing waits. A slot that no choice fills carries a row that nobody adds up. Copies, sorting and sums are
`kernels/moe/rows`; sums over a token's choices are made in the order of its choices, so results do not depend on the order of
arrival. The module is left out of compiled graphs: the number of rows differs at each call.

Every rank of both groups must call, forward and backward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.moe.op import grouped_feed_forward
from kernels.moe.rows.op import combine_choices, gather_choices, put_in_slots, sort_choices, sort_rows
from model.parallel.groups import ProcessGroupCollection

Overlapped = TypeVar("Overlapped")


@torch.compiler.disable
def dispatch_feed_forward(
    x_RD: Tensor,
    expert_ids_RK: Tensor,
    weights_RK: Tensor,
    up_eFD: Tensor,
    down_eDF: Tensor,
    groups: ProcessGroupCollection,
    *,
    activation: str,
    backend: str,
    overlap_fn: Callable[[], Overlapped],
    slots: int | None = None,
) -> tuple[Tensor, Overlapped]:
    """Sum weight times expert over each token's choices, and call `overlap_fn()` while rows travel; returns both.

    `slots`: of each rank for each expert, at least as many as it has choices of one; None: as many as there are.

    Shapes: x [R, D], of this rank alone; expert ids [R, K] in the numbering of all experts, where the number of experts
    itself marks a lost choice, which sends nothing; weights [R, K]; up [experts of this rank, F of this rank, D], down
    [experts of this rank, D, F of this rank] -> [R, D]. Sums are in float32 at least.

    Four all-to-alls of rows at most, each once more in backward: out over `ep`, over `expt_tp` and back, home over `ep`.
    """
    num_experts = up_eFD.shape[0] * groups.ep.size()
    # Lost choices are one expert more, which sorts last: the first num_sent places leave them out.
    choices = sort_choices(expert_ids_RK, num_experts + 1, backend=backend)
    counts_E = choices.counts_E[:num_experts]
    if slots is None:
        plan = exchange_counts(counts_E, groups)
    else:
        plan = plan_slots(counts_E, slots, groups)
        choices = put_in_slots(choices, expert_ids_RK, slots)
    rows_SD = gather_choices(x_RD, choices, plan.num_sent, expert_ids_RK.shape[1])
    going = RowTransfer(groups.ep, plan.sent, plan.received)
    rows_SD = going.start(rows_SD)
    other = overlap_fn()
    rows_SD = going.finish(rows_SD)
    # Each rank of expt_tp has a part of the inner width: the rows of all go to all, and their sums come back.
    spread = RowTransfer(groups.expt_tp, [len(rows_SD)] * groups.expt_tp.size(), plan.received_beside)
    rows_SD = rows_SD if spread.is_local else spread.run(rows_SD.repeat(groups.expt_tp.size(), 1))
    y_SD = _local_experts(rows_SD, plan, up_eFD, down_eDF, activation, backend)
    if not spread.is_local:
        y_SD = spread.back().run(y_SD).unflatten(0, (groups.expt_tp.size(), -1)).sum(0)
    y_SD = going.back().run(y_SD)
    return combine_choices(y_SD, choices, weights_RK), other


def _local_experts(
    rows_SD: Tensor, plan: RowPlan, up_eFD: Tensor, down_eDF: Tensor, activation: str, backend: str
) -> Tensor:
    """Feed-forward of rows [S, D] sorted by sender and then by expert; the result [S, D] keeps their order.

    The products take rows by expert alone, so that each expert is one product of a grouped matrix multiplication however
    many ranks sent to it. The sums are partial where `expt_tp` has several ranks.
    """
    counts_Xe = plan.arrived_Xe
    senders, num_local = counts_Xe.shape
    experts_e = torch.arange(num_local, device=rows_SD.device)
    counts_e = counts_Xe.sum(0)
    if plan.slots is None:
        expert_S = experts_e.repeat(senders).repeat_interleave(counts_Xe.flatten(), output_size=len(rows_SD))
    else:
        # Empty slots sort last. Kernels leave rows beyond the counts alone; else they are the last expert's.
        is_filled_XeN = torch.arange(plan.slots, device=rows_SD.device) < counts_Xe[:, :, None]
        expert_S = torch.where(is_filled_XeN, experts_e[:, None], num_local).flatten()
        if backend != "triton" or rows_SD.device.type == "cpu":
            counts_e = counts_e + (experts_e == num_local - 1) * (len(rows_SD) - counts_e.sum())
    return grouped_feed_forward(
        rows_SD,
        counts_e,
        up_eFD,
        down_eDF,
        activation=activation,
        sources_R=sort_rows(expert_S, num_local + 1, backend=backend),
        backend=backend,
    )


@dataclass(frozen=True)
class RowPlan:
    """How many rows go where.

    sent, received [ep]: rows to and from each expert rank. received_beside [expt_tp]: rows that each rank with the same
    experts got from `ep`. arrived_Xe [expt_tp * ep, e] int64: rows of each of those, by sender X and expert e of this rank.
    Lists are on the host, where the splits of an all-to-all must be. slots: rows from each sender for each expert, filled
    or not; None: as many as arrived_Xe says.
    """

    sent: list[int]
    received: list[int]
    received_beside: list[int]
    arrived_Xe: Tensor
    slots: int | None = None

    @property
    def num_sent(self) -> int:
        """Rows that leave this rank: all choices but the dropped."""
        return sum(self.sent)


def exchange_counts(counts_E: Tensor, groups: ProcessGroupCollection) -> RowPlan:
    """Tell every rank how many of this rank's rows come to each of its experts. Waits for the device once.

    counts_E [E] int64: this rank's choices of each expert. Every rank of `groups.ep` and `groups.expt_tp` must call.
    """
    ranks = groups.ep.size()
    arrived_Xe = _send_counts(counts_E, groups)
    # All counts that the host needs in one copy: each copy would wait for the device.
    totals = torch.cat([counts_E.view(ranks, -1).sum(1), arrived_Xe.sum(1)]).tolist()
    sent, received = totals[:ranks], [totals[start : start + ranks] for start in range(ranks, len(totals), ranks)]
    return RowPlan(sent, received[groups.expt_tp.rank()], [sum(rows) for rows in received], arrived_Xe)


def plan_slots(counts_E: Tensor, slots: int, groups: ProcessGroupCollection) -> RowPlan:
    """The plan of rows in `slots` slots a sender and expert, which the host knows; the counts travel and stay on the device.

    Every rank of `groups.ep` and `groups.expt_tp` must call.
    """
    ranks, beside = groups.ep.size(), groups.expt_tp.size()
    rows = len(counts_E) // ranks * slots
    return RowPlan([rows] * ranks, [rows] * ranks, [rows * ranks] * beside, _send_counts(counts_E, groups), slots)


def _send_counts(counts_E: Tensor, groups: ProcessGroupCollection) -> Tensor:
    """Rows [expt_tp * ep, e] of each sender for each expert of this rank, from every rank's counts [E]."""
    ranks, beside = groups.ep.size(), groups.expt_tp.size()
    arrived_Xe = torch.empty_like(counts_E)
    dist.all_to_all_single(arrived_Xe, counts_E.contiguous(), group=groups.ep)
    if beside > 1:
        own, arrived_Xe = arrived_Xe, arrived_Xe.new_empty(beside * arrived_Xe.numel())
        dist.all_gather_into_tensor(arrived_Xe, own, group=groups.expt_tp)
    return arrived_Xe.view(beside * ranks, -1)


class RowTransfer:
    """An all-to-all of rows [S, D] in a group: `sent[r]` to rank r, in order, `received[r]` from it.

    Between `start` and `finish` the rows are under way and other work may be done, in backward too: there the transfer
    starts where `finish` stands and ends where `start` does. A transfer serves one forward and one backward pass.

    In backward `finish` launches the transfer of the gradient and hands it to `start` through the transfer object: autograd
    sees a gradient that flows from one node to the other and is not read in between.
    """

    def __init__(self, group: Any, sent: list[int], received: list[int]) -> None:
        self.group, self.sent, self.received = group, sent, received
        self.under_way: Any = None
        self.gradient: Tensor | None = None

    @property
    def is_local(self) -> bool:
        """Whether there is no other rank."""
        return bool(self.group.size() == 1)

    def start(self, rows_SD: Tensor) -> Tensor:
        """Start sending; returns the buffer whose rows will have arrived after `finish`."""
        arrived_SD: Tensor = _AllToAllStart.apply(rows_SD, self)
        return arrived_SD

    def finish(self, rows_SD: Tensor) -> Tensor:
        """Wait for the rows that `start` returned."""
        arrived_SD: Tensor = _AllToAllWait.apply(rows_SD, self)
        return arrived_SD

    def run(self, rows_SD: Tensor) -> Tensor:
        """Send and wait: `start` and `finish` in one."""
        return self.finish(self.start(rows_SD))

    def back(self) -> RowTransfer:
        """Build the transfer that returns what this one brought."""
        return RowTransfer(self.group, self.received, self.sent)

    def launch(self, rows_SD: Tensor, sent: list[int], received: list[int]) -> Tensor:
        """Launch the all-to-all; `wait` before reading the rows."""
        assert self.under_way is None, "a transfer moves one batch of rows at a time"
        arrived_SD = rows_SD.new_empty(sum(received), rows_SD.shape[1])
        self.under_way = dist.all_to_all_single(
            arrived_SD, rows_SD.contiguous(), received, sent, group=self.group, async_op=True
        )
        return arrived_SD

    def wait(self) -> None:
        """Wait for the rows; on CUDA the stream waits, not the host."""
        self.under_way.wait()
        self.under_way = None


class _AllToAllStart(torch.autograd.Function):
    """Launch the rows; backward waits for the gradient that `_AllToAllWait` sent on its way."""

    @staticmethod
    def forward(ctx: Any, rows_SD: Tensor, transfer: RowTransfer) -> Tensor:
        ctx.transfer = transfer
        return transfer.launch(rows_SD, transfer.sent, transfer.received)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        transfer: RowTransfer = ctx.transfer
        gradient, transfer.gradient = transfer.gradient, None
        assert gradient is not None, "the rows' gradient travels once, after the rows arrived"
        transfer.wait()
        return gradient, None


class _AllToAllWait(torch.autograd.Function):
    """Wait for the rows; backward launches their gradient the other way, and what runs until `start` overlaps with it."""

    @staticmethod
    def forward(ctx: Any, rows_SD: Tensor, transfer: RowTransfer) -> Tensor:
        ctx.transfer = transfer
        transfer.wait()
        return rows_SD.view_as(rows_SD)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        transfer: RowTransfer = ctx.transfer
        transfer.gradient = transfer.launch(gradients[0], transfer.received, transfer.sent)
        # Only of the right shape for autograd: `start` takes the gradient that travelled.
        return gradients[0], None
