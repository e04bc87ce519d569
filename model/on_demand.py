"""Tensors by name that are read or computed when someone asks for them, whole or a few rows; nothing is kept.

A model of 560B parameters is 2.2 TB in float32. What goes through such a mapping (a checkpoint to an export, an import to
the part of one rank) needs the memory of the rows that it asks for at once, however large the model is. Whoever takes a
dictionary of tensors takes this too: a name gives a whole tensor, made again each time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Shape = tuple[int, ...]
# Numbers that are read, converted or written at a time: 64 MiB in float32.
BLOCK_NUMEL = 1 << 24


@dataclass(frozen=True)
class Source:
    """A tensor that is not in memory: its shape and dtype, and `read(start, stop)` of rows of its first dimension.

    A tensor without dimensions counts as one row, and is read as it is.
    """

    shape: Shape
    dtype: torch.dtype
    read: Callable[[int, int], Tensor]

    @property
    def num_rows(self) -> int:
        """Rows of the first dimension."""
        return self.shape[0] if self.shape else 1


class OnDemand(Mapping[str, Tensor]):
    """A mapping from names to tensors that are made when they are asked for."""

    def __init__(self, sources: Mapping[str, Source]) -> None:
        self.sources = dict(sources)

    def __getitem__(self, name: str) -> Tensor:
        """Make a whole tensor. Raises KeyError for a name that is not there."""
        source = self.sources[name]
        return source.read(0, source.num_rows)

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self.sources)

    def __len__(self) -> int:
        """Count the tensors."""
        return len(self.sources)

    def __contains__(self, name: object) -> bool:
        """Whether there is a tensor of this name; makes none."""
        return name in self.sources

    def shape(self, name: str) -> Shape:
        """Shape of a tensor, without making it."""
        return self.sources[name].shape

    def rows(self, name: str, rows: tuple[int, int] | None) -> Tensor:
        """Make rows (start, stop) of the first dimension of a tensor; None: the whole of it."""
        return self[name] if rows is None else self.sources[name].read(*rows)

    def without(self, is_left_out: Callable[[str], bool]) -> OnDemand:
        """The same without some names."""
        return OnDemand({name: source for name, source in self.sources.items() if not is_left_out(name)})

    def blocks(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """Make a tensor in blocks of rows, of about BLOCK_NUMEL numbers each, with the number of its first row."""
        source = self.sources[name]
        for start, stop in cut_rows(source.num_rows, source.shape):
            yield start, source.read(start, stop)


def on_demand(tensors: Mapping[str, Tensor]) -> OnDemand:
    """Give tensors in memory the form of those on demand, as views; what has it already is returned."""
    if isinstance(tensors, OnDemand):
        return tensors
    return OnDemand({name: source_of(tensor) for name, tensor in tensors.items()})


def source_of(tensor: Tensor) -> Source:
    """A tensor in memory as a source; its rows are views."""
    return Source(tuple(tensor.shape), tensor.dtype, lambda start, stop: tensor[start:stop] if tensor.dim() else tensor)


def computed(shape: Shape, dtype: torch.dtype, make: Callable[[], Tensor]) -> Source:
    """A source that makes its whole tensor each time that rows of it are asked for."""
    return Source(shape, dtype, lambda start, stop: make()[start:stop])


def cut_rows(num_rows: int, shape: Shape, *, multiple: int = 1) -> Iterator[tuple[int, int]]:
    """Cut rows of a tensor of this shape into runs (start, stop) of about BLOCK_NUMEL numbers, each whole `multiple`s of rows."""
    row_numel = max(1, math.prod(shape[1:]))
    at_once = max(1, BLOCK_NUMEL // (row_numel * multiple)) * multiple
    for start in range(0, num_rows, at_once):
        yield start, min(num_rows, start + at_once)
