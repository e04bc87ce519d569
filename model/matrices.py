"""The matrices of a model, as a rank holds them: what an optimizer of whole matrices must know of its parameters.

A parameter is often several matrices: q, k and v stand one after the other in one weight, a stack has one for each expert.
Orthogonalising them together would mix functions that have nothing to do with each other, and let a large one drown a small
one. Which rows are which, and how many heads each has, the `Shard`s say already, so the list follows from them:

    one matrix a segment            gate and up of SwiGLU; z, x, B, C and dt of Mamba2; beta of a delta rule
    one matrix a head               with `per_head`, where a segment has units of more than one row
    one matrix an expert            and segment of it, in stacks [experts, rows, columns]

A segment is in consecutive rows, so what belongs together is a contiguous range of the flattened parameter.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from amfm.model.parallel.groups import ProcessGroupCollection
from amfm.model.parallel.shards import Axis, Shard, ShardSpec, parameter_shards

# Parts of a model whose matrices map the residual stream between blocks; embedding and head read or write one row per token.
INSIDE = ("blocks", "mtp")
# Inside them, by the end of the name, after a dot or _: numbers in the shape of a matrix that are not.
NO_MATRICES = ("bias", "A_log", "conv.weight", "router", "router.weight", "tables", "stream.maps.weight")


@dataclass(frozen=True)
class MatrixCut:
    """Ranks of `axis` hold slices of the rows (`dim` 0) or columns (1); `slices` different ones, copied where ranks are more."""

    axis: Axis
    dim: int
    slices: int


@dataclass(frozen=True)
class MatrixStack:
    """Matrices of one shape, one after the other in this rank's part of a parameter; `start`: in the flattened part.

    `rows` and `columns` are those on this rank: `cut` says which ranks have the others. `first`: the number of its first matrix
    among all of the whole parameter, in its order, whatever the layout.
    """

    name: str
    start: int
    count: int
    rows: int
    columns: int
    cut: MatrixCut | None = None
    first: int = 0

    @property
    def numel(self) -> int:
        """Numbers of all its matrices on this rank."""
        return self.count * self.rows * self.columns

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of a whole matrix."""
        if self.cut is None:
            return self.rows, self.columns
        whole = [self.rows, self.columns]
        whole[self.cut.dim] *= self.cut.slices
        return whole[0], whole[1]


def is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a parameter of this name and whole shape is one or several matrices that map the residual stream inside blocks.

    Not: norms, biases, convolutions, decays, routers, and what has one row or column, which is a vector.
    """
    is_inside = name.partition(".")[0] in INSIDE and len(shape) in (2, 3) and min(shape[-2:]) > 1
    return is_inside and not any(name.replace(".", "_").endswith(f"_{end.replace('.', '_')}") for end in NO_MATRICES)


def list_matrices(model: nn.Module, groups: ProcessGroupCollection, *, per_head: bool) -> list[MatrixStack]:
    """List the matrices that a model trains, in the order of its parameters, as this rank of `groups` holds them. No collectives.

    Must be called while parameters have their shapes: before ZeRO-3 partitions them.
    """
    found: list[MatrixStack] = []
    for name, parameter, shard in parameter_shards(model):
        shape = tuple(parameter.shape)
        if parameter.requires_grad and is_matrix(name, shard.whole_shape(shape)):
            found += split_parameter(name, shape, shard, groups, per_head=per_head)
    return found


def split_parameter(
    name: str, shape: tuple[int, ...], shard: Shard, groups: ProcessGroupCollection, *, per_head: bool
) -> Iterator[MatrixStack]:
    """Split this rank's part of a parameter, of shape [rows, columns] or [stack, rows, columns], into its matrices."""
    rows, columns = shape[-2:]
    first_dim = len(shape) - 2
    # A cut of the dim that counts experts or heads leaves whole matrices.
    cuts = [cut for cut in shard.cuts if cut.dim >= first_dim]
    assert len(cuts) <= 1, f"{name} is cut along rows and columns; its matrices would need two sums"
    cut = cuts[0] if cuts else None
    whole_blocks, blocks = 1, [_Block(rows, 1, None, 0)]
    if cut is not None:
        whole_blocks, blocks = _blocks(cut, first_dim, rows, groups, per_head=per_head)
    start = 0
    for number in _members(shard, shape[0], groups) if first_dim else [0]:
        for block in blocks:
            first = number * whole_blocks + block.first
            yield MatrixStack(name, start, block.count, block.length // block.count, columns, block.cut, first)
            start += block.length * columns


def _members(shard: Shard, size: int, groups: ProcessGroupCollection) -> list[int]:
    """Numbers, in the whole stack, of the members that this rank holds."""
    for cut in shard.cuts:
        if cut.dim == 0:
            group = getattr(groups, cut.axis)
            return [int(number) for number in cut.shard(torch.arange(sum(cut.segments)), group.rank(), group.size())]
    return list(range(size))


@dataclass(frozen=True)
class _Block:
    """Consecutive rows on this rank that are `count` matrices, cut alike; `first`: the number of the first in the whole."""

    length: int
    count: int
    cut: MatrixCut | None
    first: int


def _blocks(
    cut: ShardSpec, first_dim: int, rows: int, groups: ProcessGroupCollection, *, per_head: bool
) -> tuple[int, list[_Block]]:
    """Matrices in the whole of a cut weight, and what of each of its segments this rank holds."""
    group = getattr(groups, cut.axis)
    size, rank = group.size(), group.rank()
    if cut.dim > first_dim:
        # Columns of several segments are inputs of one map; any order of them gives the same result.
        (slices,) = set(cut.slices(size))
        return 1, [_Block(rows, 1, MatrixCut(cut.axis, 1, slices) if slices > 1 else None, 0)]
    units = cut.units or (0,) * len(cut.segments)
    first, blocks = 0, []
    for segment, number, length, slices in zip(cut.segments, units, cut.local_segments(size), cut.slices(size)):
        if per_head and number and segment > number:
            count = number // slices
            blocks.append(_Block(length, count, None, first + rank * slices // size * count))
            first += number
        else:
            blocks.append(_Block(length, 1, MatrixCut(cut.axis, 0, slices) if slices > 1 else None, first))
            first += 1
    return first, blocks
