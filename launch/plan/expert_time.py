"""Seconds that blocks with spread experts wait for their rows, and how much of that runs in parallel with what they
compute.

How it works: a block with spread experts sends rows out, computes its experts, and sends the sums back; backward does the
same with gradients. The shared expert is cut around that: its up projection is computed while rows are sent out, its
activation and down projection while they are sent back, and backward the other way round. With `overlap_experts` rows are sent
in two halves, so that one half is sent in parallel with the experts of the other. `waiting_seconds` lays such a pass
out: one link sends in order, computing waits where it needs what has not arrived. Where halves of the rows pass all
blocks in two-batch overlap (model/mtp.py), `seconds_of_two_batches` does that for the blocks of a piece.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Literal, NamedTuple

from amfm.launch.plan.activations import Storage
from amfm.launch.plan.blocks.block import block_cost
from amfm.launch.plan.blocks.expert_traffic import add_experts, expert_traffic
from amfm.launch.plan.exchanges.seconds import exchange_seconds
from amfm.launch.plan.hardware import Hardware
from amfm.launch.plan.layout import Layout, StageShare, count_routed
from amfm.launch.plan.low_precision import OPERAND_BYTES, kept_passes, planned_recipes
from amfm.launch.plan.roofline import Roofline
from amfm.model.config.schema import ModelConfig
from amfm.pretrain.config.schema import RunConfig

# What is computed while rows are sent: nothing, the block's shared expert, as in amfm, or blocks of another micro-batch.
Meanwhile = Literal["nothing", "shared", "blocks"]


def expert_exchange_seconds(
    config: RunConfig,
    layout: Layout,
    hardware: Hardware,
    storage: Storage,
    held: StageShare,
    *,
    imbalance: float,
    sent_rows: float,
    meanwhile: Meanwhile = "shared",
    repeats: int = 0,
    block: Mapping[tuple[str, bool], float] = MappingProxyType({}),
) -> tuple[float, float]:
    """Seconds of a micro-batch's exchanges over the expert axis: what computing waits for, and what is hidden next to
    it.

    `sent_rows`: the part of planned rows that is sent. `meanwhile`: what is computed during it. `repeats`: exchanges of a forward
    pass that recomputation makes again: 1, the way out, or 2, the way back too. `block`: seconds of a block by symbol, and
    whether it has a recipe.
    """
    if layout.sub_batches > 1 and meanwhile != "nothing":
        return two_batch_exchange_seconds(config, layout, hardware, storage, held, imbalance, sent_rows, block)
    blocks = held.routed_blocks
    traffic = expert_traffic(config, layout, blocks)
    if traffic is None:
        return 0.0, 0.0
    details = traffic.details
    # Slots and places are sent whoever fills them; of other rows the most loaded rank's link has the most.
    uneven = sent_rows * (imbalance if details and layout.expert_buffer_factor is None else 1.0)
    travel = uneven * exchange_seconds(traffic.rows, layout, hardware) / blocks / 4
    beside_rows = uneven * exchange_seconds(details, layout, hardware) / blocks / 2 if details else 0.0
    out = uneven * packed_seconds(config, layout, hardware) if config.low_precision.dispatch == "fp8" else travel
    # A backward pass that is cut in two has only the gradients of inputs next to the exchanges.
    backward = 1 if layout.schedule == "zero_bubble" else 2
    parts, waited = layout.expert_parts, 0.0
    narrow = held.narrow_letters(config.low_precision.narrow_blocks(config.model.letters))
    num_narrow, whole = count_routed(config.model, narrow), 0.0
    for times, symbol in ((blocks - num_narrow, None), (num_narrow, routed_letter(config.model, narrow))):
        if times:
            first, last, experts = computed_around(config, layout, hardware, storage, imbalance, symbol)
            there = travel if symbol is None else out
            once = waiting_seconds(there + beside_rows, travel, first, experts, last, parts)
            home = travel + beside_rows
            once += waiting_seconds(there, home, backward * last, backward * experts, backward * first, parts)
            if repeats:
                once += waiting_seconds(home, travel * (repeats - 1), first, experts, last, parts)
            waited += times * once
            whole += times * (2 * (there + home) + min(repeats, 1) * home + max(repeats - 1, 0) * travel)
    counts = exchange_seconds(traffic.counts, layout, hardware)
    if meanwhile == "blocks":
        waited = max(0.0, whole - sum(block[symbol, False] for symbol in held.letters))
    exposed = whole if meanwhile == "nothing" else waited
    return counts + exposed, whole - exposed


def packed_seconds(config: RunConfig, layout: Layout, hardware: Hardware) -> float:
    """Seconds in which the rows of one block are sent one way as codes."""
    traffic = expert_traffic(config, layout, 1, narrow=1)
    assert traffic is not None and traffic.packed is not None, "rows are sent as codes"
    return exchange_seconds(traffic.packed, layout, hardware) / 2


class Stop(NamedTuple):
    """What one half of the rows computes at a block of experts, and before it, and how long its rows are on their way.

    `before`: blocks before it up to where rows set out, and what follows the experts of the last such block; `first` may be
    computed while they are sent, `experts` once they have arrived, `last` while sums are sent back.
    """

    before: float
    first: float
    experts: float
    last: float
    out: float
    home: float


def two_batch_exchange_seconds(
    config: RunConfig,
    layout: Layout,
    hardware: Hardware,
    storage: Storage,
    held: StageShare,
    imbalance: float,
    sent_rows: float,
    block: Mapping[tuple[str, bool], float],
) -> tuple[float, float]:
    """`expert_exchange_seconds` of a micro-batch whose rows pass the blocks of each piece in halves."""
    turn, blocks = layout.one_sub_batch(), held.routed_blocks
    traffic = expert_traffic(config, turn, blocks)
    if traffic is None:
        return 0.0, 0.0
    uneven = sent_rows * (imbalance if traffic.details and layout.expert_buffer_factor is None else 1.0)
    travel = uneven * exchange_seconds(traffic.rows, turn, hardware) / blocks / 4
    extra = uneven * exchange_seconds(traffic.details, turn, hardware) / blocks / 2 if traffic.details else 0.0
    packed = uneven * packed_seconds(config, turn, hardware) if config.low_precision.dispatch == "fp8" else travel
    narrow = held.narrow_letters(config.low_precision.narrow_blocks(config.model.letters))
    first, last, experts = computed_around(
        config, turn, hardware, storage, imbalance, routed_letter(config.model, narrow)
    )
    is_cut, waited, whole_seconds = layout.schedule == "zero_bubble", 0.0, 0.0
    for letters in passed_together(config.model, held):
        for is_forward in (True, False):
            stops, gap = [], 0.0
            back = 1.0 if is_forward or is_cut else 2.0
            for symbol in letters if is_forward else reversed(letters):
                forwards = layout.forwards(symbol)
                whole = block[symbol, symbol in narrow] / layout.sub_batches / (2 + forwards)
                own = whole * (1.0 if is_forward else back + forwards - 1)
                if not config.model.block_options(symbol).routed_experts():
                    gap += own
                    continue
                around = max(0.0, own - back * (first + last + experts)) / 2
                there, home = packed if symbol in narrow else travel, travel
                whole_seconds += layout.sub_batches * (there + home + extra)
                stop = Stop(gap + around, back * first, back * experts, back * last, there + extra, home)
                stops.append(
                    stop
                    if is_forward
                    else stop._replace(first=stop.last, last=stop.first, out=there, home=home + extra)
                )
                gap = around
            waited += seconds_of_two_batches(stops, gap)
    counts = layout.sub_batches * exchange_seconds(traffic.counts, turn, hardware)
    return counts + waited, whole_seconds - waited


def passed_together(model: ModelConfig, held: StageShare) -> list[tuple[str, ...]]:
    """Letters of the blocks that two halves pass without joining in between: of a piece, and of an MTP layer."""
    depth = model.parsed_pattern.depth_letters if held.depths else ()
    *others, last = held.pieces
    own = last[: len(last) - held.depths * len(depth)]
    return [*others, own, *[tuple(depth)] * held.depths]


def seconds_of_two_batches(stops: Sequence[Stop], after: float) -> float:
    """Seconds that computing waits while two halves alternate through these blocks of experts, `after` being what follows them.

    One link sends in the order in which rows set out.
    """
    now, link = 0.0, 0.0
    home = [0.0, 0.0]  # when each half's sums arrive
    for stop in stops:
        arrived = []
        for half in range(2):
            now = max(now, home[half]) + stop.before
            link = max(link, now) + stop.out
            arrived.append(link)
            now += stop.first
        for half in range(2):
            now = max(now, arrived[half]) + stop.experts
            link = max(link, now) + stop.home
            home[half] = link
            now += stop.last
    for half in range(2):
        now = max(now, home[half]) + after
    return now - 2 * (sum(stop.before + stop.first + stop.experts + stop.last for stop in stops) + after)


def routed_letter(model: ModelConfig, letters: Sequence[str]) -> str | None:
    """The symbol among these whose blocks have a router; None if none has."""
    return next((symbol for symbol in letters if model.block_options(symbol).routed_experts()), None)


def computed_around(
    config: RunConfig,
    layout: Layout,
    hardware: Hardware,
    storage: Storage,
    imbalance: float,
    narrow_letter: str | None = None,
) -> tuple[float, float, float]:
    """Forward seconds of products while rows are sent out, while they are sent back, and of its experts between.

    `narrow_letter`: of a block with a recipe.
    """
    model, tokens = config.model, layout.tokens(config)
    moe = model.moe
    assert moe is not None, "check_model was not called: model.moe is missing"
    recipes = {} if narrow_letter is None else planned_recipes(config.low_precision, narrow_letter)
    wide_gradient = config.low_precision.weight_gradient == "bf16"
    passes = kept_passes(config.low_precision, layout.micro_batches(config))
    up, down, experts = (
        Roofline(
            hardware, config.train.precision, storage.element_bytes,
            recipes=recipes, wide_gradient=wide_gradient, kept_passes=passes,
        )
        for _ in range(3)
    )  # fmt: skip
    (shared,), symbol = moe.feed_forwards(), routed_letter(model, model.built_letters)
    assert symbol is not None, "experts are spread"
    for each in block_cost(config, symbol, layout, storage, imbalance).products:
        if each.weight.startswith(shared.place):
            is_up = each.weight.startswith(f"{shared.place}up_proj")
            (up if is_up else down).product_of(each, tokens)
            # The activation between them reads what one gives and writes what the other reads.
            activated = each.outputs if is_up else each.inputs
            down.passes(3 * tokens * each.rows * activated * storage.element_bytes)
            if each.weight in recipes:  # the codes of what a product reads
                quantised = storage.element_bytes + OPERAND_BYTES[recipes[each.weight]]
                (up if is_up else down).passes(3 * tokens * each.rows * each.inputs * quantised)
    add_experts(experts, config, moe, tokens, layout, imbalance)
    return up.seconds / 3, down.seconds / 3, experts.seconds / 3


def waiting_seconds(out: float, home: float, before: float, experts: float, after: float, parts: int) -> float:
    """Seconds that a pass of a block waits for its rows, which are sent in this many equal parts.

    Out takes `out` seconds in all and home `home`; `before` is computed while the first part is on its way, `experts` part by
    part as they arrive, and `after` while the last is on its way back.
    """
    now, link, waited = before, out, 0.0
    for part in range(parts):
        arrived = out * (part + 1) / parts
        waited += max(0.0, arrived - now)
        now = max(now, arrived) + experts / parts
        link = max(link, now) + home / parts
    return waited + max(0.0, link - now - after)
