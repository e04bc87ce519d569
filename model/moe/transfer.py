"""An all-to-all of rows between ranks, with other work in parallel, in forward and in backward.

Every rank of the group must call.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from amfm.kernels.low_precision.packed_rows import pack_rows, unpack_rows
from amfm.kernels.low_precision.recipe import recipe_of
from amfm.model.config.moe import MoeConfig
from amfm.model.parallel.groups import ProcessGroupCollection
from amfm.model.parallel.waits import waiting


@lru_cache(maxsize=256)
def expected_ranks(moe: MoeConfig, expert_ranks: int) -> float:
    """Ranks on which the experts of a token's choices are, as expected of an even router: rows that a token sends.

    K different experts out of E leave out the e of one rank with probability C(E - e, K) / C(E, K), since this many of all
    sets have none of them; P ranks are each reached with the rest of it. A router that draws from g of n groups of experts
    first opens, of the groups on a rank, j with the probability of j among g draws out of n (hypergeometric); then K are
    drawn from all experts of open groups, of which those on the rank are j groups' (of a group that is larger than a rank,
    the rank's).
    """
    groups, best = moe.num_router_groups, moe.router_group_top_k
    group_size = moe.num_experts // groups
    held, inside = max(1, groups // expert_ranks), min(group_size, moe.num_experts // expert_ranks)
    open_experts = best * group_size
    reached = 0.0
    for number in range(1, min(held, best) + 1):
        opened = math.comb(held, number) * math.comb(groups - held, best - number) / math.comb(groups, best)
        left_out = math.comb(open_experts - number * inside, moe.top_k) / math.comb(open_experts, moe.top_k)
        reached += opened * (1 - left_out)
    return expert_ranks * reached


@dataclass(frozen=True)
class HeldExperts:
    """The experts that this rank holds, and the groups over which tokens come to them.

    up [experts of this rank, F of this rank, D], down [experts of this rank, D, F of this rank]. sent_share: of tokens, the part
    that an even router sends to each rank of `groups.ep`.
    """

    up_eFD: Tensor
    down_eDF: Tensor
    groups: ProcessGroupCollection
    activation: str
    backend: str
    sent_share: float = 1.0

    def transfer(self, sent: list[int], received: list[int]) -> RowTransfer:
        """A transfer of rows to the ranks of their experts: as codes where their recipe says so."""
        recipe = recipe_of(self.up_eFD)
        packs = recipe is not None and recipe.dispatch == "fp8"
        return RowTransfer(self.groups.ep, sent, received, Packing(forward=packs, backend=self.backend))


def exchange_counts(counts_P: Tensor, groups: ProcessGroupCollection) -> Tensor:
    """Numbers [expt_tp, ep, ...] that each rank has for this one, from those that this one has for each of `ep`, [ep, ...].

    Integers on the device, where they stay. Every rank of `groups.ep` and `groups.expt_tp` must call.
    """
    counts_P = counts_P.contiguous()
    arrived_P = torch.empty_like(counts_P)
    with waiting():
        dist.all_to_all_single(arrived_P, counts_P, group=groups.ep)
    beside = groups.expt_tp.size()
    if beside == 1:
        return arrived_P[None]
    arrived_XP = arrived_P.new_empty(beside * len(arrived_P), *arrived_P.shape[1:])
    with waiting():
        dist.all_gather_into_tensor(arrived_XP, arrived_P, group=groups.expt_tp)
    return arrived_XP.unflatten(0, (beside, -1))


@dataclass(frozen=True)
class Packing:
    """Whether rows are sent as codes (kernels/low_precision/packed_rows.py) in a transfer's forward pass, and in its backward pass."""

    forward: bool = False
    backward: bool = False
    backend: str = "torch"


class RowTransfer:
    """An all-to-all of rows [S, D] in a group: `sent[r]` to rank r, in order, `received[r]` from it.

    Between `start` and `finish` the rows are under way and other work may be done, in backward too: there the transfer
    starts where `finish` stands and ends where `start` does. A transfer serves one forward and one backward pass.

    In backward `finish` launches the transfer of the gradient and hands it to `start` through the transfer object: autograd
    sees a gradient that flows from one node to the other and is not read in between.
    """

    def __init__(self, group: Any, sent: list[int], received: list[int], packing: Packing = Packing()) -> None:
        self.group, self.sent, self.received, self.packing = group, sent, received, packing
        self.in_transit: Any = None
        self.landing: tuple[Tensor, Tensor] | None = None  # codes that arrive, and rows that they become
        self.gradient: Tensor | None = None

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
        """Build the transfer that returns what this one brought; its gradient goes where this one's rows went, and as they."""
        packing = Packing(backward=self.packing.forward, backend=self.packing.backend)
        return RowTransfer(self.group, self.received, self.sent, packing)

    def launch(self, rows_SD: Tensor, sent: list[int], received: list[int], *, packs: bool) -> Tensor:
        """Launch the all-to-all; `wait` before reading the rows."""
        assert self.in_transit is None, "a transfer moves one batch of rows at a time"
        arrived_SD = rows_SD.new_empty(sum(received), rows_SD.shape[1])
        handed, landing = rows_SD.contiguous(), arrived_SD
        if packs:
            handed = pack_rows(handed, self.packing.backend)
            landing = handed.new_empty(sum(received), handed.shape[1])
            self.landing = landing, arrived_SD
        self.in_transit = dist.all_to_all_single(landing, handed, received, sent, group=self.group, async_op=True)
        return arrived_SD

    def wait(self) -> None:
        """Wait for the rows; on CUDA the stream waits, not the host."""
        with waiting():
            self.in_transit.wait()
        self.in_transit = None
        if self.landing is not None:
            unpack_rows(*self.landing, self.packing.backend)
            self.landing = None


class _AllToAllStart(torch.autograd.Function):
    """Launch the rows; backward waits for the gradient that `_AllToAllWait` sent on its way."""

    @staticmethod
    def forward(ctx: Any, rows_SD: Tensor, transfer: RowTransfer) -> Tensor:
        ctx.transfer = transfer
        return transfer.launch(rows_SD, transfer.sent, transfer.received, packs=transfer.packing.forward)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        transfer: RowTransfer = ctx.transfer
        gradient, transfer.gradient = transfer.gradient, None
        assert gradient is not None, "the rows' gradient is sent once, after the rows arrived"
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
        packs = transfer.packing.backward
        transfer.gradient = transfer.launch(gradients[0], transfer.received, transfer.sent, packs=packs)
        # Only of the right shape for autograd: `start` takes the gradient that was sent.
        return gradients[0], None


def sum_over_width_ranks(
    compute: Callable[..., Tensor], rows: Sequence[Tensor], received: list[int], group: Any
) -> Tensor:
    """Let every rank of `groups.expt_tp` compute from the rows of all, with its part of the inner width; sum what they give.

    rows: tensors [S, ...] of this rank, which `compute` takes, arrived or not, and gives as many rows for. received: rows of
    each rank. Every rank of the group must call.
    """
    ranks = group.size()
    if ranks == 1:
        return compute(*rows)
    transfers = [RowTransfer(group, [len(own)] * ranks, received) for own in rows]
    arrived = [transfer.run(own.repeat(ranks, 1)) for transfer, own in zip(transfers, rows)]
    return transfers[0].back().run(compute(*arrived)).unflatten(0, (ranks, -1)).sum(0)
