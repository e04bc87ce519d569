"""Seconds of a step: each operation at its roofline, ZeRO's collectives on rings, AdamW and gradient sums by bandwidth.

Operations are those of `blocks/`, exchanges of experts those of `expert_time.py`. Ring collectives over N ranks move
(N - 1) / N of the bytes once for a gather or scatter and twice for an all-reduce (Thakur et al. 2005, "Optimization of
Collective Communication Operations in MPICH", section 3). A pipeline waits (stages - 1) / pieces per rank micro-batches
long, a third of that where the schedule cuts backward passes in two (Qi et al. 2023, arXiv 2401.10241, section 2).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from amfm.launch.plan.activations import FLOAT32_BYTES, Storage, mixture_bytes
from amfm.launch.plan.blocks.block import add_block
from amfm.launch.plan.blocks.cut import cut_of
from amfm.launch.plan.blocks.measured import block_bytes
from amfm.launch.plan.exchanges.seconds import (
    all_to_all_seconds,
    axis_place,
    exchange_seconds,
    pass_seconds,
    ring_seconds,
    total_seconds,
)
from amfm.launch.plan.exchanges.stage import reduction_exchanges
from amfm.launch.plan.expert_time import Meanwhile, expert_exchange_seconds
from amfm.launch.plan.graphs import pass_launches
from amfm.launch.plan.hardware import Hardware
from amfm.launch.plan.layout import Layout, StageShare, distinct_stages, held_by_stages
from amfm.launch.plan.low_precision import kept_passes, narrow_kinds, planned_recipes
from amfm.launch.plan.roofline import Roofline, accumulates, depth_seconds, head_seconds
from amfm.model.config.pattern import block_kind
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.engine.adamw import STEP_BYTES


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step of the slowest pipeline stage, by part.

    `communication`: inside the passes, by axis, as far as computing waits for it; `hidden_experts` is what is sent in
    parallel with experts. `bubble`: waiting for other stages. `reduction`: of gradients, and the gathers of new weights
    under ZeRO-1 and 2, as far as passes do not hide them; `hidden` is what they do. `exposed_gathers` is what compute
    does not hide of ZeRO-3's.
    `host`: launches that the device waits for, and waits of the host. `shared`: computing that is slower next to
    collectives, which take multiprocessors. `jitter`: waiting for the slowest of all ranks.
    """

    compute: dict[str, float]
    communication: dict[str, float]
    bubble: float
    optimizer: float
    reduction: float
    exposed_gathers: float
    hidden: float = 0.0
    hidden_experts: float = 0.0
    host: float = 0.0
    shared: float = 0.0
    jitter: float = 0.0

    def total(self) -> float:
        """Seconds of the whole step."""
        passes = sum(self.compute.values()) + sum(self.communication.values())
        waits = self.bubble + self.reduction + self.exposed_gathers
        return passes + waits + self.optimizer + self.host + self.shared + self.jitter

    def parts(self) -> list[tuple[str, float]]:
        """Name the parts with their seconds, in the order in which they are spent; parts without any are left out."""
        parts = [
            *self.compute.items(),
            *((f"{axis} communication, exposed", seconds) for axis, seconds in self.communication.items()),
            ("weight gathers, exposed", self.exposed_gathers),
            ("pipeline bubble", self.bubble),
            ("gradient reduction, exposed", self.reduction),
            ("optimizer and gradient accumulation", self.optimizer),
            ("host, exposed", self.host),
            ("multiprocessors of collectives", self.shared),
            ("waits for the slowest rank", self.jitter),
        ]
        return [(name, seconds) for name, seconds in parts if seconds > 0]

    def hidden_parts(self) -> list[tuple[str, float]]:
        """Name what takes no time of the step, since it runs in parallel with others, with its seconds."""
        hidden = [("expert exchanges", self.hidden_experts), ("gradient reduction", self.hidden)]
        return [(name, seconds) for name, seconds in hidden if seconds > 1e-6]  # less is rounding


def block_seconds(
    config: RunConfig,
    symbol: str,
    layout: Layout,
    hardware: Hardware,
    storage: Storage,
    imbalance: float,
    *,
    is_narrow: bool = False,
) -> float:
    """Forward and backward seconds of a rank's part of one block for one micro-batch; `is_narrow`: by its recipe."""
    if layout.sub_batches > 1:
        own = layout.one_sub_batch()
        once = block_seconds(config, symbol, own, hardware, storage, imbalance, is_narrow=is_narrow)
        return layout.sub_batches * once
    line = Roofline(
        hardware,
        config.train.precision,
        storage.element_bytes,
        layout.forwards(symbol),
        accumulates=accumulates(layout, storage),
        recipes=planned_recipes(config.low_precision, symbol) if is_narrow else {},
        wide_gradient=config.low_precision.weight_gradient == "bf16",
        kept_passes=kept_passes(config.low_precision, layout.micro_batches(config)),
    )
    line.passes(layout.tokens(config) / layout.stream_ranks * mixture_bytes(config.model))
    add_block(line, config, symbol, layout, storage, imbalance)
    return line.seconds


def estimate_step(
    config: RunConfig,
    layout: Layout,
    hardware: Hardware,
    storage: Storage,
    *,
    overlap: float,
    imbalance: float = 1.0,
    sent_rows: float = 1.0,
    meanwhile: Meanwhile = "shared",
    repeats: int = 0,
    drains: int = 1,
    stage: int | None = None,
) -> StepTime:
    """Seconds of one step of a pipeline stage, the slowest if none is named.

    `overlap`: part of ZeRO-3's gathers and of pipeline sends that may run in parallel with compute. Reductions run in
    parallel with the last backward pass under ZeRO-1 (each under ZeRO-2), gathers of weights next to the first forward
    pass. `imbalance`: routed rows of the most loaded rank over the mean. `sent_rows`: the part of rows that is sent to
    experts, of those that amfm sends.
    `meanwhile`: what is computed while they are sent. `repeats`: of `expert_exchange_seconds`. `drains`: times that a
    pipeline fills and drains.
    """
    every = held_by_stages(config.model, layout, config.train.sequence_length, config.optimizer.matrix_settings())
    narrow = frozenset(config.low_precision.narrow_blocks(config.model.letters))
    stages = distinct_stages(every, narrow) if stage is None else (every[stage],)
    block = {
        (symbol, False): block_seconds(config, symbol, layout, hardware, storage, imbalance)
        for symbol in {symbol for held in stages for symbol in held.letters}
    } | {
        (symbol, True): block_seconds(config, symbol, layout, hardware, storage, imbalance, is_narrow=True)
        for symbol in {symbol for held in stages for symbol in held.narrow_letters(narrow)}
    }
    found = []
    for held in stages:
        experts = expert_exchange_seconds(
            config,
            layout,
            hardware,
            storage,
            held,
            imbalance=imbalance,
            sent_rows=sent_rows,
            meanwhile=meanwhile,
            repeats=repeats,
            block=block,
        )
        blocks = seconds_by_letter(held, held.narrow_letters(narrow), block)
        found.append(_estimate_stage(config, layout, hardware, storage, held, blocks, overlap, experts, drains))
    # Stages wait for each other at every step, so the slowest sets the pace.
    return max(found, key=StepTime.total)


def seconds_by_letter(
    held: StageShare, narrow: tuple[str, ...], block: Mapping[tuple[str, bool], float]
) -> dict[str, float]:
    """Seconds of all blocks of a symbol on a stage, of which those of the symbols `narrow` have a recipe."""
    found = {}
    for symbol in dict.fromkeys(held.letters):
        number = narrow.count(symbol)
        found[symbol] = (held.letters.count(symbol) - number) * block[symbol, False]
        found[symbol] += number * block[symbol, True] if number else 0.0
    return found


def _estimate_stage(
    config: RunConfig,
    layout: Layout,
    hardware: Hardware,
    storage: Storage,
    held: StageShare,
    block: dict[str, float],
    overlap: float,
    experts: tuple[float, float],
    drains: int,
) -> StepTime:
    """All parts of a step for one pipeline stage, from the seconds of all blocks of each kind.

    `experts`: of a micro-batch's exchanges over the expert axis, what it waits for and what is hidden.
    """
    passes = layout.micro_batches(config)
    compute = {block_kind(symbol): passes * seconds for symbol, seconds in block.items()}
    if held.has_head:
        compute["head"] = passes * held.heads * head_seconds(config, layout, hardware, storage)
    if held.depths:
        compute["mtp projection"] = passes * held.depths * depth_seconds(config, layout, hardware, storage)
    one_pass = pass_seconds(config, layout, hardware, held, overlap=overlap)
    one_pass["expert"] += experts[0]
    communication = {axis: passes * seconds for axis, seconds in one_pass.items() if seconds}
    busy = (sum(compute.values()) + sum(communication.values())) / passes
    # Idle time of a rank while the pipeline fills and drains, in passes of one micro-batch.
    bubble = (
        drains * (layout.pipeline - 1) / layout.virtual_stages * busy / (3 if layout.schedule == "zero_bubble" else 1)
    )
    gathers = 0.0
    if layout.zero_stage == 3:
        # Forward and backward of each micro-batch, block by block; experts that ranks spread, over those that hold the same.
        for parameters, is_spread in held.gradient_groups(layout):
            ranks, stride = axis_place("expt_dp" if is_spread else "dp_cp", layout)
            moved, calls = storage.element_bytes * parameters, held.routed_blocks if is_spread else len(held.letters)
            gathers += 2 * passes * ring_seconds(moved, ranks, hardware, calls=calls, stride=stride)
    # Communication cannot hide behind more compute than there is.
    hidden = min(gathers * overlap, sum(compute.values()))
    exposed, hidden_reduction = reduction_seconds(config, layout, hardware, held, sum(compute.values()))
    overlapped = hidden_reduction + passes * experts[1]
    busy_all = passes * busy + bubble + exposed
    return StepTime(
        compute,
        communication,
        bubble,
        optimizer_seconds(held, passes, layout, hardware, storage, summed_behind(config, layout, storage, held)),
        exposed,
        gathers - hidden,
        hidden_reduction,
        passes * experts[1],
        passes * host_seconds(config, layout, hardware, storage, held, sum(compute.values()) / passes),
        hardware.collective_share * overlapped,
        hardware.slowest(layout.ranks) * busy_all,
    )


def host_seconds(
    config: RunConfig, layout: Layout, hardware: Hardware, storage: Storage, held: StageShare, compute: float
) -> float:
    """Seconds of a micro-batch that the device waits for the host: launches that outlast computing, and waits of the host.

    Routed experts whose rows are counted by rank make the host wait once a forward pass (model/moe/by_rank.py).
    """
    model, launches, waits = config.model, 0, 0
    if not (hardware.launch_seconds or hardware.wait_seconds):
        return 0.0  # a machine whose calibrated efficiencies have it
    narrow = narrow_kinds(config, held, storage)
    num_main = len(held.main_letters)
    blocks = Counter((symbol, place < num_main) for place, symbol in enumerate(held.letters))
    for (symbol, is_main), times in blocks.items():
        cut = cut_of(config, layout, symbol, 1.0, is_narrow=symbol in narrow)
        forward, backward = pass_launches(config, block_bytes(model, symbol, storage, cut), is_main=is_main)
        launches += layout.sub_batches * times * (layout.forwards(symbol) * forward + backward)
        waits += layout.sub_batches * times * layout.forwards(symbol) * (cut.sent > 0)
    return max(0.0, launches * hardware.launch_seconds - compute) + waits * hardware.wait_seconds


def summed_behind(config: RunConfig, layout: Layout, storage: Storage, held: StageShare) -> float:
    """Parameters of a rank whose gradients join the float32 sums after the products that make them.

    All of them, or where products add what they make: those of a head that no tensor ranks share, which is scaled on its way.
    Vectors are too few to count, and of the embedding only the sequences of a micro-batch's tokens are touched.
    """
    if not accumulates(layout, storage):
        return held.parameters
    return config.model.vocab_size * config.model.hidden_size * held.has_head * (layout.tensor == 1)


def optimizer_seconds(
    held: StageShare, passes: int, layout: Layout, hardware: Hardware, storage: Storage, summed: float
) -> float:
    """Seconds of the optimizer on this rank's shard and of what surrounds it.

    Around it: float32 sums over micro-batches of the gradients of `summed` parameters, and the check for finite values. These
    and AdamW are bound by memory; Muon moves less of it, and adds what `muon_seconds` says.
    """
    update = _update_seconds(held, passes, layout, hardware, storage, summed)
    return update + muon_seconds(held, layout, hardware, storage)


def muon_seconds(held: StageShare, layout: Layout, hardware: Hardware, storage: Storage) -> float:
    """Seconds of Newton-Schulz rounds on the matrices that this rank owns, and of the updates' way there and back.

    Two bytes a number each way on GPUs; without ZeRO one gather of results. 0 with AdamW. Rules that need matrices whole send
    three times as many numbers, twice as wide; of a package's arithmetic nothing is known.
    """
    own = held.own_matrices(layout)
    is_bf16 = storage.backend == "triton"
    peak = hardware.peak_flops("bf16" if is_bf16 else "float32") * hardware.product_efficiency
    size = 2 if is_bf16 else FLOAT32_BYTES
    seconds = (own.dense_flops + own.routed_flops) / peak
    for axis, numel, sent in (("dp_cp", own.dense, own.dense_sent), ("expt_dp", own.routed, own.routed_sent)):
        ranks, stride = axis_place(axis, layout)
        if layout.zero_stage == 0:
            seconds += ring_seconds(size * numel * ranks, ranks, hardware, calls=1, stride=stride)
        elif numel:
            seconds += all_to_all_seconds(size * sent, ranks, hardware, calls=2, stride=stride)
    return seconds


def _update_seconds(
    held: StageShare, passes: int, layout: Layout, hardware: Hardware, storage: Storage, summed: float
) -> float:
    """Seconds that an elementwise update of this rank's shard, sums and checks of gradients take of the memory's bandwidth."""
    e, parameters = storage.element_bytes, held.parameters
    share = held.share(layout) if layout.zero_stage else parameters
    update = 7 * FLOAT32_BYTES if storage.state_bytes == FLOAT32_BYTES else STEP_BYTES
    if layout.zero_stage in (1, 2):
        # Every pass adds such gradients to the float32 sums, which are read once more for the check.
        moved = FLOAT32_BYTES * parameters + (update + e) * share
        moved += passes * (e + 2 * FLOAT32_BYTES) * summed
        return moved / (hardware.memory_bytes_per_second * hardware.memory_efficiency)
    moved = e * parameters + (update + e) * share
    if e < FLOAT32_BYTES and passes > 1:
        moved += passes * (2 * e + 2 * FLOAT32_BYTES) * parameters
    return moved / (hardware.memory_bytes_per_second * hardware.memory_efficiency)


def reduction_seconds(
    config: RunConfig, layout: Layout, hardware: Hardware, held: StageShare, compute: float
) -> tuple[float, float]:
    """Seconds to reduce gradients in float32 and to gather updated weights: what stays exposed, and what is hidden.

    Under ZeRO-1 and 2 a bucket is sent while earlier blocks are differentiated, and weights while the next step's first
    micro-batch passes forward, `compute` seconds being those of all passes: two thirds of a pass hide a reduction, one
    third the gathers. Interleaved pieces of the model hide more (`left_after_pieces`). The last bucket has no compute left to
    hide it. ZeRO-0 and 3 reduce after the last pass.
    """
    passes = layout.micro_batches(config)
    found = [
        exchange
        for parameters, is_spread in held.gradient_groups(layout)
        for exchange in reduction_exchanges(config, layout, parameters, is_spread=is_spread)
    ]
    if layout.zero_stage not in (1, 2):
        return total_seconds(found, layout, hardware), 0.0
    one_pass = compute / passes
    reductions = [exchange for exchange in found if exchange.collective == "reduce_scatter"]
    reducing = total_seconds(reductions, layout, hardware)
    last = max((exchange_seconds(exchange, layout, hardware) / exchange.calls for exchange in reductions), default=0.0)
    gathering = total_seconds((item for item in found if item.collective == "all_gather"), layout, hardware)
    if layout.zero_stage == 2:
        hidden = passes * min(reducing - last, 2 / 3 * one_pass) + min(gathering, one_pass / 3)
        return passes * reducing + gathering - hidden, hidden
    exposed = max(last, left_after_pieces(reducing, layout, passes, 2 / 3 * one_pass))
    exposed += left_after_pieces(gathering, layout, passes, one_pass / 3)
    return exposed, reducing + gathering - exposed


def left_after_pieces(seconds: float, layout: Layout, passes: int, one_pass: float) -> float:
    """Of exchanges of a rank's weights what remains when its passes through all pieces of the model in one direction end.

    `one_pass`: seconds of such a pass of one micro-batch. An interleaved schedule takes as many micro-batches as there are
    stages through a piece before it takes them through the next, so gradients of the last piece are complete while all other
    pieces' passes are still to come, and the first forward pass needs one piece's weights at once and the others later. What
    belongs to the c + 1 pieces nearest to that end has c * stages + 1 passes of a piece next to it.
    """
    pieces = layout.virtual_stages if layout.schedule == "interleaved" else 1
    stages = min(layout.pipeline, passes)
    left = ((piece + 1) * seconds - (piece * stages + 1) * one_pass for piece in range(pieces))
    return max(0.0, *left) / pieces
