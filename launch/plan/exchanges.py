"""What one pipeline stage hands to collectives: in a micro-batch's forward and backward pass, and with its gradients.

How it works: every function returns `Exchange` rows for all ranks of a stage together, from the layout and the letters
of the stage alone, so that a search over thousands of layouts builds no model. `communication.py` turns the rows into
seconds; `traffic.py` adds them up over micro-batches and stages, and tests/launch/plan/test_real_traffic.py holds the sums against
bytes counted in a real step. Why one source: a plan that times other bytes than those which are counted is wrong without
anybody noticing. An axis of one rank sends nothing and has no row.

Letters in the comments: B rows of a micro-batch, T tokens of a row on a context rank, D hidden size, K choices a token.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from amfm.kernels.moe.capacity import expert_capacity
from amfm.launch.plan.activations import up_rows
from amfm.launch.plan.context_traffic import exchanged_windows, handed_states, segment_states
from amfm.launch.plan.layout import Layout, StageShare
from amfm.launch.plan.registered import is_registered, registered_block
from amfm.model.config.moe import MoeConfig
from amfm.model.config.schema import ModelConfig
from amfm.model.config.structure import Structure
from amfm.model.moe.capacity import slots_for
from amfm.pretrain.config.schema import RunConfig

FLOAT32, INT64 = 4, 8
DEEPSPEED_BUCKET_ELEMENTS = 200_000_000  # gradients of one reduction of DeepSpeed's own (pretrain/engine/engine.py)
BUCKET_ELEMENTS = 50_000_000  # gradients of one reduction under ZeRO 1 and 2, at least (pretrain/engine/engine.py)


@dataclass(frozen=True)
class Exchange:
    """Calls of one collective over one axis in one dtype, for a pipeline stage.

    `calls`: of each rank. `stage_bytes`: bytes handed in by all ranks of the stage together, over all of these calls.
    """

    axis: str
    collective: str
    dtype: str
    calls: int
    stage_bytes: float


def element_type(config: RunConfig) -> tuple[str, int]:
    """Name and bytes of the dtype that weights and activations have in the run's precision."""
    return {"float32": ("float32", 4), "bf16": ("bfloat16", 2)}[config.train.precision]


def pass_exchanges(config: RunConfig, layout: Layout, held: StageShare) -> list[Exchange]:
    """All exchanges of one micro-batch on a stage, forward and backward.

    `config` gives sizes and precision; parallel sizes and the micro-batch come from `layout`, so that a search need not
    build a configuration for every candidate.
    """
    return [
        *tensor_exchanges(config, layout, held),
        *expert_exchanges(config, layout, held),
        *context_exchanges(config, layout, held),
        *pipeline_exchanges(config, layout, held),
    ]


def tensor_exchanges(config: RunConfig, layout: Layout, held: StageShare) -> Iterator[Exchange]:
    """Tensor parallelism: collectives where blocks, embedding and loss enter and leave a sharded region."""
    if layout.tensor == 1:
        return
    model, moe = config.model, config.model.moe
    ranks, tokens = layout.stage_ranks, layout.tokens(config)
    routers, scans = held.letters.count("E"), held.letters.count("M")
    others = len(held.letters) - routers
    # Every block but E is one region of two crossings, its entry and its exit.
    dense = model.feed_forward
    factored = held.letters.count("-") if dense is not None and dense.linear_kind != "dense" else 0
    yield from _crossing(config, layout, model.hidden_size, times=2 * (others - factored), again=others - factored)
    if factored:
        assert dense is not None, "counted above"
        yield from _factored_crossings(config, layout, dense.hidden_size, dense.activation, dense.structure(), factored)
    if routers:
        assert moe is not None, "E blocks need model.moe"
        yield from _router_exchanges(config, layout, moe, routers)
    if scans and model.mamba is not None and model.mamba.num_groups < layout.tensor:
        # Mean squares of a norm whose group lies on several ranks.
        numbers = ranks * tokens * model.mamba.num_groups
        yield Exchange("tp", "all_reduce", "float32", 2 * scans, 2 * scans * numbers * FLOAT32)
    # The embedding's sum goes one way, the gradient of the head's input the other.
    if held.embeddings:
        yield from _crossing(config, layout, model.hidden_size, times=held.embeddings)
    if held.heads:
        yield from _crossing(config, layout, model.hidden_size, times=held.heads)
        # The loss: largest logit, logit of the label, sum of exponentials.
        calls = 3 * held.heads
        yield Exchange("tp", "all_reduce", "float32", calls, calls * ranks * tokens * FLOAT32)
    if held.depths:
        # The projection of a prediction depth reads two streams, joined, and gives one.
        yield from _crossing(config, layout, 2 * model.hidden_size, times=held.depths)
        yield from _crossing(config, layout, model.hidden_size, times=held.depths)


def _crossing(config: RunConfig, layout: Layout, width: int, *, times: int, again: int = 0) -> Iterator[Exchange]:
    """A stream of `width` numbers a token enters or leaves a tensor region `times` times, backward passes included.

    Without sequence parallel a crossing is one sum: forward where a region ends, backward where it begins. With it a
    crossing is a gather and a scatter, and projections gather the stream `again` in backward rather than keep it.
    """
    dtype, size = element_type(config)
    whole = layout.stage_ranks * layout.tokens(config) * width * size
    if layout.sequence_parallel:
        gathers = times + again
        share = layout.stage_ranks * (layout.tokens(config) // layout.tensor) * width * size
        yield Exchange("tp", "all_gather", dtype, gathers, gathers * share)
        yield Exchange("tp", "reduce_scatter", dtype, times, times * whole)
    else:
        yield Exchange("tp", "all_reduce", dtype, times, times * whole)


def _factored_crossings(
    config: RunConfig, layout: Layout, inner: int, activation: str, structure: Structure, blocks: int
) -> Iterator[Exchange]:
    """Crossings of feed-forwards of two factors a matrix: what enters, and under low rank what leaves, is between them."""
    width = config.model.hidden_size
    enters = structure.between(width, up_rows(inner, activation))
    leaves = structure.between(inner, width) if structure.kind == "lowrank" else width
    yield from _crossing(config, layout, enters, times=blocks, again=blocks if structure.kind != "blockshuffle" else 0)
    yield from _crossing(config, layout, leaves, times=blocks)
    if config.model.guide is not None:
        # The dense matrix reads the stream by itself; under low rank alone its output leaves by itself too.
        yield from _crossing(config, layout, width, times=blocks, again=blocks)
        yield from _crossing(config, layout, width, times=blocks if structure.kind == "lowrank" else 0)


def _router_exchanges(config: RunConfig, layout: Layout, moe: MoeConfig, blocks: int) -> Iterator[Exchange]:
    """Tensor-axis exchanges of E blocks: the shared expert is a region of its own, routed experts in some layouts.

    Without an expert axis every tensor rank holds a slice of each expert, and the routed part is a region too. With
    one, tensor ranks split the tokens instead, and results are gathered unless the stream is split already.
    """
    share = layout.stage_ranks * (layout.tokens(config) // layout.tensor)
    width = moe.latent_size or config.model.hidden_size
    inner, structure = moe.shared_expert_hidden_size, moe.shared_structure()
    if inner and structure.kind != "dense":
        yield from _factored_crossings(config, layout, inner, moe.activation, structure, blocks)
    elif inner:
        yield from _crossing(config, layout, config.model.hidden_size, times=2 * blocks, again=blocks)
    if layout.expert == 1:
        yield from _crossing(config, layout, width, times=2 * blocks)
        choices = layout.stage_ranks * layout.tokens(config) * moe.top_k
        yield Exchange("tp", "all_reduce", "float32", blocks, blocks * choices * FLOAT32)
    elif not layout.sequence_parallel:
        # Tokens are shared out among tensor ranks: results come together in forward, gradients in backward.
        dtype, size = element_type(config)
        yield Exchange("tp", "all_gather", dtype, 2 * blocks, 2 * blocks * share * width * size)
        yield Exchange("tp", "all_gather", "float32", blocks, blocks * share * moe.top_k * FLOAT32)
    if layout.sequence_parallel:
        yield Exchange("tp", "all_gather", "float32", blocks, blocks * share * moe.num_experts * FLOAT32)


class ExpertTraffic(NamedTuple):
    """What E blocks send over one axis: rows, and with them what is known of each row's choices; before them their numbers."""

    rows: Exchange
    details: Exchange | None
    counts: Exchange


def expert_exchanges(config: RunConfig, layout: Layout, held: StageShare) -> Iterator[Exchange]:
    """What spread experts exchange; with x expert-tensor ranks each row goes to all of them, and x parts of it come back."""
    traffic = expert_traffic(config, layout, held.letters.count("E"))
    if traffic is None:
        return
    yield from filter(None, traffic)
    beside = layout.expert_tensor
    if beside > 1:
        for exchange in filter(None, traffic[:2]):
            yield replace(exchange, axis="expt_tp", stage_bytes=beside * exchange.stage_bytes)
        yield replace(traffic.counts, axis="expt_tp", collective="all_gather")


def expert_traffic(config: RunConfig, layout: Layout, blocks: int) -> ExpertTraffic | None:
    """What so many E blocks send over the expert axis; None where experts are not spread.

    A token's row travels once to each rank that holds experts of its choice, and home again, forward and backward. Beside
    it go, out in forward and home in backward, the weights of its choices and their ids in float32. How many rows those
    are depends on the router; counted is what is expected of an even one. Under a capacity factor that makes slots, those
    travel, a row each, filled or not. Where halves of a micro-batch overlap, each travels by itself.
    """
    moe = config.model.moe
    if layout.expert == 1 or moe is None or not blocks:
        return None
    dtype, size = element_type(config)
    ranks, calls = layout.stage_ranks, blocks * layout.expert_parts
    slots = static_slots(config, layout)
    if slots is None:
        rows = ranks // layout.tensor * layout.tokens(config) * expected_ranks(moe, layout.expert)
        details = Exchange("ep", "all_to_all", "float32", 2 * calls, 2 * blocks * rows * 2 * moe.top_k * FLOAT32)
        numbers = layout.expert * 2 * layout.expert_parts
    else:
        rows, details, numbers = ranks * slots * moe.num_experts, None, moe.num_experts
    moved = 4 * blocks * rows * (moe.latent_size or config.model.hidden_size) * size
    return ExpertTraffic(
        Exchange("ep", "all_to_all", dtype, 4 * calls, moved),
        details,
        Exchange("ep", "all_to_all", "int64", blocks, blocks * ranks * numbers * INT64),
    )


@lru_cache(maxsize=256)
def expected_ranks(moe: MoeConfig, expert_ranks: int) -> float:
    """Ranks on which the experts of a token's choices lie, as expected of an even router: rows that a token sends.

    K different experts out of E leave out the e of one rank with probability C(E - e, K) / C(E, K), since so many of all
    sets have none of them; P ranks are each reached with the rest of it. A router that draws from g of n groups of experts
    first opens, of the groups on a rank, j with the probability of j among g draws out of n (hypergeometric); then K are
    drawn from all experts of open groups, of which those on the rank are j groups' (of a group that is larger than a rank,
    the rank's).
    """
    groups, best = moe.num_router_groups, moe.router_group_top_k
    group_size = moe.num_experts // groups
    held, inside = max(1, groups // expert_ranks), min(group_size, moe.num_experts // expert_ranks)
    open_experts = best * group_size
    reached = 0.0
    for number in range(1, min(held, best) + 1):
        opened = math.comb(held, number) * math.comb(groups - held, best - number) / math.comb(groups, best)
        left_out = math.comb(open_experts - number * inside, moe.top_k) / math.comb(open_experts, moe.top_k)
        reached += opened * (1 - left_out)
    return expert_ranks * reached


def has_certain_ranks(moe: MoeConfig, expert_ranks: int) -> bool:
    """Whether a token's choices lie on equally many ranks whatever a router chooses.

    So they do with one choice, with one expert a rank, and with so many choices that no rank is left out.
    """
    held = moe.num_experts // expert_ranks
    return moe.top_k == 1 or held == 1 or moe.top_k > moe.num_experts - held


def static_slots(config: RunConfig, layout: Layout) -> int | None:
    """Slots of each rank for each expert under a capacity factor (model/moe/capacity.py); None where rows are counted.

    An even number where they are cut in halves.
    """
    moe = config.model.moe
    if moe is None or moe.capacity_factor is None or layout.expert == 1:
        return None
    whole = layout.tokens(config) * layout.context
    capacity = expert_capacity(whole, moe.top_k, moe.num_experts, moe.capacity_factor)
    slots = slots_for(layout.tokens(config) // layout.tensor, moe.top_k, moe.num_experts, capacity)
    return None if slots is None else -(-slots // layout.expert_parts) * layout.expert_parts


def context_exchanges(config: RunConfig, layout: Layout, held: StageShare) -> Iterator[Exchange]:
    """Context parallelism: states and windows of Mamba2, keys and values of attention, routers' expert counts."""
    model, context, tensor = config.model, layout.context, layout.tensor
    if context == 1:
        return
    dtype, size = element_type(config)
    ranks, rows = layout.stage_ranks, layout.micro_batch_size
    blocks = held.letters.count("M")
    if model.mamba is not None and blocks:
        states = ranks * handed_states(model.mamba, rows, tensor)
        windows = ranks // context * exchanged_windows(model.mamba, rows, context, tensor, size)
        yield Exchange("cp", "all_gather", "float32", 2 * blocks, blocks * states)
        yield Exchange("cp", "all_to_all", dtype, 2 * blocks, blocks * windows)
    blocks = held.letters.count("*")
    if model.attention is not None and blocks:
        heads = max(1, model.attention.num_kv_heads // tensor)
        # Keys and values are gathered over the group in forward; their gradients are summed back to the owners in
        # backward.
        keys = ranks * 2 * layout.tokens(config) * heads * model.attention.head_dim * size
        yield Exchange("cp", "all_gather", dtype, blocks, blocks * keys)
        yield Exchange("cp", "reduce_scatter", dtype, blocks, context * blocks * keys)
    blocks = held.letters.count("E")
    if model.moe is not None and blocks:
        weights = model.moe.auxiliary_loss_weight, model.moe.sequence_loss_weight
        counts = bool(weights[0]) + rows * bool(weights[1])
        counted = blocks * ranks * counts * model.moe.num_experts * INT64
        yield Exchange("cp", "all_reduce", "int64", blocks * sum(map(bool, weights)), counted)
    yield from _registered_exchanges(model, layout, held, config.train.sequence_length)


def _registered_exchanges(
    model: ModelConfig, layout: Layout, held: StageShare, sequence_length: int
) -> Iterator[Exchange]:
    """States of registered mixers, two segments a row each way: an estimate, for their transfers are their own affair."""
    for letter in filter(is_registered, held.letters):
        numbers = registered_block(model, letter, sequence_length).state_numbers
        states = layout.stage_ranks * segment_states(layout.micro_batch_size, numbers // layout.tensor)
        yield Exchange("cp", "all_gather", "float32", 2, states)


def pipeline_exchanges(config: RunConfig, layout: Layout, held: StageShare) -> Iterator[Exchange]:
    """Pipeline sends: the residual stream from each piece to the next, and its gradient back."""
    if layout.pipeline == 1:
        return
    dtype, size = ("float32", FLOAT32) if config.model.residual_in_fp32 else element_type(config)
    tokens = layout.tokens(config) // layout.stream_ranks
    # Every piece sends a stream forward but the last, and a gradient back but the first.
    sends = 2 * layout.virtual_stages - held.has_embedding - held.has_head
    moved = layout.stage_ranks * tokens * config.model.hidden_size * size
    yield Exchange("pp", "send", dtype, sends, sends * moved)


def reduction_exchanges(
    config: RunConfig, layout: Layout, parameters: float, *, is_spread: bool, passes: int = 1
) -> Iterator[Exchange]:
    """Once a step for one parameter group of a rank: gradients are reduced, and in ZeRO-1 and 2 weights gathered.

    `is_spread`: experts that lie on different ranks of the expert axis. `passes`: reductions a step. Sums are float32.
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
