"""How `gpt_oss` stores what is one matrix here: projections apart, and matrices of experts transposed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from amfm.model.huggingface.entries import Piece, WeightEntry
from amfm.model.huggingface.qwen3_next_weights import part_pieces
from amfm.model.on_demand import Shape


@dataclass(frozen=True)
class StackedEntry(WeightEntry):
    """Matrices one above the other, `sizes` rows each, stored as a tensor each."""

    sizes: tuple[int, ...] = ()

    def pieces(self, shapes: Mapping[str, Shape]) -> Iterator[Piece]:
        """As in the base class, matrix by matrix."""
        begin = 0
        for size, name in zip(self.sizes, self.theirs, strict=True):
            yield from part_pieces(WeightEntry(self.ours, (name,)), shapes, size, begin, 0)
            begin += size

    def split(self, tensor: Tensor) -> dict[str, Tensor]:
        """As in the base class."""
        parts = (part.contiguous() for part in tensor.split(list(self.sizes)))
        return dict(zip(self.theirs, parts, strict=True))

    def join(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """As in the base class."""
        return torch.cat([tensors[name] for name in self.theirs])


@dataclass(frozen=True)
class TransposedEntry(WeightEntry):
    """A stack of matrices, [E, A, B] <-> [E, B, A]."""

    def split(self, tensor: Tensor) -> dict[str, Tensor]:
        """As in the base class."""
        return {self.theirs[0]: tensor.transpose(1, 2).contiguous()}

    def join(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """As in the base class."""
        return tensors[self.theirs[0]].transpose(1, 2).contiguous()


@dataclass(frozen=True)
class TurnedEntry(WeightEntry):
    """Gate rows above up rows [E, 2 F, D], stored as columns that are gate's and up's by turns, [E, D, 2 F]."""

    def split(self, tensor: Tensor) -> dict[str, Tensor]:
        """As in the base class."""
        turned = torch.stack(tensor.chunk(2, dim=1), dim=2).flatten(1, 2)
        return {self.theirs[0]: turned.transpose(1, 2).contiguous()}

    def join(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """As in the base class."""
        rows = tensors[self.theirs[0]].transpose(1, 2)
        return torch.cat([rows[:, 0::2], rows[:, 1::2]], dim=1)
