"""What depends on a router: how many rows experts get, and what they exchange where they are spread."""

from __future__ import annotations

from typing import Any, NamedTuple

from amfm.kernels.low_precision.formats import packed_width
from amfm.kernels.moe.capacity import expert_capacity
from amfm.launch.plan.activations import up_rows
from amfm.launch.plan.exchange import FLOAT32, INT64, Exchange, element_type
from amfm.launch.plan.layout import Layout
from amfm.launch.plan.roofline import Roofline
from amfm.model.config.moe import MoeConfig
from amfm.model.moe.capacity import slots_for
from amfm.model.moe.transfer import expected_ranks
from amfm.model.parallel.groups import count_places
from amfm.pretrain.config.schema import RunConfig

EXPERTS = "experts."  # before the names of the weights of routed experts, below a mixer


def add_experts(
    line: Roofline, config: RunConfig, moe: MoeConfig, tokens: float, layout: Layout, imbalance: float
) -> None:
    """Add the products of this rank's rows, grouped by expert; in halves weights are read twice, and their gradients made and added.

    A rank's only expert has products as dense ones are (kernels/moe `only_expert_feed_forward`), and computes empty places too.
    """
    width, experts = moe.expert_width(config.model.hidden_size), moe.num_experts // layout.expert
    rows, is_only = tokens * moe.top_k, has_only_expert(config, layout)
    if layout.expert > 1:
        # This rank's tokens' worth of rows, gathered over the ranks that cut an expert's width.
        rows *= layout.expert_tensor / layout.tensor
        if is_only and layout.expert_buffer_factor is not None:
            rows *= sent_rows(config, layout) / moe.top_k
        else:
            rows *= imbalance
    units, parts = moe.expert_hidden_size / layout.width_ranks, layout.expert_parts
    up = up_rows(1, moe.activation) * units
    for _ in range(parts):
        for name, inputs, outputs in (("up", width, up), ("down", units, width)):
            how: Any = {"groups": experts, "grouped": not is_only, "weight": EXPERTS + name}
            # By a recipe `up` makes codes of its activation.
            line.product(rows / parts, inputs, outputs, is_fused=name == "up", **how)
    if not is_only and not line.recipes:
        # The activation is in the kernels of products, whose own bytes are taken to be those of any product.
        line.passes(rows * (3 * up + 2 * units) * line.element_bytes)
    if parts > 1:
        # Of the two gradients one is read and added to, which is read and written.
        line.backward_passes(3 * experts * (up + units) * width * line.element_bytes)


def has_only_expert(config: RunConfig, layout: Layout) -> bool:
    """Whether all rows that a rank gets are those of its only expert (model/moe/by_rank.py); slots are sorted still."""
    moe = config.model.moe
    if moe is None or layout.expert == 1 or moe.num_experts > layout.expert:
        return False
    return static_slots(config, layout) is None


class ExpertTraffic(NamedTuple):
    """What E blocks send over one axis: rows, and with them what is known of each row's choices; before them their numbers.

    packed: rows that are sent as codes, out in forward and gradients out in backward, where `low_precision.dispatch` has any.
    """

    rows: Exchange
    packed: Exchange | None
    details: Exchange | None
    counts: Exchange


def expert_traffic(config: RunConfig, layout: Layout, blocks: int, narrow: int = 0) -> ExpertTraffic | None:
    """What this many E blocks send over the expert axis; None if experts are not spread. `narrow`: those with a recipe.

    A token's row is sent once to each rank that holds experts of its choice, and back, forward and backward. Next
    to it go, out in forward and back in backward, the weights of its choices and their ids in float32. How many rows
    those are depends on the router; counted is what is expected of an even one. Under a capacity factor that makes
    slots, those are sent, a row each, filled or not, and under `expert_buffer_factor` the places that rows have between two ranks.
    Where halves of a micro-batch overlap, each is sent on its own.
    """
    moe = config.model.moe
    if layout.expert == 1 or moe is None or not blocks:
        return None
    dtype, size = element_type(config)
    ranks, calls = layout.stage_ranks, blocks * layout.expert_parts
    slots = static_slots(config, layout)
    if slots is None:
        rows = ranks // layout.tensor * layout.tokens(config) * sent_rows(config, layout)
        details = Exchange("ep", "all_to_all", "float32", 2 * calls, 2 * blocks * rows * 2 * moe.top_k * FLOAT32)
        numbers = layout.expert * (2 if layout.expert_buffer_factor is None else 1) * layout.expert_parts
    else:
        rows, details, numbers = ranks * slots * moe.num_experts, None, moe.num_experts
    width = moe.expert_width(config.model.hidden_size)
    packs = 2 * narrow if config.low_precision.dispatch == "fp8" else 0
    moved, parts = rows * packs * packed_width(width), layout.expert_parts
    return ExpertTraffic(
        Exchange("ep", "all_to_all", dtype, 4 * calls - packs * parts, (4 * blocks - packs) * rows * width * size),
        Exchange("ep", "all_to_all", "uint8", packs * parts, moved) if packs else None,
        details,
        Exchange("ep", "all_to_all", "int64", blocks, blocks * ranks * numbers * INT64),
    )


def sent_rows(config: RunConfig, layout: Layout) -> float:
    """Rows that are sent to experts, of a token: those of an even router, or places for more of them under `expert_buffer_factor`."""
    moe = config.model.moe
    assert moe is not None, "experts are spread"
    reached = expected_ranks(moe, layout.expert)
    if layout.expert_buffer_factor is None:
        return reached
    tokens, parts = layout.tokens(config) // layout.tensor, layout.expert_parts
    sizes = [tokens - tokens // 2, tokens // 2] if parts == 2 else [tokens]
    share, held = reached / layout.expert, moe.num_experts // layout.expert
    places = (
        count_places(layout.expert_buffer_factor, size, moe.top_k, share, layout.expert, held)[0] for size in sizes
    )
    return layout.expert * sum(places) / tokens


def static_slots(config: RunConfig, layout: Layout) -> int | None:
    """Slots of each rank for each expert under a capacity factor (model/moe/capacity.py); None if rows are counted.

    An even number where they are cut in halves.
    """
    moe = config.model.moe
    if moe is None or moe.capacity_factor is None or layout.expert == 1:
        return None
    whole = layout.tokens(config) * layout.context
    capacity = expert_capacity(whole, moe.top_k, moe.num_experts, moe.capacity_factor)
    slots = slots_for(layout.tokens(config) // layout.tensor, moe.top_k, moe.num_experts, capacity)
    return None if slots is None else -(-slots // layout.expert_parts) * layout.expert_parts
