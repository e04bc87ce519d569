"""Sections of the kinds of residual stream next to the plain sum: settings, and what a plan must know of each.

A section names the class of its reader (model/streams/), and counts in tensors [B, T, D], as the plain stream is one. No
torch is imported.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field

from amfm.model.config.section import Section


class StreamConfig(Section):
    """What every kind of residual stream gives: the field of `ModelConfig` is its name."""

    reader: ClassVar[str]
    # How often each of its float32 tensors passes through memory in a block, forward and backward, in PyTorch's operations.
    passes: ClassVar[int]
    keeps_inputs: ClassVar[bool] = False  # whether `num_kept` has all that a block begins with

    def num_tensors(self, num_blocks: int) -> int:
        """Tensors that the residual stream is after so many blocks, which is what a pipeline stage sends there."""
        raise NotImplementedError

    def num_kept(self, places: Sequence[int]) -> int:
        """Tensors that consecutive blocks of these indices keep of it for backward passes, next to what each one's mixer reads."""
        raise NotImplementedError

    def flops(self, hidden_size: int) -> float:
        """Forward FLOPs per token of reading and writing it in one block: 2 per weight of a matrix, and of mixing."""
        raise NotImplementedError


class AttentionResidualsConfig(StreamConfig):
    """Each block reads a mixture of the embedding and of earlier outputs, weighed by its query (arXiv 2603.15031); docs/mixers.md."""

    blocks_per_source: int = Field(
        gt=0,
        description="Blocks whose outputs are added up to one source; 1: the output of every block is one.",
    )
    reader: ClassVar[str] = "amfm.model.streams.attention_residuals:AttentionResiduals"
    passes: ClassVar[int] = 14  # 5 of them forward: a copy in float32, the norm, the scores and the sum

    def num_tensors(self, num_blocks: int) -> int:
        """The embedding and the groups begun."""
        return 1 + math.ceil(num_blocks / self.blocks_per_source)

    def num_kept(self, places: Sequence[int]) -> int:
        """What a piece has received, and all finished sources again where a block begins a group."""
        received = self.num_tensors(places[0]) if places[0] else 0
        return received + sum(self.num_tensors(index) for index in places if index and self.begins_group(index))

    def begins_group(self, index: int) -> bool:
        """Whether the output of block `index` begins a source."""
        return index % self.blocks_per_source == 0

    def flops(self, hidden_size: int) -> float:
        """Counted as nothing, as norms and activations are: there is no matrix."""
        return 0.0


class HyperConnectionsConfig(StreamConfig):
    """Several residual streams, which each block reads, mixes and writes by weights per token (mHC, arXiv 2512.24880); docs/mixers.md."""

    streams: int = Field(4, ge=2, le=64, description="Residual streams; the paper's expansion rate n.")
    sinkhorn_iterations: int = Field(
        20, gt=0, le=1000, description="Rounds that make the matrix of a block's mixture doubly stochastic."
    )
    reader: ClassVar[str] = "amfm.model.streams.hyper_connections:HyperConnections"
    passes: ClassVar[int] = 48  # 11 of them forward; what gradients need is computed again
    keeps_inputs: ClassVar[bool] = True

    @property
    def num_weights(self) -> int:
        """Weights per token and block: n that read, n that write, and n x n that mix."""
        return self.streams * (self.streams + 2)

    def num_tensors(self, num_blocks: int) -> int:
        """All streams; before the first block they are one."""
        return self.streams if num_blocks else 1

    def num_kept(self, places: Sequence[int]) -> int:
        """What each block begins with."""
        return sum(map(self.num_tensors, places))

    def flops(self, hidden_size: int) -> float:
        """The matrix, and the products of the weights with the streams and the block's output."""
        return 2.0 * hidden_size * self.num_weights * (self.streams + 1)


STREAMS = ("attention_residuals", "hyper_connections")  # fields of `ModelConfig`
