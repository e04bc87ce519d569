"""How a layout cuts a block: what `launch/plan/blocks/measured.py` must know to build one rank's part of it."""

from __future__ import annotations

from amfm.launch.plan.blocks.expert_traffic import static_slots
from amfm.launch.plan.layout import Layout
from amfm.launch.plan.stand_ins import COUNTED_TOKENS, Cut
from amfm.model.config.kinds import kind_of
from amfm.model.moe.transfer import expected_ranks
from amfm.pretrain.config.schema import RunConfig


def row_tokens(config: RunConfig, layout: Layout, symbol: str) -> int:
    """Tokens of a rank's part of a sequence on which a block of this kind is measured.

    As many as there are where bytes are not in proportion to them: on context ranks, of states and of a router's weight, and such
    sequences may be short; of an indexer, whose loss reads pairs of tokens.
    """
    is_paired = getattr(config.model.block_options(symbol), "indexer", None) is not None
    return config.train.sequence_length // layout.context if layout.context > 1 or is_paired else COUNTED_TOKENS


def cut_of(config: RunConfig, layout: Layout, symbol: str, imbalance: float, *, is_narrow: bool = False) -> Cut:
    """How a block of this kind is cut in a layout, in the terms of `measured.py`; what does not concern the kind is left out.

    `is_narrow`: its products are made by the recipe of low precision.

    Sequence mixers know nothing of experts, and channel mixers of context ranks, but for a capacity over whole rows.
    """
    layout = layout.one_sub_batch()
    is_split, is_sequence_parallel = layout.schedule == "zero_bubble", layout.sequence_parallel and layout.tensor > 1
    narrow = config.low_precision if is_narrow else None
    if kind_of(symbol).mixes == "sequence":
        return Cut(layout.tensor, is_sequence_parallel, layout.context, is_split=is_split, narrow=narrow)
    moe = config.model.moe
    if moe is None or layout.expert == 1 or not config.model.block_options(symbol).routed_experts():
        return Cut(layout.tensor, is_sequence_parallel, is_split=is_split, narrow=narrow)
    has_slots = static_slots(config, layout) is not None
    is_counted = not has_slots and layout.expert_buffer_factor is None
    # Made at once, since a search makes hundreds of thousands.
    return Cut(
        layout.tensor,
        is_sequence_parallel,
        layout.context if has_slots else 1,
        layout.expert,
        layout.expert_tensor,
        layout.expert_parts > 1,
        has_slots,
        sent=expected_ranks(moe, layout.expert) if is_counted else 0.0,
        rows=imbalance if is_counted else 1.0,
        room=None if has_slots else layout.expert_buffer_factor,
        is_split=is_split,
        narrow=narrow,
    )
