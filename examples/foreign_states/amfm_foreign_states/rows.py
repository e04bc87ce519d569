"""Tensors made of rows of others, read on demand: what formats fuse, cut, stack or pad.

Names of parameters in a universal checkpoint: ours, as any program has them that holds a model of ours under DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from amfm.model.on_demand import Shape, Source

Rows = tuple[Source, int, int]  # from start to stop


def join(pieces: Sequence[Rows]) -> Source:
    """Rows of several tensors below each other, as one tensor."""
    shape = (sum(stop - start for _, start, stop in pieces), *pieces[0][0].shape[1:])

    def read(start: int, stop: int) -> Tensor:
        parts, begun = [], 0
        for source, first, last in pieces:
            low, high = max(start, begun), min(stop, begun + last - first)
            if low < high:
                parts.append(source.read(first + low - begun, first + high - begun))
            begun += last - first
        return torch.cat(parts)

    return Source(shape, torch.float32, read)


def interleave(sources: Sequence[Source], blocks: int) -> Source:
    """Tensors as one of this many blocks of rows, each with an equal part of every tensor; their rows must divide."""
    cuts = [(source, source.num_rows // blocks) for source in sources]
    return join([(source, block * rows, (block + 1) * rows) for block in range(blocks) for source, rows in cuts])


def part_of(fused: Source, rows: Sequence[int], index: int, blocks: int) -> Source:
    """One of the tensors, of this many rows each, that `interleave` made one."""
    if fused.num_rows != sum(rows):
        # Of another shape than the configuration's: the comparison of shapes names it.
        return fused
    each = [number // blocks for number in rows]
    first, size, block = sum(each[:index]), each[index], sum(each)
    return join([(fused, at * block + first, at * block + first + size) for at in range(blocks)])


def permuted(source: Source, order: Sequence[int]) -> Source:
    """Rows in groups of the length of `order`: row r of a group is row order[r] of the same group of the source."""
    size, index = len(order), torch.tensor(order)
    if source.num_rows % size:
        return source  # of another shape than the configuration's: the comparison of shapes names it

    def read(start: int, stop: int) -> Tensor:
        first, last = start // size * size, -(-stop // size) * size
        rows = source.read(first, last).unflatten(0, (-1, size))[:, index].flatten(0, 1)
        return rows[start - first : stop - first]

    return Source(source.shape, source.dtype, read)


def with_column(matrices: Source, column: Source, channels: int) -> Source:
    """Matrices [E, F, D] with vectors [E, F] as one more column, and zeros behind it up to D + channels."""
    experts, rows, width = matrices.shape

    def read(start: int, stop: int) -> Tensor:
        left, right = matrices.read(start, stop), column.read(start, stop).unsqueeze(2)
        return torch.cat([left, right, right.new_zeros(*left.shape[:2], channels - 1)], dim=2)

    return Source((experts, rows, width + channels), matrices.dtype, read)


def last_column(matrices: Source, width: int) -> Source:
    """The column behind so many of matrices [E, F, D], [E, F]."""
    shape = matrices.shape[:2]
    return Source(shape, matrices.dtype, lambda start, stop: matrices.read(start, stop)[:, :, width])


def resized(matrices: Source, rows: int, width: int) -> Source:
    """The first rows and columns of matrices [E, F, D], with zeros where it has fewer."""

    def read(start: int, stop: int) -> Tensor:
        found = matrices.read(start, stop)[:, :rows, :width]
        return functional.pad(found, (0, width - found.shape[2], 0, rows - found.shape[1]))

    return Source((matrices.shape[0], rows, width), matrices.dtype, read)


def stacked(sources: Sequence[Source]) -> Source:
    """Tensors of one shape as a stack of them."""

    def read(start: int, stop: int) -> Tensor:
        return torch.stack([source.read(0, source.num_rows) for source in sources[start:stop]])

    return Source((len(sources), *sources[0].shape), torch.float32, read)


def pad(source: Source, num_rows: int) -> Source:
    """A tensor with rows of zeros after its own, up to so many."""
    missing = num_rows - source.num_rows
    zeros = Source(
        (missing, *source.shape[1:]), source.dtype, lambda start, stop: torch.zeros(stop - start, *source.shape[1:])
    )
    return join([(source, 0, source.num_rows), (zeros, 0, missing)]) if missing > 0 else source


def unflatten(source: Source, shape: Shape) -> Source:
    """A tensor that was saved flat, in its shape; one with another number of elements as it is."""
    row = torch.Size(shape[1:]).numel()
    if len(shape) < 2 or source.shape != (shape[0] * row,):
        return source
    return Source(shape, source.dtype, lambda start, stop: source.read(start * row, stop * row).view(-1, *shape[1:]))


def drop_channel_dim(source: Source | None) -> Source | None:
    """The weights of a convolution over channels without the dimension of inputs per channel, which is 1."""
    if source is None or len(source.shape) != 3 or source.shape[1] != 1:
        return source
    shape = (source.shape[0], source.shape[2])
    return Source(shape, torch.float32, lambda start, stop: source.read(start, stop).squeeze(1))


class OwnNames:
    """Parameters under our own names: every tensor as it is. Models of other programs have names and forms of theirs."""

    def theirs(self, name: str) -> str:
        """The name of the folder where a parameter of ours is."""
        return name

    def write(self, ours: Mapping[str, Source]) -> dict[str, Source]:
        """Their tensors, of weights or of one kind of moments."""
        return dict(ours)

    def extras(self, name: str) -> dict[str, Any]:
        """What a file says next to the tensor of their name."""
        return {}

    def read(self, theirs: Mapping[str, Source], shapes: Mapping[str, Shape]) -> Iterator[tuple[str, Source]]:
        """Iterate over our tensors of a folder, by our names; what it lacks is left out, and what was saved flat has its shape."""
        for name, shape in shapes.items():
            if name in theirs:
                yield name, unflatten(theirs[name], shape)
