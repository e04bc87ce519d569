"""What a block computes: the operations of one that is built without storage, each at its roofline.

So a kind of a package is planned like our own, and no kind has a formula here. What a measured pass does not know is added: how
many rows experts get, and pairs of tokens that an indexer reads.
"""

from __future__ import annotations

from dataclasses import replace

from amfm.launch.plan.activations import BlockBytes, Storage
from amfm.launch.plan.blocks.cut import cut_of, row_tokens
from amfm.launch.plan.blocks.expert_traffic import EXPERTS, add_experts
from amfm.launch.plan.blocks.indexer import add_indexer
from amfm.launch.plan.blocks.measured import block_bytes
from amfm.launch.plan.layout import Layout
from amfm.launch.plan.roofline import Roofline
from amfm.model.build import sample_mixer
from amfm.model.config.core_options import AttentionConfig
from amfm.model.config.key_mixer_options import MlaOptions
from amfm.model.config.moe import MoeConfig
from amfm.pretrain.config.schema import RunConfig

BACKWARD = 2.5  # of attention, which computes scores again


def add_block(
    line: Roofline, config: RunConfig, symbol: str, layout: Layout, storage: Storage, imbalance: float
) -> None:
    """Add what one block computes for a micro-batch on one rank, forward and backward, with its norm and its residual stream."""
    tokens, options = layout.tokens(config), config.model.block_options(symbol)
    cost = block_cost(config, symbol, layout, storage, imbalance)
    indexer = getattr(options, "indexer", None)
    for each in cost.products:
        if not (isinstance(options, MoeConfig) and each.weight.startswith(EXPERTS)):
            line.product_of(each, tokens)
    # Operands of a recipe are quantised by kernels of their own, or by those that make the numbers.
    moved = block_cost(config, symbol, layout, storage, imbalance, is_narrow=True) if line.recipes else cost
    line.moves(tokens, moved.kernels)
    line.moves(tokens, moved.between)
    length = config.train.sequence_length
    if indexer is not None:
        add_indexer(line, tokens, length, options, config.model.hidden_size, layout.tensor)
    if indexer is None or indexer.stage == "warm_up":
        mixer = sample_mixer(config.model, symbol)
        flops, back = cost.scans
        # Attention's FLOPs grow with a sequence, and are those of one document.
        attended = (mixer.sequence_flops(length) - (mixer.sequence_flops(1) if flops else 0.0)) / layout.tensor
        mixed = tokens * (flops + attended), tokens * (back + BACKWARD * attended)
        by_flash = (
            isinstance(options, AttentionConfig | MlaOptions)
            and not getattr(options, "sinks", False)
            and config.qk_clip is None
        )
        line.mixing(mixed, (tokens * cost.mixed[0], tokens * cost.mixed[1]), by_flash=by_flash)
    if isinstance(options, MoeConfig):
        add_experts(line, config, options, tokens, layout, imbalance)


def block_cost(
    config: RunConfig,
    symbol: str,
    layout: Layout,
    storage: Storage,
    imbalance: float,
    *,
    is_narrow: bool = False,
) -> BlockBytes:
    """What a block computes and moves per token; without what it mixes of another residual stream than the sum (`mixture_bytes`)."""
    cut = replace(cut_of(config, layout, symbol, imbalance, is_narrow=is_narrow), is_split=False)
    tokens = row_tokens(config, layout, symbol)
    return block_bytes(config.model.plain_stream(), symbol, storage, cut, tokens=tokens)
