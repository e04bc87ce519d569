"""Whole tensors from the parts that ranks hold, and the traffic of all of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed
from amfm_simulate.count_collectives import Traffic
from torch import Tensor

from amfm.model.parallel.groups import ProcessGroupCollection
from amfm.model.parallel.shards import Shard, ShardSpec


def unshard(cut: ShardSpec, parts: Sequence[Tensor]) -> Tensor:
    """Join the parts of all ranks of the axis, in rank order, to the tensor whole along `dim`; of copies the first counts."""
    size = len(parts)
    pieces = [part.split(list(cut.local_segments(size)), dim=cut.dim) for part in parts]
    columns = [
        torch.cat([column[index * size // slices] for index in range(slices)], dim=cut.dim)
        for column, slices in zip(zip(*pieces), cut.slices(size))
    ]
    return torch.cat(columns, dim=cut.dim)


def join_parts(part: Tensor, shard: Shard, groups: ProcessGroupCollection, *, alike: bool = True) -> Tensor:
    """The whole tensor from all ranks' parts. Every rank of the cut axes must call this.

    `alike`: fail where copies of the same values are not the same bitwise.
    """
    for cut in reversed(shard.cuts):
        group = getattr(groups, cut.axis)
        if group.size() > 1:
            parts = [torch.empty_like(part) for _ in range(group.size())]
            torch.distributed.all_gather(parts, part.contiguous(), group=group)
            part = unshard(cut, parts)
            taken = [cut.shard(part, rank, group.size()) for rank in range(group.size())]
            assert not alike or all(map(torch.equal, taken, parts)), f"copies differ between ranks of {cut}"
    return part


def sum_traffic(ranks: Iterable[Sequence[Traffic]]) -> list[Traffic]:
    """Sum of the traffic of several ranks or blocks, row by row."""
    totals: dict[tuple[str, str, str], Traffic] = {}
    for row in (row for rows in ranks for row in rows):
        key = (row.axis, row.collective, row.dtype)
        total = totals.get(key, Traffic(*key, 0, 0, 0))
        totals[key] = Traffic(
            *key,
            total.calls + row.calls,
            total.handed_bytes + row.handed_bytes,
            total.sent_bytes + row.sent_bytes,
        )
    return [totals[key] for key in sorted(totals)]
