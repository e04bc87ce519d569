"""How a layout cuts a block: what `launch/plan/measured.py` must know to build one rank's part of it."""

from __future__ import annotations

from dataclasses import replace

from amfm.launch.plan.blocks.expert_traffic import static_slots
from amfm.launch.plan.layout import Layout
from amfm.launch.plan.measured import Cut
from amfm.model.config.kinds import kind_of
from amfm.model.moe.spread import expected_ranks
from amfm.pretrain.config.schema import RunConfig


def cut_of(config: RunConfig, layout: Layout, letter: str, imbalance: float) -> Cut:
    """How a block of this kind is cut in a layout, in the terms of `measured.py`; what does not concern the kind is left out.

    Sequence mixers know nothing of experts, and channel mixers of context ranks, but for a capacity over whole rows.
    """
    is_split = layout.schedule == "zero_bubble"
    cut = Cut(layout.tensor, layout.sequence_parallel and layout.tensor > 1, is_split=is_split)
    if kind_of(letter).mixes == "sequence":
        return replace(cut, context=layout.context)
    moe = config.model.moe
    if moe is None or layout.expert == 1 or not config.model.block_options(letter).routed_experts():
        return cut
    cut = replace(cut, expert=layout.expert, expert_tensor=layout.expert_tensor, in_halves=layout.overlap_experts)
    if static_slots(config, layout) is not None:
        return replace(cut, in_slots=True, context=layout.context)
    if layout.expert_room is not None:
        return replace(cut, room=layout.expert_room)
    return replace(cut, sent=expected_ranks(moe, layout.expert), rows=imbalance)
