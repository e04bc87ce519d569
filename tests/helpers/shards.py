"""Whole tensors from the parts that ranks hold."""

from __future__ import annotations

import torch
import torch.distributed
from torch import Tensor

from amfm.model.parallel.groups import ProcessGroupCollection
from amfm.model.parallel.shards import Shard


def join_parts(part: Tensor, shard: Shard, groups: ProcessGroupCollection, *, alike: bool = True) -> Tensor:
    """The whole tensor from all ranks' parts. Every rank of the cut axes must call this.

    `alike`: fail where copies of the same values are not the same bitwise.
    """
    for cut in reversed(shard.cuts):
        group = getattr(groups, cut.axis)
        if group.size() > 1:
            parts = [torch.empty_like(part) for _ in range(group.size())]
            torch.distributed.all_gather(parts, part.contiguous(), group=group)
            part = cut.unshard(parts)
            taken = [cut.shard(part, rank, group.size()) for rank in range(group.size())]
            assert not alike or all(map(torch.equal, taken, parts)), f"copies differ between ranks of {cut}"
    return part
