"""How `gpt_oss` stores what is one matrix here: projections apart, and matrices of experts transposed, their biases apart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from amfm.model.config.moe import BIAS_CHANNELS
from amfm.model.huggingface.entries import Piece, WeightEntry
from amfm.model.huggingface.qwen3_next_weights import part_pieces
from amfm.model.on_demand import Shape, cut_rows


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
    """Gate rows above up rows [E, 2 F, D], stored as columns that are gate's and up's, alternating, [E, D, 2 F]."""

    def split(self, tensor: Tensor) -> dict[str, Tensor]:
        """As in the base class."""
        turned = torch.stack(tensor.chunk(2, dim=1), dim=2).flatten(1, 2)
        return {self.theirs[0]: turned.transpose(1, 2).contiguous()}

    def join(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """As in the base class."""
        rows = tensors[self.theirs[0]].transpose(1, 2)
        return torch.cat([rows[:, 0::2], rows[:, 1::2]], dim=1)


@dataclass(frozen=True)
class BiasedEntry(TurnedEntry):
    """The same with a bias as a column after those of the rows, [E, 2 F, D + BIAS_CHANNELS], which is a tensor of its own there."""

    def pieces(self, shapes: Mapping[str, Shape]) -> Iterator[Piece]:
        """Expert by expert, both tensors."""
        shape = shapes[self.ours]
        for run in cut_rows(shape[0], shape):
            yield Piece(self, {self.ours: run}, dict.fromkeys(self.theirs, run))

    def split(self, tensor: Tensor) -> dict[str, Tensor]:
        """As in the base class."""
        (turned,) = super().split(tensor[:, :, : 1 - BIAS_CHANNELS]).values()
        matrix, bias = turned.split([turned.shape[1] - 1, 1], dim=1)
        return {self.theirs[0]: matrix.contiguous(), self.theirs[1]: bias.squeeze(1).contiguous()}

    def join(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """As in the base class."""
        matrix, bias = (tensors[name] for name in self.theirs)
        rows = super().join({self.theirs[0]: torch.cat([matrix, bias.unsqueeze(1)], dim=1)})
        return pad(rows, (0, BIAS_CHANNELS - 1))


@dataclass(frozen=True)
class WidenedEntry(TransposedEntry):
    """The stack of matrices after those, [E, D + BIAS_CHANNELS, F]: its last rows are zeros, and not there."""

    def split(self, tensor: Tensor) -> dict[str, Tensor]:
        """As in the base class."""
        return super().split(tensor[:, :-BIAS_CHANNELS])

    def join(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """As in the base class."""
        return pad(super().join(tensors), (0, 0, 0, BIAS_CHANNELS))
