"""Process groups that a model is built on, as one object that is passed down.

Nothing in `model/` reads global state of torch.distributed or of Megatron: a block asks the groups that it was given. So one
process can hold models of different layouts, tests build a single-rank model without a process group, and code for one
rank and for many is the same.

Room for the rows of spread experts: as many places as an uneven router fills, so that the host need not count rows.

How many rows go where follows from the router, and a host that must know waits for the device once per block. With room every
pair of ranks exchanges, and every rank computes, a number of places that follows only from sizes: `shares` times what an even
router fills, and no more than any router can. Counts stay on the device, empty places are skipped by the products, and
each rank notes there whether rows or choices had no place. The step reads that with everything else that it reports: where it
happened on any rank, all gradients of the step are thrown away and its passes taken again with counted rows
(pretrain/step.py). So no token is ever dropped, and a router that turns uneven costs only time. After that, rows are counted
until the buffers would have sufficed for some consecutive steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property

import torch
from megatron.core import process_groups_config
from torch import Tensor

FITTING_STEPS = 8  # in a row, before room is used again


class RowCapacity:
    """How much room there is, whether passes use it, and whether it was enough; one for all blocks of a rank.

    `shares`: places in even shares, at least 1. `device`: where `missed` counts.
    """

    def __init__(self, shares: float, device: torch.device) -> None:
        self.shares, self.device = shares, device
        self.is_open = False
        self.fitting = FITTING_STEPS

    @cached_property
    def missed(self) -> Tensor:
        """Times that rows or choices of this rank had no place, or would have had none, since a step's passes began; int64."""
        return torch.zeros((), dtype=torch.int64, device=self.device)

    @property
    def is_used(self) -> bool:
        """Whether rows take places: in the passes of a step, whose gradients can be thrown away."""
        return self.is_open and self.fitting >= FITTING_STEPS

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Inside the block are the passes of a step, of which `count_missed` is given whether rows had places."""
        self.missed.zero_()
        self.is_open = True
        try:
            yield
        finally:
            self.is_open = False

    def was_short(self, missed: int) -> bool:
        """Whether passes in which all ranks missed this many places must be taken again; rows that were counted had theirs."""
        return self.fitting >= FITTING_STEPS and missed > 0

    def count_missed(self, missed: int) -> bool:
        """Take what all ranks have missed in a step's passes; whether those must be taken again. The same on every rank."""
        is_short = self.was_short(missed)
        self.fitting = 0 if missed else self.fitting + 1
        return is_short

    def note(self, has_missed: Tensor) -> None:
        """Note that this happened, a boolean on the device."""
        self.missed += has_missed


def opened(capacity: RowCapacity | None) -> AbstractContextManager[None]:
    """A context of the passes of a step (`RowCapacity.opened`), if there is a capacity."""
    return nullcontext() if capacity is None else capacity.opened()


def count_places(shares: float, tokens: int, top_k: int, sent_share: float, ranks: int, held: int) -> tuple[int, int]:
    """Places for rows between each pair of ranks, and for choices of one rank's experts in the rows of all.

    There are `ranks` ranks with `held` experts each and `tokens` tokens of `top_k` choices each, of which an even router sends
    the part `sent_share` to every rank.
    """
    rows = min(tokens, math.ceil(shares * sent_share * tokens))
    return rows, min(ranks * rows * min(top_k, held), math.ceil(shares * tokens * top_k))


AXES = ["tp", "pp", "mp", "cp", "tp_cp", "ep", "expt_tp", "expt_dp", "tp_ep", "dp", "dp_cp", "embd"]


class ProcessGroupCollection(process_groups_config.ProcessGroupCollection):
    """Megatron-core's groups, and how blocks use them.

    `tp` tensor, `ep` expert, `expt_tp` tensor inside experts, `expt_dp` data of experts, `cp` context, `pp` pipeline,
    `dp` data, `dp_cp` data x context (all ranks whose dense gradients are summed), `mp` tensor x pipeline, `tp_cp`
    tensor x context, `tp_ep` tensor inside experts x expert, `embd` the first and the last stage (None between them).
    With `sequence_parallel` the residual stream between blocks is [B, T of this tensor rank, D]. With `overlap_experts` half of the
    rows between experts are sent while experts compute the other half. With `two_batch` the two halves of a micro-batch
    alternate through the blocks (model/mtp.py). With a `row_capacity` these rows have places, and no one counts
    them on the host.
    """

    sequence_parallel: bool = False
    overlap_experts: bool = False
    two_batch: bool = False
    row_capacity: RowCapacity | None = None


class SingleRankGroup:
    """A group of only this process, with what blocks ask of a process group and without torch.distributed.

    Code that would communicate asks for `size() > 1` first; handing this group to a collective is a bug.
    """

    def size(self) -> int:
        """Number of ranks in the group."""
        return 1

    def rank(self) -> int:
        """This process's rank in the group."""
        return 0


def single_rank_groups() -> ProcessGroupCollection:
    """Build groups of size 1 on every axis; needs no initialised process group. Any rank may call it on its own."""
    return ProcessGroupCollection(**dict.fromkeys(AXES, SingleRankGroup()))
