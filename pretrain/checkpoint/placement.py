"""Where a shard is in a whole parameter, and which parts the shards of two layouts share.

A shard is described by what it holds, not by how many ranks cut it: along each dim, the intervals of the whole that are
one after the other in it. So shards of any two layouts compare directly, and equal ones are replicas.

Several intervals along a dim are the rule, not the exception: a fused matrix (q, k and v; gate and up) is cut inside each of
its parts, so a rank's shard is made of one interval a part. Sizes and indices are in elements of the whole tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, product

import numpy
import torch

from amfm.model.parallel.groups import ProcessGroupCollection
from amfm.model.parallel.shards import Shard

Interval = tuple[int, int]
LAYOUT_AXES = ("tp", "cp", "ep", "expt_tp", "pp", "dp")


@dataclass(frozen=True)
class Placement:
    """Place of a shard: the shape of the whole tensor, and along each dim the intervals [start, stop) it holds, in order."""

    whole: tuple[int, ...]
    intervals: tuple[tuple[Interval, ...], ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the shard itself."""
        return tuple(sum(stop - start for start, stop in dim) for dim in self.intervals)

    @property
    def numel(self) -> int:
        """Number of elements of the shard."""
        return math.prod(self.shape)

    def to_json(self) -> dict[str, list[list[int]]]:
        """Encode the dims that are cut, with their intervals; empty for a shard that is the whole."""
        return {
            str(dim): [list(interval) for interval in intervals]
            for dim, (size, intervals) in enumerate(zip(self.whole, self.intervals, strict=True))
            if intervals != whole_dim(size)
        }


def whole_dim(size: int) -> tuple[Interval, ...]:
    """Intervals of a dim that is not cut."""
    return ((0, size),)


def place_whole(shape: Sequence[int]) -> Placement:
    """Place a tensor that every rank holds whole."""
    return Placement(tuple(shape), tuple(whole_dim(size) for size in shape))


def placement_from_json(shape: Sequence[int], where: dict[str, list[list[int]]]) -> Placement:
    """Decode what `Placement.to_json` encoded."""
    dims = [tuple((start, stop) for start, stop in where.get(str(dim), [[0, size]])) for dim, size in enumerate(shape)]
    return Placement(tuple(shape), tuple(dims))


def place_shard(local_shape: Sequence[int], shard: Shard, groups: ProcessGroupCollection) -> Placement:
    """Find where this rank's shard of a parameter is. No communication."""
    whole, intervals = list(local_shape), [whole_dim(size) for size in local_shape]
    for cut in shard.cuts:
        group = getattr(groups, cut.axis)
        whole[cut.dim] = sum(cut.segments)
        # The cut itself shards a tensor that holds its own indices: whatever it does with segments, this reads it off.
        indices = replace(cut, dim=0).shard(torch.arange(whole[cut.dim]), group.rank(), group.size())
        assert len(indices) == local_shape[cut.dim], f"dim {cut.dim} holds {local_shape[cut.dim]}, not {len(indices)}"
        intervals[cut.dim] = join_indices(indices.tolist())
    return Placement(tuple(whole), tuple(intervals))


def locate_rank(shard: Shard, groups: ProcessGroupCollection) -> dict[str, int]:
    """Coordinates of this rank on the axes of several ranks that cut the parameter."""
    axes = {cut.axis: getattr(groups, cut.axis) for cut in shard.cuts}
    return {axis: group.rank() for axis, group in axes.items() if group.size() > 1}


def list_axes(groups: ProcessGroupCollection) -> dict[str, int]:
    """Number of ranks on each axis of the layout."""
    return {axis: getattr(groups, axis).size() for axis in LAYOUT_AXES}


def join_indices(indices: Sequence[int]) -> tuple[Interval, ...]:
    """Join runs of consecutive indices to intervals [start, stop), in the order given."""
    if not indices:
        return ()
    edges = [place for place, (before, after) in enumerate(pairwise(indices), 1) if after != before + 1]
    return tuple((indices[low], indices[high - 1] + 1) for low, high in pairwise([0, *edges, len(indices)]))


@dataclass(frozen=True)
class Run:
    """A run of consecutive indices along one dim that two shards share: where it begins in each, and its length."""

    saved: int
    wanted: int
    length: int

    def within(self, low: int, high: int) -> Run | None:
        """Clip the run to rows `low` to `high` of the wanted shard."""
        start, stop = max(self.wanted, low), min(self.wanted + self.length, high)
        return Run(self.saved + start - self.wanted, start, stop - start) if start < stop else None


def find_runs(saved: Sequence[Interval], wanted: Sequence[Interval]) -> list[Run]:
    """Find what the intervals of two shards share along one dim, as runs in the coordinates of both shards."""
    runs = []
    wanted_start = 0
    for low, high in wanted:
        saved_start = 0
        for saved_low, saved_high in saved:
            start, stop = max(low, saved_low), min(high, saved_high)
            if start < stop:
                runs.append(Run(saved_start + start - saved_low, wanted_start + start - low, stop - start))
            saved_start += saved_high - saved_low
        wanted_start += high - low
    return runs


def find_blocks(
    saved: Placement, wanted: Placement, first_row: int, end_row: int
) -> Iterator[tuple[Run, list[tuple[Run, ...]]]]:
    """Find what two shards share among rows `first_row` to `end_row` (dim 0) of the wanted one.

    Yields a run of rows with the blocks inside them, each a run along every other dim. Asserts equal whole shapes.
    """
    assert saved.whole == wanted.whole, f"shards of {list(saved.whole)} and {list(wanted.whole)} have nothing in common"
    inner = [find_runs(*dims) for dims in zip(saved.intervals[1:], wanted.intervals[1:], strict=True)]
    blocks = list(product(*inner))
    for rows in find_runs(saved.intervals[0], wanted.intervals[0]):
        shared = rows.within(first_row, end_row)
        if shared is not None and blocks:
            yield shared, blocks


def check_cover(name: str, placements: Sequence[Placement]) -> None:
    """Assert that different shards cover a parameter. They may overlap: ranks hold copies of what they cannot share."""
    # The edges of all intervals divide the parameter into cells, each of them inside or outside of a shard as a whole.
    whole = placements[0].whole
    edges = [
        sorted({edge for shard in placements for interval in shard.intervals[dim] for edge in interval})
        for dim in range(len(whole))
    ]
    covered = numpy.zeros([len(dim) - 1 for dim in edges], dtype=numpy.int64)
    for shard in placements:
        cells = numpy.ones((), dtype=numpy.int64)
        for dim, intervals in zip(edges, shard.intervals, strict=True):
            inside = [any(low <= start < high for low, high in intervals) for start in dim[:-1]]
            cells = numpy.multiply.outer(cells, numpy.array(inside, dtype=numpy.int64))
        covered += cells
    reaches = all(dim[0] == 0 and dim[-1] == size for dim, size in zip(edges, whole, strict=True))
    assert reaches and bool((covered > 0).all()), (
        f"the shards of parameter {name} {list(whole)} do not cover it: "
        + str([shard.to_json() for shard in placements])
    )
