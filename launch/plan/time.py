"""Seconds of a step: each operation at its roofline, ZeRO's collectives on rings, AdamW and gradient sums by bandwidth.

Roofline: an operation takes the longer of its arithmetic at a stated part of the peak and its bytes at a stated part of
the bandwidth (Williams et al. 2009, "Roofline", section 3). Ring collectives over N ranks move (N - 1) / N of the bytes
once for a gather or scatter and twice for an all-reduce (Thakur et al. 2005, "Optimization of Collective Communication
Operations in MPICH", section 3). A pipeline waits (stages - 1) / pieces a rank micro-batches long, a third of that where
the schedule cuts backward passes in two (Qi et al. 2023, arXiv 2401.10241, section 2).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from launch.plan.activations import FLOAT32_BYTES, Storage, up_rows
from launch.plan.communication import (
    all_to_all_seconds,
    axis_place,
    exchange_seconds,
    pass_seconds,
    ring_seconds,
    total_seconds,
)
from launch.plan.exchanges import reduction_exchanges
from launch.plan.hardware import Hardware
from launch.plan.layout import Layout, StageShare, distinct_stages, held_by_stages
from launch.plan.registered import is_registered, registered_block
from model.config.pattern import block_kind
from model.config.schema import ModelConfig
from model.config.structure import Structure
from pretrain.config.schema import RunConfig
from pretrain.engine.bf16_adamw import STEP_BYTES


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step of the slowest pipeline stage, by part.

    `communication`: inside the passes, by axis. `bubble`: waiting for other stages. `reduction`: of gradients, and the
    gathers of new weights under ZeRO-1 and 2, as far as passes do not hide them; `hidden` is what they do. `exposed_gathers`
    is what compute does not hide of ZeRO-3's.
    """

    compute: dict[str, float]
    communication: dict[str, float]
    bubble: float
    optimizer: float
    reduction: float
    exposed_gathers: float
    hidden: float = 0.0

    def total(self) -> float:
        """Seconds of the whole step."""
        passes = sum(self.compute.values()) + sum(self.communication.values())
        return passes + self.bubble + self.optimizer + self.reduction + self.exposed_gathers

    def parts(self) -> list[tuple[str, float]]:
        """Name the parts with their seconds, in the order in which they are spent; parts without any are left out."""
        parts = [
            *self.compute.items(),
            *((f"communication, {axis}", seconds) for axis, seconds in self.communication.items()),
            ("gathers not hidden", self.exposed_gathers),
            ("pipeline bubble", self.bubble),
            ("reduction not hidden", self.reduction),
            ("optimizer and sums of gradients", self.optimizer),
        ]
        return [(name, seconds) for name, seconds in parts if seconds > 0]


class Roofline:
    """Sum of roofline seconds of forward and backward operations on one device.

    `forwards` is 2 where blocks are recomputed, so that every method counts the forward part once more.
    """

    def __init__(self, hardware: Hardware, precision: str, element_bytes: int, forwards: int = 1) -> None:
        self.hardware, self.element_bytes, self.forwards = hardware, element_bytes, forwards
        self.peak = hardware.peak_flops(precision)
        self.bandwidth = hardware.memory_bytes_per_second * hardware.memory_efficiency
        self.seconds = 0.0

    def product(self, rows: float, inputs: float, outputs: float, *, groups: int = 1, wide: bool = False) -> None:
        """Add [rows, in] x [in, out] and the two products of its backward pass; `groups` matrices share the rows.

        `wide`: in float32, as the router's logits are.
        """
        hardware = self.hardware
        efficiency = hardware.grouped_efficiency if groups > 1 else hardware.product_efficiency
        peak = hardware.float32_flops if wide else self.peak
        size = FLOAT32_BYTES if wide else self.element_bytes
        moved = size * (rows * (inputs + outputs) + groups * inputs * outputs)
        self.seconds += (self.forwards + 2) * max(
            2 * rows * inputs * outputs / (peak * efficiency), moved / self.bandwidth
        )

    def mixing(self, flops: float, moved: float) -> None:
        """Add attention or a scan, given forward `flops` and bytes moved.

        Backward costs 2.5 times the forward pass, as it recomputes the scores.
        """
        rate = self.peak * self.hardware.attention_efficiency
        self.seconds += (self.forwards + 2.5) * max(flops / rate, moved / self.bandwidth)

    def passes(self, moved: float) -> None:
        """Add memory-bound operations by the bytes they move, forward and backward together; a third are forward's."""
        self.seconds += (self.forwards + 2) / 3 * moved / self.bandwidth


def block_seconds(
    config: RunConfig, letter: str, layout: Layout, hardware: Hardware, storage: Storage, imbalance: float
) -> float:
    """Forward and backward seconds of a rank's part of one block for one micro-batch."""
    model, e, tokens, tensor = config.model, storage.element_bytes, layout.tokens(config), layout.tensor
    forwards = 2 if letter in layout.recompute else 1
    line = Roofline(hardware, config.train.precision, e, forwards)
    # The norm with its residual: two tensors read and two written; backward reads three and writes two.
    line.passes(9 * tokens / layout.stream_ranks * model.hidden_size * e)
    if letter == "M":
        _add_mamba(line, model, tokens, tensor)
    elif letter == "*":
        _add_attention(line, model, tokens, tensor, config.train.sequence_length)
    elif is_registered(letter):
        _add_registered(line, config, letter, tokens, tensor)
    elif letter == "E":
        _add_moe(line, model, tokens, layout, imbalance)
    else:
        assert model.feed_forward is not None, "check_model was not called: model.feed_forward is missing"
        feed_forward = model.feed_forward
        if feed_forward.linear_kind == "dense":
            units = feed_forward.hidden_size / tensor
            _add_feed_forward(line, tokens, model.hidden_size, units, feed_forward.activation)
        else:
            _add_factored(
                line, model, layout, tokens, feed_forward.hidden_size, feed_forward.activation, feed_forward.structure()
            )
    return line.seconds


def _add_feed_forward(line: Roofline, rows: float, width: int, units: float, activation: str, groups: int = 1) -> None:
    """Up and down projection with the activation between them, `units` hidden units wide on this rank."""
    up = up_rows(1, activation) * units
    line.product(rows, width, up, groups=groups)
    line.product(rows, units, width, groups=groups)
    line.passes(rows * (3 * up + 2 * units) * line.element_bytes)


def _add_factored(
    line: Roofline,
    model: ModelConfig,
    layout: Layout,
    tokens: float,
    inner: int,
    activation: str,
    structure: Structure,
) -> None:
    """A feed-forward of two factors a matrix: the factor at the stream is whole on every rank, the other is cut."""
    width, rows = model.hidden_size, up_rows(inner, activation)
    blocks, own = structure.blocks or 1, tokens / layout.stream_ranks
    enters, leaves = structure.between(width, rows), structure.between(inner, width)
    # Product by block: as many rows of a block's width, a group a block.
    line.product(own * blocks, width / blocks, enters / blocks, groups=blocks)
    second = blocks if structure.kind == "blockshuffle" else 1
    line.product(tokens * second / layout.tensor, enters / second, rows / second, groups=second)
    line.passes(tokens / layout.tensor * (3 * rows + 2 * inner) * line.element_bytes)
    line.product(tokens * blocks / layout.tensor, inner / blocks, leaves / blocks, groups=blocks)
    last = own if structure.kind == "lowrank" else tokens / layout.tensor
    line.product(last * second, leaves / second, width / second, groups=second)
    if model.guide is not None:
        _add_feed_forward(line, tokens, width, inner / layout.tensor, activation)


def _add_mamba(line: Roofline, model: ModelConfig, tokens: float, tensor: int) -> None:
    """Projections, causal convolution, chunked scan and gated norm of a rank's heads."""
    assert model.mamba is not None, "check_model was not called: model.mamba is missing"
    mamba, e = model.mamba, line.element_bytes
    inner, groups = mamba.inner_size() / tensor, max(1, mamba.num_groups / tensor)
    channels = inner + 2 * groups * mamba.state_size
    line.product(tokens, model.hidden_size, inner + channels + mamba.num_heads / tensor)
    line.product(tokens, inner, model.hidden_size)
    line.passes(tokens * channels * 5 * e + tokens * inner * 8 * e)  # convolution, gated norm
    # Scores once a group, their product with x, and the state's way in and out.
    scan = 2 * mamba.chunk_size * (groups * mamba.state_size + inner) + 4 * inner * mamba.state_size
    states = FLOAT32_BYTES * inner * mamba.state_size / mamba.chunk_size
    line.mixing(tokens * scan, tokens * ((channels + inner) * e + states))


def _add_registered(line: Roofline, config: RunConfig, letter: str, tokens: float, tensor: int) -> None:
    """Products with all matrices, the mixing itself, and what was kept read once more by the passes around it."""
    block = registered_block(config.model, letter, torch.bfloat16, config.train.sequence_length)
    for outputs, inputs in block.matrices:
        line.product(tokens, inputs, outputs / tensor)
    moved = tokens * block.kept_bytes / tensor
    line.mixing(tokens * block.sequence_flops / tensor, moved)
    line.passes(2 * moved)


def _add_attention(line: Roofline, model: ModelConfig, tokens: float, tensor: int, sequence_length: int) -> None:
    """Projections, q-k norm and rotation, gates, and causal attention over half of the row on average."""
    assert model.attention is not None, "check_model was not called: model.attention is missing"
    attention, e = model.attention, line.element_bytes
    query = attention.num_heads / tensor * attention.head_dim
    keys = max(1, attention.num_kv_heads / tensor) * attention.head_dim
    gates = {"none": 0.0, "head": query / attention.head_dim, "element": query}[attention.gate]
    line.product(tokens, model.hidden_size, query + 2 * keys + gates)
    line.product(tokens, query, model.hidden_size)
    if gates:
        line.passes(tokens * (5 * query + 3 * gates) * e)
    if attention.qk_norm or attention.positions == "rope":
        line.passes(5 * tokens * (query + keys) * e)
    line.mixing(tokens * 4 * (sequence_length + 1) / 2 * query, tokens * (2 * query + 2 * keys) * e)


def _add_moe(line: Roofline, model: ModelConfig, tokens: float, layout: Layout, imbalance: float) -> None:
    """Router, latent projections, grouped products of this rank's rows, their permutation, and the shared expert."""
    assert model.moe is not None, "check_model was not called: model.moe is missing"
    moe, e, hidden = model.moe, line.element_bytes, model.hidden_size
    width, is_spread = moe.latent_size or hidden, layout.expert > 1
    routed = tokens / (layout.tensor if is_spread else layout.stream_ranks)  # whose router runs here
    line.product(routed, hidden, moe.num_experts, wide=True)
    line.passes(6 * routed * moe.num_experts * FLOAT32_BYTES)
    if moe.latent_size is not None:
        line.product(routed, hidden, width)
        line.product(routed, width, hidden)
    # Spread experts: this rank's tokens' worth of rows, gathered over the ranks that cut an expert's width.
    rows = tokens * moe.top_k
    if is_spread:
        rows *= imbalance * layout.expert_tensor / layout.tensor
    units = moe.expert_hidden_size / layout.width_ranks
    _add_feed_forward(line, rows, width, units, moe.activation, groups=moe.num_experts // layout.expert)
    line.passes(rows * width * (4 * e + 2 * FLOAT32_BYTES))  # into expert order, back, and both gradients
    shared, structure = moe.shared_expert_hidden_size, moe.shared_structure()
    if shared and structure.kind != "dense":
        _add_factored(line, model, layout, tokens, shared, moe.activation, structure)
    elif shared:
        _add_feed_forward(line, tokens, hidden, shared / layout.tensor, moe.activation)
    if moe.shared_expert_gate:
        line.passes(tokens / layout.stream_ranks * 5 * hidden * e)


def head_seconds(config: RunConfig, layout: Layout, hardware: Hardware, storage: Storage) -> float:
    """Seconds of final norm, logits, loss and both gradients; logits pass through memory in float32."""
    model, tokens = config.model, layout.tokens(config)
    vocab = model.vocab_size / layout.tensor
    line = Roofline(hardware, config.train.precision, storage.element_bytes)
    line.product(tokens, model.hidden_size, vocab)
    line.passes(4 * FLOAT32_BYTES * tokens * vocab + 9 * tokens * model.hidden_size * storage.element_bytes)
    return line.seconds


def depth_seconds(config: RunConfig, layout: Layout, hardware: Hardware, storage: Storage) -> float:
    """Seconds of what a depth of multi-token prediction has around its blocks: two norms and its projection."""
    hidden, tokens = config.model.hidden_size, layout.tokens(config)
    line = Roofline(hardware, config.train.precision, storage.element_bytes)
    line.passes(2 * 6 * tokens / layout.stream_ranks * hidden * storage.element_bytes)
    line.product(tokens, 2 * hidden / layout.tensor, hidden)
    return line.seconds


def estimate_step(
    config: RunConfig,
    layout: Layout,
    hardware: Hardware,
    storage: Storage,
    *,
    overlap: float,
    imbalance: float = 1.0,
    sent_choices: float = 1.0,
    stage: int | None = None,
) -> StepTime:
    """Seconds of one step of a pipeline stage, the slowest where none is named.

    `overlap`: part of ZeRO-3's gathers and of pipeline sends that may run beside compute. Reductions run beside the last
    backward pass under ZeRO-1 (each under ZeRO-2), gathers of weights beside the first forward pass. `imbalance`: routed
    rows of the fullest rank over the mean. `sent_choices`: the part of routed rows that travels between ranks.
    """
    every = held_by_stages(config.model, layout, config.train.sequence_length, config.optimizer.muon_settings())
    stages = distinct_stages(every) if stage is None else (every[stage],)
    block = {
        letter: block_seconds(config, letter, layout, hardware, storage, imbalance)
        for letter in {letter for held in stages for letter in held.letters}
    }
    # Stages wait for each other at every step, so the slowest sets the pace.
    found = [_estimate_stage(config, layout, hardware, storage, held, block, overlap, sent_choices) for held in stages]
    return max(found, key=StepTime.total)


def _estimate_stage(
    config: RunConfig,
    layout: Layout,
    hardware: Hardware,
    storage: Storage,
    held: StageShare,
    block: dict[str, float],
    overlap: float,
    sent_choices: float,
) -> StepTime:
    """All parts of a step for one pipeline stage, from the seconds of each kind of block."""
    passes = layout.micro_batches(config)
    compute = {
        block_kind(letter): passes * held.letters.count(letter) * block[letter]
        for letter in dict.fromkeys(held.letters)
    }
    if held.has_head:
        compute["head"] = passes * held.heads * head_seconds(config, layout, hardware, storage)
    if held.depths:
        compute["mtp projection"] = passes * held.depths * depth_seconds(config, layout, hardware, storage)
    one_pass = pass_seconds(config, layout, hardware, held, overlap=overlap, sent_choices=sent_choices)
    communication = {axis: passes * seconds for axis, seconds in one_pass.items() if seconds}
    busy = (sum(compute.values()) + sum(communication.values())) / passes
    # Idle time of a rank while the pipeline fills and drains, in passes of one micro-batch.
    bubble = (layout.pipeline - 1) / layout.virtual_stages * busy / (3 if layout.schedule == "zero_bubble" else 1)
    gathers = 0.0
    if layout.zero_stage == 3:
        # Forward and backward of each micro-batch, block by block.
        moved = storage.element_bytes * held.parameters
        gathers = 2 * passes * ring_seconds(moved, layout.dense_sharers, hardware, calls=len(held.letters))
    # Communication cannot hide behind more compute than there is.
    hidden = min(gathers * overlap, sum(compute.values()))
    exposed, beside = reduction_seconds(config, layout, hardware, held, sum(compute.values()))
    return StepTime(
        compute,
        communication,
        bubble,
        optimizer_seconds(held, passes, layout, hardware, storage),
        exposed,
        gathers - hidden,
        beside,
    )


def optimizer_seconds(held: StageShare, passes: int, layout: Layout, hardware: Hardware, storage: Storage) -> float:
    """Seconds of the optimizer on this rank's shard and of what surrounds it.

    Around it: float32 sums of bf16 gradients over micro-batches, and the check for finite values. These and AdamW are bound
    by memory; Muon moves less of it, and adds what `muon_seconds` says.
    """
    return _update_seconds(held, passes, layout, hardware, storage) + muon_seconds(held, layout, hardware, storage)


def muon_seconds(held: StageShare, layout: Layout, hardware: Hardware, storage: Storage) -> float:
    """Seconds of Newton-Schulz rounds on the matrices that this rank owns, and of the updates' way there and back.

    Two bytes a number each way on cards; without ZeRO one gather of results. 0 with AdamW.
    """
    own = held.own_matrices(layout)
    is_bf16 = storage.backend == "triton"
    peak = hardware.peak_flops("bf16" if is_bf16 else "float32") * hardware.product_efficiency
    size = 2 if is_bf16 else FLOAT32_BYTES
    seconds = (own.dense_flops + own.routed_flops) / peak
    for axis, numel in (("dp_cp", own.dense), ("expt_dp", own.routed)):
        ranks, stride = axis_place(axis, layout)
        if layout.zero_stage == 0:
            seconds += ring_seconds(size * numel * ranks, ranks, hardware, calls=1, stride=stride)
        elif numel:
            seconds += all_to_all_seconds(2 * size * numel, ranks, hardware, calls=2, stride=stride)
    return seconds


def _update_seconds(held: StageShare, passes: int, layout: Layout, hardware: Hardware, storage: Storage) -> float:
    """Seconds that an elementwise update of this rank's shard, sums and checks of gradients take of the memory's bandwidth."""
    e, parameters = storage.element_bytes, held.parameters
    share = held.share(layout) if layout.zero_stage else parameters
    update = 7 * FLOAT32_BYTES if storage.state_bytes == FLOAT32_BYTES else STEP_BYTES
    if layout.zero_stage in (1, 2):
        # Every pass adds its gradients to the float32 sums, which are read once more for the check.
        moved = FLOAT32_BYTES * parameters + (update + e) * share
        moved += passes * (e + 2 * FLOAT32_BYTES) * parameters
        return moved / (hardware.memory_bytes_per_second * hardware.memory_efficiency)
    moved = e * parameters + (update + e) * share
    if e < FLOAT32_BYTES and passes > 1:
        moved += passes * (2 * e + 2 * FLOAT32_BYTES) * parameters
    return moved / (hardware.memory_bytes_per_second * hardware.memory_efficiency)


def reduction_seconds(
    config: RunConfig, layout: Layout, hardware: Hardware, held: StageShare, compute: float
) -> tuple[float, float]:
    """Seconds to reduce gradients in float32 and to gather updated weights: what stays exposed, and what is hidden.

    Under ZeRO-1 and 2 a bucket travels while earlier blocks are differentiated, and weights while the next step's first
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
    belongs to the c + 1 pieces nearest to that end has c * stages + 1 passes of a piece beside it.
    """
    pieces = layout.virtual_stages if layout.schedule == "interleaved" else 1
    stages = min(layout.pipeline, passes)
    left = ((piece + 1) * seconds - (piece * stages + 1) * one_pass for piece in range(pieces))
    return max(0.0, *left) / pieces
