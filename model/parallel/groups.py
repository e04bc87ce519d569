"""Process groups that a model is built on, as one object that is passed down.

Nothing in `model/` reads global state of torch.distributed or of Megatron: a block asks the groups that it was given. So one
process can hold models of different layouts, tests build a single-rank model without a process group, and code for one
rank and for many is the same.
"""

from __future__ import annotations

from megatron.core import process_groups_config

from amfm.model.parallel.row_room import RowRoom

AXES = ["tp", "pp", "mp", "cp", "tp_cp", "ep", "expt_tp", "expt_dp", "tp_ep", "dp", "dp_cp", "embd"]


class ProcessGroupCollection(process_groups_config.ProcessGroupCollection):
    """Megatron-core's groups, and how blocks use them.

    `tp` tensor, `ep` expert, `expt_tp` tensor inside experts, `expt_dp` data of experts, `cp` context, `pp` pipeline,
    `dp` data, `dp_cp` data x context (all ranks whose dense gradients are summed), `mp` tensor x pipeline, `tp_cp`
    tensor x context, `tp_ep` tensor inside experts x expert, `embd` the first and the last stage (None between them).
    With `sequence_parallel` the stream between blocks is [B, T of this tensor rank, D]. With `overlap_experts` half of the
    rows between experts travel while experts compute the other half. With `takes_turns` both halves of a micro-batch's rows pass
    the blocks in turns (model/turns.py). With a `row_room` these rows have places, and no one counts
    them on the host.
    """

    sequence_parallel: bool = False
    overlap_experts: bool = False
    takes_turns: bool = False
    row_room: RowRoom | None = None


class SingleRankGroup:
    """A group of this process alone, with what blocks ask of a process group and without torch.distributed.

    Code that would communicate asks for `size() > 1` first; handing this group to a collective is a bug.
    """

    def size(self) -> int:
        """Number of ranks in the group."""
        return 1

    def rank(self) -> int:
        """This process's rank in the group."""
        return 0


def single_rank_groups() -> ProcessGroupCollection:
    """Build groups of size 1 on every axis; needs no initialised process group. Any rank may call it alone."""
    return ProcessGroupCollection(**dict.fromkeys(AXES, SingleRankGroup()))
