"""What the planner asks of a block, and the answers of a kind that has no file here, from one built without storage.

So a kind of a package is planned like our own. A kind whose formulas are known overrides what it knows better, in a
class of `kinds.py`, which has the table; nothing else in the plan knows one kind from another.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from amfm.launch.plan.activations import Storage
from amfm.launch.plan.blocks.cut import cut_of
from amfm.launch.plan.layout import Layout
from amfm.launch.plan.measured import block_bytes
from amfm.launch.plan.roofline import Roofline
from amfm.model.build import sample_mixer
from amfm.model.config.options import MixerOptions
from amfm.model.config.schema import ModelConfig
from amfm.model.parallel.shards import parameter_shards
from amfm.pretrain.config.schema import RunConfig


class PlannedBlock:
    """The blocks of one symbol of the pattern, as the planner sees them."""

    def __init__(self, config: RunConfig, symbol: str, options: MixerOptions) -> None:
        self.config, self.model, self.symbol, self.options = config, config.model, symbol, options

    def add(self, line: Roofline, layout: Layout, storage: Storage, imbalance: float) -> None:
        """Add what the mixer of one block computes for a micro-batch on one rank, forward and backward.

        Here: products with all matrices, the mixing itself, and the bytes that its Triton kernels are given; of PyTorch's, what was
        kept read once more. PyTorch's operations between Triton kernels are not in it: `block_seconds` adds them for all kinds.
        """
        tokens, tensor = layout.tokens(self.config), layout.tensor
        measured = block_bytes(self.model, self.symbol, storage, cut_of(self.config, layout, self.symbol, imbalance))
        sizes = measured_sizes(self.model, self.symbol, self.config.train.sequence_length)
        add_products(line, sizes, layout, tokens)
        flops = tokens * sizes.sequence_flops / tensor
        if storage.backend == "triton":
            self.mix(line, flops, 0.0)
            line.moves(tokens, measured.kernels)
            return
        self.mix(line, flops, tokens * measured.kept)
        line.passes(2 * tokens * measured.kept)

    def mix(self, line: Roofline, flops: float, moved: float) -> None:
        """Add the recurrence or the attention of the mixer itself, of so many FLOPs and bytes in forward."""
        line.mixing(flops, moved)


def add_products(line: Roofline, sizes: MeasuredSizes, layout: Layout, tokens: float) -> None:
    """Add products with all matrices: of all tokens with a rank's part of one, or with a whole one of a rank's tokens."""
    for name, outputs, inputs, is_cut in sizes.matrices:
        if is_cut:
            line.product(tokens, inputs, outputs / layout.tensor, weight=name)
        else:
            line.product(tokens / layout.stream_ranks, inputs, outputs, weight=name)


@dataclass(frozen=True)
class MeasuredSizes:
    """Sizes of one mixer, uncut.

    `matrices`: name, out and in of each, and whether tensor ranks cut it. `sequence_flops`: per token, of the recurrence or attention in forward.
    """

    matrices: tuple[tuple[str, int, int, bool], ...]
    sequence_flops: float


@lru_cache(maxsize=256)
def measured_sizes(config: ModelConfig, symbol: str, sequence_length: int) -> MeasuredSizes:
    """Build one mixer on the meta device and read its sizes. Cached: a search asks for the same few again and again."""
    mixer = sample_mixer(config, symbol)
    matrices = tuple(
        (name, weight.shape[-2], weight.numel() // weight.shape[-2], any(cut.axis == "tp" for cut in shard.cuts))
        for name, weight, shard in parameter_shards(mixer)
        if weight.dim() > 1 and not name.endswith("tables")  # looked up
    )
    return MeasuredSizes(matrices, mixer.sequence_flops(sequence_length))
