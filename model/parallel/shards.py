"""Sharding of parameters: the one source for initial values, checkpoints, norms and gradients.

A module says in `shards` how each of its parameters is cut over ranks. Four things follow from it and cannot disagree:
which slice of the initial value a rank takes (init.py), where its slice is in a checkpoint (checkpoint/placement.py), how
often an element counts in the gradient norm (engine/grad_norm.py), and over which ranks a gradient must still be summed
(engine/gradients.py). A cut is described by sizes of the whole parameter and never by a number of ranks, so it is the same
on every layout, and a checkpoint of one layout can be read by another.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from amfm.model.parallel.groups import ProcessGroupCollection

Axis = Literal["tp", "expt_tp", "ep", "embd"]


@dataclass(frozen=True)
class ShardSpec:
    """Sharding of one dimension of a parameter over the ranks of a group, each of its segments on its own.

    `segments` are the whole sizes of the parts that stand one after the other along `dim` (such as a gate and an up matrix);
    each rank holds its slice of every segment. `units` counts what cannot be cut in each segment (key-value heads, groups
    of B and C); where ranks outnumber them, neighbouring ranks hold copies of one unit. No `units`: any slice will do.
    """

    dim: int
    axis: Axis
    segments: tuple[int, ...]
    units: tuple[int, ...] = ()

    def slices(self, size: int) -> tuple[int, ...]:
        """Number of different slices into which `size` ranks cut each segment; rank r holds number r * slices // size."""
        units = self.units or self.segments
        for number in units:
            assert number % size == 0 or size % number == 0, f"{size} ranks cannot share {number} units of {self}"
        return tuple(min(number, size) for number in units)

    def local_segments(self, size: int) -> tuple[int, ...]:
        """Sizes of the slices that each of `size` ranks holds."""
        return tuple(segment // slices for segment, slices in zip(self.segments, self.slices(size)))

    def shard(self, whole: Tensor, rank: int, size: int) -> Tensor:
        """Cut out what `rank` of `size` holds of a tensor that is whole along `dim`; a copy, in the order of the segments."""
        pieces = whole.split(list(self.segments), dim=self.dim)
        own = [
            piece.chunk(slices, dim=self.dim)[rank * slices // size] for piece, slices in zip(pieces, self.slices(size))
        ]
        return torch.cat(own, dim=self.dim)


@dataclass(frozen=True)
class Shard:
    """A parameter's sharding: `cuts` of different dimensions over different axes; replicated over all other axes.

    `partial` names the axes over whose ranks the gradient of a replicated parameter is only a part: it must be summed
    over them before it is one (a norm of sequence-parallel tokens, or over `embd` a tied embedding that the first and the
    last pipeline stage hold). What a cut holds in copies is partial too.
    A cut over `ep` is of dim 0, which counts experts, and each expert has its own first values.
    """

    cuts: tuple[ShardSpec, ...] = ()
    partial: tuple[Axis, ...] = ()

    @property
    def per_expert(self) -> bool:
        """Whether dim 0 counts experts."""
        return any(cut.axis == "ep" for cut in self.cuts)

    def shard(self, whole: Tensor, groups: ProcessGroupCollection) -> Tensor:
        """Cut out the part of a whole tensor that this rank holds. No collectives."""
        for cut in self.cuts:
            group = getattr(groups, cut.axis)
            whole = cut.shard(whole, group.rank(), group.size())
        return whole

    def whole_shape(self, part_shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the whole parameter, from that of any rank's part."""
        shape = list(part_shape)
        for cut in self.cuts:
            shape[cut.dim] = sum(cut.segments)
        return tuple(shape)


REPLICATED = Shard()


def parameter_shards(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, Shard]]:
    """Iterate over the parameters of a model: global name, parameter and sharding; a tied parameter comes once."""
    seen: set[int] = set()
    for module_name, module in model.named_modules():
        shards: dict[str, Shard] = getattr(module, "shards", {})
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield f"{module_name}.{name}" if module_name else name, parameter, shards.get(name, REPLICATED)


def own_shapes(module: nn.Module) -> str:
    """Shapes of a module's own parameters, this rank's part of each: what `print(model)` shows of it."""
    return ", ".join(f"{name}={list(value.shape)}" for name, value in module.named_parameters(recurse=False))


# The axes that cut sizes, by the name of their setting below `parallel`.
_GROUPS = {"tensor": "tp", "expert_tensor": "expt_tp", "expert": "ep"}


def divide(total: int, groups: ProcessGroupCollection, name: str, *, axis: str = "tensor") -> int:
    """Divide `total` by the ranks of an axis; `name` is its setting. Raises ValueError if they do not divide it."""
    size: int = getattr(groups, _GROUPS[axis]).size()
    if total % size:
        raise ValueError(f"parallel.{axis}={size} must divide {name}={total}; use a divisor of {total}")
    return total // size


def divide_units(total: int, groups: ProcessGroupCollection, name: str) -> int:
    """Number of `total` key-value heads or groups that this rank holds, one where tensor ranks outnumber them.

    Raises ValueError if neither number divides the other.
    """
    size: int = groups.tp.size()
    if total % size and size % total:
        raise ValueError(f"parallel.tensor={size} must divide {name}={total} or be a multiple of it")
    return max(1, total // size)
