"""What one pipeline stage hands to collectives: in a micro-batch's forward and backward pass, and with its gradients.

How it works: every function returns `Exchange` rows for all ranks of a stage together, only from the layout and the
letters of the stage, so that a search over thousands of layouts builds no model. What a block hands to its tensor and context
ranks is what it handed to stand-ins for their groups (`../measured.py`). `seconds.py` turns the rows into seconds; `step.py` adds them up over micro-batches and stages, and
tests/launch/plan/test_real_traffic.py holds the sums against bytes counted in a real step. Why one source: a plan that
times other bytes than those which are counted is wrong without anyone noticing. An axis of one rank sends nothing and
has no row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

from amfm.launch.plan.activations import storage_of
from amfm.launch.plan.blocks.cut import cut_of, row_tokens
from amfm.launch.plan.blocks.expert_traffic import expert_traffic
from amfm.launch.plan.blocks.measured import block_bytes
from amfm.launch.plan.exchange import (
    BUCKET_ELEMENTS,
    DEEPSPEED_BUCKET_ELEMENTS,
    FLOAT32,
    INT64,
    Exchange,
    crossing,
    element_type,
)
from amfm.launch.plan.in_flight import places_of
from amfm.launch.plan.layout import Layout, StageShare, count_routed
from amfm.model.config.moe import MoeConfig
from amfm.pretrain.config.schema import RunConfig


def pass_exchanges(config: RunConfig, layout: Layout, held: StageShare) -> list[Exchange]:
    """All exchanges of one micro-batch on a stage, forward and backward.

    `config` gives sizes and precision; parallel sizes and the micro-batch come from `layout`, so that a search need not
    build a configuration for every candidate.
    """
    return [
        *block_exchanges(config, layout, held),
        *tensor_exchanges(config, layout, held),
        *expert_exchanges(config, layout, held),
        *pipeline_exchanges(config, layout, held),
    ]


def block_exchanges(config: RunConfig, layout: Layout, held: StageShare) -> Iterator[Exchange]:
    """Tensor and context parallelism: what blocks hand in, and routers' expert counts on context ranks.

    The first of tensor ranks stands for all of them, of context ranks the first for both ends, and the second for those between.
    """
    if layout.tensor == layout.context == 1:
        return
    once, storage = layout.one_sub_batch(), storage_of(config)
    for symbol, repeats in Counter(held.letters).items():
        times, options = layout.sub_batches * repeats, config.model.block_options(symbol)
        cut, tokens = replace(cut_of(config, once, symbol, 1.0), is_split=False), row_tokens(config, once, symbol)
        inner, ends = replace(cut, context_rank=int(cut.context > 2)), min(2, layout.context)
        end, between = (block_bytes(config.model, symbol, storage, each, tokens=tokens).handed for each in (cut, inner))
        for each, other in zip(end, between, strict=True):
            if each.axis in ("tp", "cp"):
                handed = layout.stage_ranks // layout.context * once.tokens(config) * times
                handed *= ends * each.nbytes + (layout.context - ends) * other.nbytes
                yield Exchange(each.axis, each.collective, each.dtype, times * each.calls, handed / each.tokens)
        if isinstance(options, MoeConfig) and layout.context > 1:
            # Of a micro-batch, and of each row, for balance losses.
            weights = options.auxiliary_loss_weight, options.sequence_loss_weight
            counts = bool(weights[0]) + once.micro_batch_size * bool(weights[1])
            counted = times * layout.stage_ranks * counts * options.num_experts * INT64
            yield Exchange("cp", "all_reduce", "int64", times * sum(map(bool, weights)), counted)


def tensor_exchanges(config: RunConfig, layout: Layout, held: StageShare) -> Iterator[Exchange]:
    """Tensor parallelism: collectives where embedding and loss enter and leave a sharded region."""
    if layout.tensor == 1:
        return
    hidden = config.model.hidden_size
    # The embedding's sum goes one way, the gradient of the head's input the other.
    if held.embeddings:
        yield from crossing(config, layout, hidden, times=held.embeddings)
    if held.heads:
        yield from crossing(config, layout, hidden, times=held.heads)
        # The loss: largest logit, logit of the label, sum of exponentials.
        calls = 3 * held.heads
        yield Exchange(
            "tp", "all_reduce", "float32", calls, calls * layout.stage_ranks * layout.tokens(config) * FLOAT32
        )
    if held.depths:
        # The projection of an MTP layer reads two streams, joined, and gives one.
        yield from crossing(config, layout, 2 * hidden, times=held.depths)
        yield from crossing(config, layout, hidden, times=held.depths)


def expert_exchanges(config: RunConfig, layout: Layout, held: StageShare) -> Iterator[Exchange]:
    """What spread experts exchange; with x expert-tensor ranks each row goes to all of them, and x parts of it come back."""
    narrow = count_routed(config.model, held.narrow_letters(config.low_precision.narrow_blocks(config.model.letters)))
    traffic = expert_traffic(
        config, layout.one_sub_batch(), layout.sub_batches * held.routed_blocks, layout.sub_batches * narrow
    )
    if traffic is None:
        return
    yield from filter(None, traffic)
    beside = layout.expert_tensor
    if beside > 1:
        # Between ranks that share experts' width rows are wide.
        wide = expert_traffic(config, layout.one_sub_batch(), layout.sub_batches * held.routed_blocks)
        assert wide is not None, "experts are spread"
        for exchange in filter(None, (wide.rows, wide.details)):
            yield replace(exchange, axis="expt_tp", stage_bytes=beside * exchange.stage_bytes)
        yield replace(traffic.counts, axis="expt_tp", collective="all_gather")


def pipeline_exchanges(config: RunConfig, layout: Layout, held: StageShare) -> Iterator[Exchange]:
    """Pipeline sends: the residual stream from each piece to the next, and its gradient back."""
    if layout.pipeline == 1:
        return
    dtype, size = ("float32", FLOAT32) if config.model.residual_in_fp32 else element_type(config)
    tokens = layout.tokens(config) // layout.stream_ranks
    # Every piece sends a stream forward but the last, and a gradient back but the first.
    sends = 2 * layout.virtual_stages - held.has_embedding - held.has_head
    moved = layout.stage_ranks * tokens * config.model.hidden_size * size
    model, ends = config.model, [(places[0], places[-1] + 1) for places in places_of(held)]
    forward = sum(model.stream_tensors(stop) for _, stop in ends if stop < len(model.letters))
    backward = sum(model.stream_tensors(start) for start, _ in ends if start)
    yield Exchange("pp", "send", dtype, sends, (forward + backward) * moved)


def reduction_exchanges(
    config: RunConfig, layout: Layout, parameters: float, *, is_spread: bool, passes: int = 1
) -> Iterator[Exchange]:
    """Once a step for one parameter group of a rank: gradients are reduced, and in ZeRO-1 and 2 weights gathered.

    `is_spread`: experts that are on different ranks of the expert axis. `passes`: reductions per step. Sums are float32.
    Under ZeRO-1 and 2 each rank is left with its range, and DeepSpeed pads a group to a multiple of twice the ranks that
    share its state. ZeRO-3 reduce-scatters too, and gathers weights in the passes instead.
    """
    axis, ranks = ("expt_dp", layout.expert_sharers) if is_spread else ("dp_cp", layout.dense_sharers)
    if ranks == 1 or not parameters:
        return
    if layout.zero_stage not in (1, 2):
        calls = int(-(-parameters // DEEPSPEED_BUCKET_ELEMENTS))
        reduction = "reduce_scatter" if layout.zero_stage == 3 else "all_reduce"
        yield Exchange(axis, reduction, "float32", calls, layout.stage_ranks * parameters * FLOAT32)
        return
    calls = int(-(-parameters // BUCKET_ELEMENTS))
    dtype, size = element_type(config)
    padded = -(-parameters // (2 * ranks)) * 2 * ranks
    scattered = passes * layout.stage_ranks * padded * FLOAT32
    yield Exchange(axis, "reduce_scatter", "float32", passes * calls, scattered)
    yield Exchange(axis, "all_gather", dtype, calls, layout.stage_ranks // ranks * padded * size)
