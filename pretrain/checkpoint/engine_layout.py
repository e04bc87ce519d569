"""What one rank holds of an engine's state: the layout that saving and loading share.

DeepSpeed's wrappers keep the same state in different ways, and each parallel axis cuts parameters in its own. Both
questions are answered here, once for an engine, because nothing of the answer changes while it lives: saving asks which
ranges this rank writes, loading which ranges it must fill.

Which of several ranks with the same shard writes it: one writer for everything in a checkpoint.

The choice depends only on the layout, so it is agreed on once for an engine, and a background saver's saves need no message for it.

A run may look at and edit master weights and moments between steps, whatever ZeRO made of them.

The numbers that count are the float32 master weights, and they are in flat ranges that are cut by tensor, expert,
pipeline and data ranks. `MasterView` says of each element in them where it is in the whole parameter. So norms of rows,
columns, heads or experts are sums over what is here, joined in one reduction, and setting a group to zero needs no message at
all. After an edit the model weights follow, as they do after a load (`refresh`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from amfm.model.parallel.shards import parameter_shards
from amfm.pretrain.checkpoint.fragments import (
    Fragment,
    base_optimizer,
    collect_fragments,
    name_groups,
    owned_states,
    refresh_working_weights,
)
from amfm.pretrain.checkpoint.placement import Placement, locate_rank, place_shard
from amfm.pretrain.engine.adamw import AVERAGE, FROZEN
from amfm.pretrain.engine.engine import ZeroEngine
from amfm.pretrain.engine.parts import Part, list_parts, list_ranks, parameter_shape
from amfm.pretrain.ranks.group import RankGroup


@dataclass(frozen=True)
class EngineLayout:
    """The state of an engine on this rank; building it communicates nothing.

    parts: the tensors that the optimizer steps, with the parameter ranges inside each. group_labels: of the optimizer's
    parameter groups, in its order. placements: where this rank's shard of each parameter is in the whole one.
    coordinates: its place on each axis that cuts the parameter. dtypes: of the parameters. All by global name.
    buffer_names: of the buffers that belong to the state (router bias and the like), and of the states of whole matrices that
    this rank owns. frozen: parameters that nothing
    steps, with the ranks that hold the same shard of each. averages: flat float32 averages of the master weights of parts, by the
    part's number, which a hook keeps (hooks/weight_averages.py); saved and restored like moments.
    """

    engine: ZeroEngine
    parts: tuple[Part, ...]
    group_labels: tuple[str, ...]
    placements: dict[str, Placement]
    coordinates: dict[str, dict[str, int]]
    dtypes: dict[str, torch.dtype]
    buffer_names: tuple[str, ...]
    frozen: dict[str, tuple[int, ...]] = field(default_factory=dict)
    averages: dict[int, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, engine: ZeroEngine) -> EngineLayout:
        """Read the layout of an engine; asserts that its optimizer holds every trainable parameter."""
        parameters = list(parameter_shards(engine.module))
        named = {name for name, _ in engine.module.named_parameters(remove_duplicate=False)}
        return cls(
            engine=engine,
            parts=tuple(list_parts(engine.deepspeed)),
            group_labels=tuple(name_groups(base_optimizer(engine.deepspeed))),
            placements={
                name: place_shard(parameter_shape(parameter), shard, engine.groups)
                for name, parameter, shard in parameters
            },
            coordinates={name: locate_rank(shard, engine.groups) for name, _, shard in parameters},
            dtypes={name: parameter.dtype for name, parameter, _ in parameters},
            buffer_names=(
                *(name for name in engine.module.state_dict(keep_vars=True) if name not in named),
                *owned_states(engine.deepspeed),
            ),
            frozen={
                name: list_ranks(engine.groups.expt_dp if shard.per_expert else engine.groups.dp_cp)
                for name, parameter, shard in parameters
                if not parameter.requires_grad
            },
        )

    def frozen_fragments(self) -> list[Fragment]:
        """Collect views of the frozen parameters as fragments of only a weight, in the dtype the model computes with."""
        assert not self.frozen or self.engine.zero_stage < 3, "ZeRO 3 cuts frozen weights too, and nothing gathers them"
        weights = dict(self.engine.module.named_parameters())
        return [
            Fragment(
                name, 0, weights[name].numel(), {"weight": weights[name].detach().reshape(-1)}, 0, FROZEN, ranks, True
            )
            for name, ranks in self.frozen.items()
        ]

    def buffers(self) -> dict[str, Tensor]:
        """Collect the buffers of the state as they are now, by global name; views, not copies."""
        owned = owned_states(self.engine.deepspeed)
        return {
            name: owned[name] if name in owned else self.engine.module.get_buffer(name) for name in self.buffer_names
        }


Key = TypeVar("Key")


@dataclass(frozen=True)
class WriterAssignment:
    """Names of the parameters and buffers that this rank writes; of a parameter that ZeRO spreads, its own range."""

    parameters: frozenset[str]
    buffers: frozenset[str]


@dataclass(frozen=True)
class Claims:
    """Who may write what: the lowest rank of a group that has it, by name and intervals of each shard, and by buffer.

    What many ranks claim alike is one entry: joined, claims are as large as the checkpoint has shards, not as there are ranks.
    """

    writers: dict[tuple[str, object], int]
    owners: dict[str, int]

    def joined(self, other: Claims) -> Claims:
        """The claims of both."""
        return Claims(lowest(self.writers, other.writers), lowest(self.owners, other.owners))


def lowest(known: dict[Key, int], more: dict[Key, int]) -> dict[Key, int]:
    """Each key of both, with the lower number."""
    return known | {key: min(rank, known.get(key, rank)) for key, rank in more.items()}


def assign_writers(layout: EngineLayout, ranks: RankGroup) -> WriterAssignment:
    """Agree on one writer for everything; all ranks must call it, once for an engine.

    Ranks with equal shards of a parameter (tensor ranks of a norm, first and last stage of a tied embedding) form
    groups over which ZeRO spreads the shard; the group with the lowest rank writes. A buffer is written by the lowest
    rank that has it.
    """
    placements = layout.placements
    groups = {span.name: min(part.data_ranks) for part in layout.parts for span in part.spans}
    groups |= {name: min(ranks_of_shard) for name, ranks_of_shard in layout.frozen.items()}
    buffers = layout.buffer_names
    own = Claims(
        {(name, placements[name].intervals): group for name, group in groups.items()},
        dict.fromkeys(buffers, ranks.rank),
    )
    agreed = ranks.merge(own, Claims.joined)
    writers, owners = agreed.writers, agreed.owners
    return WriterAssignment(
        parameters=frozenset(
            name for name, group in groups.items() if writers[name, placements[name].intervals] == group
        ),
        buffers=frozenset(name for name in buffers if owners[name] == ranks.rank),
    )


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
