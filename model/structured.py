"""Layers of a feed-forward whose matrices are products of two factors (model/config/structure.py names the kinds).

How tensor ranks share them: the factor between the residual stream and the factors' middle stays whole on every rank, next to the
stream; the other one is cut as the dense matrix would be.

    up     h = first(x) on the residual stream's own tokens; h enters the tensor region; each rank has its rows of the second,
           for block shuffle its blocks
    down   each rank has the columns, or blocks, of the first that its channels feed. Low rank sums h and has the whole
           second on the residual stream; the block kinds have the columns of the second that these blocks feed, and sum y

So there are as many collectives as around dense matrices, and low rank sends r numbers per token in place of the
stream's width. The order of a block shuffle's inner channels is ours to choose: channel = (block, row), without the
transposition at the end, so that a rank's channels are whole blocks and `down` finds its own.

Self-guided training adds to each such layer a dense matrix, `guide_weight`, which begins as the product of the factors
and fades as the step says (`set_step`). A skipped step adds zero times its sum, so that every parameter has a gradient in
every step, and reductions are alike in all of them.

First values: low rank begins as a dense matrix does, in law. It takes singular vectors from the QR of Gaussians and singular values
from the quantiles of the law of Marchenko and Pastur, the largest r of them, so that nothing is decomposed at a start;
blocks are orthogonal, so that the product's singular values are 1 at every width (over the root of the depth where a dense
matrix's would be), as published. Scaled down to a dense matrix's mean square, 0.4 at width 96, block shuffle learnt much
more slowly: 2.26 nats per byte where dense had 2.06 after 220 steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from amfm.kernels.common.gemm_precision import gemm_dtype
from amfm.kernels.linear.op import linear
from amfm.model.config.schema import GuideConfig
from amfm.model.config.structure import Structure
from amfm.model.parallel.groups import ProcessGroupCollection
from amfm.model.parallel.layers import stream_shard
from amfm.model.parallel.regions import enter_tensor_region, leave_tensor_region, project_stream
from amfm.model.parallel.shards import Shard, ShardSpec, divide


class StructuredLinear(nn.Module):
    """The two factors of a matrix, `first` and `second`, this rank's parts; see `Structure.shapes`. With `guide` a third."""

    shards: dict[str, Shard]
    is_up: ClassVar[bool]

    def __init__(
        self,
        input_size: int,
        segments: tuple[int, ...],
        structure: Structure,
        groups: ProcessGroupCollection,
        *,
        name: str,
        guide: GuideConfig | None = None,
    ) -> None:
        super().__init__()
        self.structure, self.groups, self.guide = structure, groups, guide
        # A tensor, so that compiled blocks keep their graph from step to step.
        self.alpha = torch.ones((), device="cpu")
        self.skips = False
        self.input_size, self.segments = input_size, segments
        divide(segments[0] if self.is_up else input_size, groups, name)
        if structure.blocks is not None and structure.kind != "lowrank":
            divide(structure.blocks, groups, f"{name.rpartition('.')[0]}.linear_blocks")
        self.shards = self._shards()
        shapes = dict(zip(("first", "second"), structure.shapes(input_size, segments), strict=True))
        if guide is not None:
            dense = ShardSpec(0, "tp", segments) if self.is_up else ShardSpec(1, "tp", (input_size,))
            self.shards["guide_weight"] = Shard((dense,))
            shapes["guide_weight"] = (sum(segments), input_size)
        for own_name, shape in shapes.items():
            part = self.shards[own_name].shard(torch.empty(shape, device="meta"), groups).shape
            self.register_parameter(own_name, nn.Parameter(torch.empty(part)))
        self.first: nn.Parameter
        self.second: nn.Parameter
        self.guide_weight: nn.Parameter

    def set_step(self, step: int, total_steps: int, seed: int) -> None:
        """Set the weight of the guide for the step after `step` of `total_steps`, and whether that leaves it out."""
        if self.guide is None:
            return
        alpha = self.guide.alpha(step, total_steps)
        self.alpha.fill_(alpha)
        if self.guide.skip:
            # One draw for all layers and ranks.
            draw = torch.rand((), generator=torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63))
            self.skips = float(draw) < 1 - alpha

    def guided(self, factored: Tensor, dense: Callable[[], Tensor]) -> Tensor:
        """Mix the output of the factors with that of the dense matrix, which is computed where it counts."""
        if self.guide is None:
            return factored
        if self.skips and self.training:
            return factored + 0.0 * self.guide_weight.sum()
        return self.alpha * dense() + (1 - self.alpha) * factored

    def _shards(self) -> dict[str, Shard]:
        raise NotImplementedError

    def first_values(
        self, own_name: str, generator_of: Callable[[str], torch.Generator], deviation: float, gain: float
    ) -> Tensor:
        """Draw a whole parameter, float32 on the CPU; `generator_of` each by name.

        `deviation`: that a dense matrix would have here; `gain`: the share of it that depth leaves, 1 without.
        """
        if own_name == "guide_weight":
            factors = (self.first_values(name, generator_of, deviation, gain) for name in ("first", "second"))
            return dense_matrix(self.structure, *factors)
        generator = generator_of(own_name)
        inputs, outputs = self.input_size, sum(self.segments)
        shape = self.structure.shapes(inputs, self.segments)[0 if own_name == "first" else 1]
        if self.structure.kind == "lowrank":
            scales = dense_singular_values(outputs, inputs, shape[0] if own_name == "first" else shape[1])
            scales = (deviation * scales).sqrt()
            vectors = orthonormal(shape, generator)
            return vectors * (scales[:, None] if own_name == "first" else scales)
        scale = math.sqrt(gain)
        if own_name == "first" or self.structure.kind == "blockdense":
            return scale * orthonormal(shape, generator)
        # One orthonormal matrix a block for the whole stack, then apart: the parts stand one after the other.
        parts, blocks = len(self.segments), self.structure.num_blocks()
        stacked = orthonormal((blocks, parts * shape[1], shape[2]), generator)
        return scale * stacked.unflatten(1, (parts, -1)).transpose(0, 1).reshape(shape)


class StructuredUp(StructuredLinear):
    """Stands for a `ColumnLinear` that reads the residual stream: [B, T, in] -> [B, T, out of this rank]."""

    is_up = True

    def _shards(self) -> dict[str, Shard]:
        parts = self.segments
        if self.structure.kind == "blockshuffle":
            parts = (self.structure.num_blocks(),) * len(self.segments)
        return {"first": stream_shard(self.groups), "second": Shard((ShardSpec(0, "tp", parts),))}

    def from_stream(self, x_BTD: Tensor) -> Tensor:
        """Multiply the residual stream; under sequence parallelism T of the result are all tokens. Every rank of `groups.tp` must call."""
        return self.guided(
            self._from_factors(x_BTD), lambda: project_stream(x_BTD, [self.guide_weight], self.groups)[0]
        )

    def _from_factors(self, x_BTD: Tensor) -> Tensor:
        if self.structure.kind == "lowrank":
            return project_stream(linear(x_BTD, self.first), [self.second], self.groups)[0]
        h = block_product(x_BTD, self.first)
        if self.structure.kind == "blockdense":
            return project_stream(h.flatten(-2), [self.second], self.groups)[0]
        h = enter_tensor_region(shuffle(h, self.structure.num_blocks()).flatten(-2), self.groups)
        second = self.second.unflatten(0, (len(self.segments), -1))
        own, width = second.shape[1], second.shape[-1]
        h = h.narrow(-1, self.groups.tp.rank() * own * width, own * width)
        # One product a block for all parts of the stack, then part by part: a rank's rows are gate rows, then up rows.
        y = block_product(h, second.transpose(0, 1).flatten(1, 2))
        return y.unflatten(-1, (second.shape[0], -1)).transpose(-3, -2).flatten(-3)


class StructuredDown(StructuredLinear):
    """Stands for a `RowLinear` and the end of the tensor region: [B, T, in of this rank] -> the residual stream [B, T, out]."""

    is_up = False

    def _shards(self) -> dict[str, Shard]:
        kind = self.structure.kind
        if kind == "lowrank":
            return {"first": Shard((ShardSpec(1, "tp", (self.input_size,)),)), "second": stream_shard(self.groups)}
        blocks = (self.structure.num_blocks(),)
        # Columns stand in the order of the first factor's blocks.
        columns = self.structure.between(self.input_size, sum(self.segments))
        if kind == "blockdense":
            second = ShardSpec(1, "tp", (columns,))
        else:
            second = ShardSpec(2, "tp", (columns // self.structure.num_blocks(),))
        return {"first": Shard((ShardSpec(0, "tp", blocks),)), "second": Shard((second,))}

    def to_stream(self, inner: Tensor) -> Tensor:
        """Multiply what this rank's channels hold and sum over ranks. Every rank of `groups.tp` must call."""
        if self.structure.kind == "lowrank":
            factored = linear(leave_tensor_region(linear(inner, self.first), self.groups), self.second)
            return self.guided(factored, lambda: leave_tensor_region(linear(inner, self.guide_weight), self.groups))
        part = self.guided(self._part(inner), lambda: linear(inner, self.guide_weight))
        return leave_tensor_region(part, self.groups)

    def _part(self, inner: Tensor) -> Tensor:
        """What this rank's blocks add to y."""
        h = block_product(inner, self.first)
        if self.structure.kind == "blockdense":
            return linear(h.flatten(-2), self.second)
        return block_product(shuffle(h, self.structure.num_blocks()).flatten(-2), self.second).flatten(-2)


def block_product(x: Tensor, blocks_BOI: Tensor) -> Tensor:
    """x [..., B * I] times blocks [B, O, I], each block its part of x -> [..., B, O], in the dtype of x."""
    dtype = gemm_dtype(x)
    parts = x.unflatten(-1, (blocks_BOI.shape[0], -1)).to(dtype)
    return torch.einsum("...bi,boi->...bo", parts, blocks_BOI.to(dtype)).to(x.dtype)


def shuffle(h: Tensor, blocks: int) -> Tensor:
    """Give every block of the second factor its share of each block held here: [..., b, m] -> [..., blocks, b * m / blocks]."""
    return h.unflatten(-1, (blocks, -1)).transpose(-3, -2).flatten(-2)


def dense_matrix(structure: Structure, first: Tensor, second: Tensor) -> Tensor:
    """Multiply whole factors out to the matrix [out, in] that they stand for."""
    if structure.kind == "lowrank":
        return second @ first
    blocks = structure.num_blocks()
    if structure.kind == "blockdense":
        return second @ torch.block_diag(*first)
    # second [parts * j, o, b, c] times first [b, (j, c), i]: block j of the second reads share j of each block b.
    shares = first.unflatten(1, (blocks, -1))
    reads = second.unflatten(0, (-1, blocks)).unflatten(-1, (blocks, -1))
    product = torch.einsum("sjobc,bjci->sjobi", reads, shares)
    return product.flatten(3, 4).flatten(0, 2)


def orthonormal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Draw matrices [..., O, I] with orthonormal columns, or rows where those are fewer, uniform among all such."""
    is_wide = shape[-1] > shape[-2]
    tall = (*shape[:-2], shape[-1], shape[-2]) if is_wide else shape
    vectors, upper = torch.linalg.qr(torch.empty(tall).normal_(generator=generator))
    # The signs that a QR leaves open: a diagonal above zero makes the law uniform.
    vectors = vectors * upper.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]
    return vectors.transpose(-2, -1).contiguous() if is_wide else vectors.contiguous()


def dense_singular_values(rows: int, columns: int, count: int) -> Tensor:
    """The largest `count` singular values that a matrix of standard normal numbers has, as quantiles of their law.

    Source: Marchenko and Pastur 1967. With z = min / max of the sizes, squares over max are in [(1 - sqrt z)^2, (1 + sqrt
    z)^2]; written with an angle the density has no poles, and sums of its values at many angles are its integral.
    """
    least, most = sorted((rows, columns))
    root = math.sqrt(least / most)
    angles = (torch.arange(20_000, dtype=torch.float64) + 0.5) * (math.pi / 20_000)
    squares = 1 + root * root + 2 * root * angles.cos()
    share = torch.cumsum(angles.sin().square() / squares, 0)
    places = (torch.arange(count, dtype=torch.float64) + 0.5) / least
    found = torch.searchsorted(share / share[-1], places).clamp(max=len(angles) - 1)
    return (squares[found] * most).sqrt().float()
