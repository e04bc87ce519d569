"""The process groups that a model is built on, as one object that is passed down.

The object is Megatron-core's `ProcessGroupCollection`; of its fields the blocks read `tp` (tensor parallel).
"""

from __future__ import annotations

from megatron.core.process_groups_config import ProcessGroupCollection

__all__ = ["ProcessGroupCollection", "SingleRankGroup", "single_rank_groups"]


class SingleRankGroup:
    """A group of this process alone: what blocks ask of a process group, without torch.distributed."""

    def size(self) -> int:
        """Ranks in the group."""
        return 1

    def rank(self) -> int:
        """This process's place in the group."""
        return 0


def single_rank_groups() -> ProcessGroupCollection:
    """Groups of size 1 on every axis; needs no initialised process group. Any rank may call it alone."""
    group = SingleRankGroup()
    return ProcessGroupCollection(tp=group, pp=group, cp=group, ep=group, expt_tp=group, dp=group)
