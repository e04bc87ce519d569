"""Master weights and moments as a run may look at and edit them between steps, whatever ZeRO made of them.

Between steps the numbers that count are the float32 master weights, and they are in flat ranges that are cut by tensor, expert,
pipeline and data ranks. `MasterView` says of each element in them where it is in the whole parameter. So norms of rows,
columns, heads or experts are sums over what is here, joined in one reduction, and setting a group to zero needs no message at
all. After an edit the model weights follow, as they do after a load (`refresh`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from amfm.model.parallel.shards import parameter_shards
from amfm.pretrain.checkpoint.engine_layout import EngineLayout, WriterAssignment
from amfm.pretrain.checkpoint.fragments import Fragment, collect_fragments, refresh_working_weights
from amfm.pretrain.engine.moments import AVERAGE

CHUNK_ELEMENTS = 1 << 20  # of a range whose places are computed at once


@dataclass(frozen=True)
class Grouping:
    """Groups of a parameter by one dim: the element at index i there is of group first + (i mod period) // width."""

    dim: int
    period: int
    width: int
    first: int

    def groups_at(self, index: Tensor) -> Tensor:
        """Group of each index along the dim."""
        return self.first + index % self.period // self.width


class MasterView:
    """The master weights of an engine on this rank, by place in the whole parameters; for between two steps.

    Every rank must make one alike and call its methods in the same order. `writers` choose one rank for what several hold.
    """

    def __init__(self, layout: EngineLayout, writers: WriterAssignment, rank: int) -> None:
        layout.engine.wait_for_weights()
        self.layout, self.writers, self.rank = layout, writers, rank
        self.fragments = collect_fragments(layout.engine.deepspeed, layout.parts, layout.averages)

    @torch.no_grad()
    def sum_groups(self, groupings: Mapping[str, Grouping], num_groups: int) -> Tensor:
        """Squares of the master weights summed by group, [num_groups] float64 on the CPU; the same on all ranks.

        `groupings`: of parameters by name. One reduction over all ranks.
        """
        device = self.fragments[0].tensors["weight"].device
        sums = torch.zeros(num_groups, dtype=torch.float64, device=device)
        for fragment in self.fragments:
            grouping = groupings.get(fragment.name)
            # What several ranks hold alike counts once.
            own = fragment.share(self.rank) if fragment.name in self.writers.parameters else None
            if grouping is None or own is None:
                continue
            for low, high, groups in self._groups_of(own, grouping):
                sums.index_add_(0, groups, own.tensors["weight"][low:high].double().square())
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            torch.distributed.all_reduce(sums)
        return sums.cpu()

    @torch.no_grad()
    def zero_groups(self, groupings: Mapping[str, Grouping], chosen: Tensor) -> None:
        """Set master weights and moments of the chosen groups to zero, [num_groups] bool; model weights follow."""
        for flats, low, high, kept in self._by_group(groupings, ~chosen):
            for flat in flats.values():
                flat[low:high].mul_(kept)
        self.refresh()

    @torch.no_grad()
    def scale_groups(self, groupings: Mapping[str, Grouping], factors: Tensor) -> None:
        """Multiply the master weights of each group by its factor, [num_groups], and leave moments; model weights follow."""
        for flats, low, high, factor in self._by_group(groupings, factors):
            flats["weight"][low:high].mul_(factor.to(flats["weight"].dtype))
        self.refresh()

    @torch.no_grad()
    def write(self, values: Mapping[str, Tensor]) -> None:
        """Put whole tensors instead of these master weights, with zero moments; model weights follow."""
        module, groups = self.layout.engine.module, self.layout.engine.groups
        shards = {name: shard for name, _, shard in parameter_shards(module)}
        for fragment in self.fragments:
            if fragment.name in values:
                own = shards[fragment.name].shard(values[fragment.name], groups).reshape(-1)
                for kind, flat in fragment.tensors.items():
                    if kind in ("weight", AVERAGE):
                        flat.copy_(own[fragment.start : fragment.start + fragment.numel])
                    else:
                        flat.zero_()
        self.refresh()

    def refresh(self) -> None:
        """Let the model weights follow the master weights; data ranks gather them."""
        refresh_working_weights(self.layout.engine)

    def _by_group(
        self, groupings: Mapping[str, Grouping], values: Tensor
    ) -> Iterator[tuple[dict[str, Tensor], int, int, Tensor]]:
        """Yield a fragment's tensors, a piece of them, and of each element there its group's value."""
        for fragment in self.fragments:
            grouping = groupings.get(fragment.name)
            if grouping is None:
                continue
            here = values.to(fragment.tensors["weight"].device)
            for low, high, groups in self._groups_of(fragment, grouping):
                yield fragment.tensors, low, high, here[groups]

    def _groups_of(self, fragment: Fragment, grouping: Grouping) -> Iterator[tuple[int, int, Tensor]]:
        """Yield pieces of a fragment, from element `low` to `high` of it, with the group of each element."""
        placement = self.layout.placements[fragment.name]
        shape, device = placement.shape, fragment.tensors["weight"].device
        stride = 1
        for size in shape[grouping.dim + 1 :]:
            stride *= size
        # Group of each index along the dim in this rank's shard, whose intervals of the whole stand one after the other.
        whole = torch.cat([torch.arange(low, high) for low, high in placement.intervals[grouping.dim]])
        groups = grouping.groups_at(whole).to(device)
        for low in range(0, fragment.numel, CHUNK_ELEMENTS):
            high = min(low + CHUNK_ELEMENTS, fragment.numel)
            flat = torch.arange(fragment.start + low, fragment.start + high, device=device)
            yield low, high, groups[flat // stride % shape[grouping.dim]]
