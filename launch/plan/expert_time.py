"""Seconds of mixture-of-experts blocks, and how much of their exchanges runs beside what they compute.

How it works: a block with spread experts sends rows out, computes its experts, and lets sums travel home; backward does the
same with gradients. The shared expert is cut around that: its up projection is computed while rows travel out, its
activation and down projection while they travel home, and backward the other way round. With `overlap_experts` rows travel
in two halves, so that one half travels beside the experts of the other. `waiting_seconds` lays such a pass out: one link
sends in order, computing waits where it needs what has not arrived.
"""

from __future__ import annotations

from amfm.launch.plan.activations import FLOAT32_BYTES, Storage
from amfm.launch.plan.communication import exchange_seconds
from amfm.launch.plan.exchanges import expected_ranks, expert_traffic, static_slots
from amfm.launch.plan.hardware import Hardware
from amfm.launch.plan.layout import Layout, StageShare
from amfm.launch.plan.roofline import Roofline, add_factored, add_feed_forward
from amfm.model.config.moe import MoeConfig
from amfm.pretrain.config.schema import RunConfig


def add_moe(line: Roofline, config: RunConfig, layout: Layout, storage: Storage, imbalance: float) -> None:
    """Add router, latent projections, this rank's experts, what moves their rows, and the shared expert."""
    model, tokens = config.model, layout.tokens(config)
    assert model.moe is not None, "check_model was not called: model.moe is missing"
    moe, e, hidden = model.moe, line.element_bytes, model.hidden_size
    width, is_spread = moe.latent_size or hidden, layout.expert > 1
    routed = tokens / (layout.tensor if is_spread else layout.stream_ranks)  # whose router runs here
    line.product(routed, hidden, moe.num_experts, wide=True)
    line.passes(6 * routed * moe.num_experts * FLOAT32_BYTES)
    if moe.latent_size is not None:
        line.product(routed, hidden, width)
        line.product(routed, width, hidden)
    add_experts(line, moe, width, tokens, layout, imbalance)
    if is_spread and static_slots(config, layout) is None:
        # To rows for other ranks and home from them, twice each; there sums over choices of products in expert order.
        sent = expected_ranks(moe, layout.expert)
        arrived = imbalance * layout.expert_tensor * (moe.top_k + sent)
        line.passes(2 * routed * (3 * sent + arrived + 1) * width * e)
    elif not is_spread and storage.backend == "triton":
        # Sums over choices of products in expert order, of results and of gradients; rows are read where they lie.
        line.passes(2 * tokens * (moe.top_k + 1) * width * e)
    else:
        # Into expert order, back, and both gradients.
        rows = tokens * moe.top_k * (imbalance * layout.expert_tensor / layout.tensor if is_spread else 1.0)
        line.passes(rows * width * (4 * e + 2 * FLOAT32_BYTES))
    shared, structure = moe.shared_expert_hidden_size, moe.shared_structure()
    if shared and structure.kind != "dense":
        add_factored(line, model, layout, tokens, shared, moe.activation, structure)
    elif shared:
        add_feed_forward(line, tokens, hidden, shared / layout.tensor, moe.activation)
    if moe.shared_expert_gate:
        line.passes(tokens / layout.stream_ranks * 5 * hidden * e)


def add_experts(line: Roofline, moe: MoeConfig, width: int, tokens: float, layout: Layout, imbalance: float) -> None:
    """Add the grouped products of this rank's rows; in halves weights are read twice, and their gradients made and added."""
    rows, experts = tokens * moe.top_k, moe.num_experts // layout.expert
    if layout.expert > 1:
        # This rank's tokens' worth of rows, gathered over the ranks that cut an expert's width.
        rows *= imbalance * layout.expert_tensor / layout.tensor
    units, parts = moe.expert_hidden_size / layout.width_ranks, layout.expert_parts
    for _ in range(parts):
        add_feed_forward(line, rows / parts, width, units, moe.activation, groups=experts, grouped=True)
    if parts > 1:
        # Of the two gradients one is read and added to, which is read and written.
        weights = experts * units * width * (3 if moe.activation == "swiglu" else 2)
        line.seconds += 3 * weights * line.element_bytes / line.bandwidth


def expert_exchange_seconds(
    config: RunConfig,
    layout: Layout,
    hardware: Hardware,
    storage: Storage,
    held: StageShare,
    *,
    imbalance: float,
    sent_rows: float,
    is_overlapped: bool,
) -> tuple[float, float]:
    """Seconds of a micro-batch's exchanges over the expert axis: what computing waits for, and what is hidden beside it.

    `sent_rows`: the part of planned rows that travels. `is_overlapped`: whether anything is computed meanwhile.
    """
    blocks = held.letters.count("E")
    traffic = expert_traffic(config, layout, blocks)
    if traffic is None:
        return 0.0, 0.0
    details = traffic.details
    # Slots are sent whoever fills them; of other rows the fullest rank's link has the most.
    uneven = sent_rows * (imbalance if details else 1.0)
    travel = uneven * exchange_seconds(traffic.rows, layout, hardware) / blocks / 4
    beside_rows = uneven * exchange_seconds(details, layout, hardware) / blocks / 2 if details else 0.0
    first, last, experts = computed_around(config, layout, hardware, storage, imbalance)
    # A backward pass that is cut in two has the gradients of inputs alone beside the exchanges.
    backward = 1 if layout.schedule == "zero_bubble" else 2
    parts, longer = layout.expert_parts, travel + beside_rows
    waited = waiting_seconds(longer, travel, first, experts, last, parts)
    waited += waiting_seconds(travel, longer, backward * last, backward * experts, backward * first, parts)
    counts = exchange_seconds(traffic.counts, layout, hardware)
    whole = blocks * 2 * (travel + longer)
    exposed = blocks * waited if is_overlapped else whole
    return counts + exposed, whole - exposed


def computed_around(
    config: RunConfig, layout: Layout, hardware: Hardware, storage: Storage, imbalance: float
) -> tuple[float, float, float]:
    """Forward seconds of what a block computes while rows travel out, while they travel home, and of its experts between.

    Both parts of a shared expert of two factors a matrix are taken to be equal.
    """
    model, tokens = config.model, layout.tokens(config)
    moe = model.moe
    assert moe is not None, "check_model was not called: model.moe is missing"
    up, down, experts = (Roofline(hardware, config.train.precision, storage.element_bytes) for _ in range(3))
    shared, structure = moe.shared_expert_hidden_size, moe.shared_structure()
    if shared and structure.kind != "dense":
        add_factored(up, model, layout, tokens, shared, moe.activation, structure)
        up.seconds = down.seconds = up.seconds / 2
    elif shared:
        whole = Roofline(hardware, config.train.precision, storage.element_bytes)
        add_feed_forward(whole, tokens, model.hidden_size, shared / layout.tensor, moe.activation)
        units = shared / layout.tensor * (2 if moe.activation == "swiglu" else 1)
        up.product(tokens, model.hidden_size, units)
        down.seconds = whole.seconds - up.seconds
    add_experts(experts, moe, moe.latent_size or model.hidden_size, tokens, layout, imbalance)
    return up.seconds / 3, down.seconds / 3, experts.seconds / 3


def waiting_seconds(out: float, home: float, before: float, experts: float, after: float, parts: int) -> float:
    """Seconds that a pass of a block waits for its rows, which travel in so many equal parts.

    Out takes `out` seconds in all and home `home`; `before` is computed while the first part is on its way, `experts` part by
    part as they arrive, and `after` while the last is on its way home.
    """
    now, link, waited = before, out, 0.0
    for part in range(parts):
        arrived = out * (part + 1) / parts
        waited += max(0.0, arrived - now)
        now = max(now, arrived) + experts / parts
        link = max(link, now) + home / parts
    return waited + max(0.0, link - now - after)
