"""What CUDA graphs of blocks (pretrain/hooks/cuda_graphs.py) cost and save: memory at addresses that stay, and launches."""

from __future__ import annotations

from collections.abc import Mapping

from amfm.launch.plan.activations import FLOAT32_BYTES, BlockBytes, Storage, stream_bytes
from amfm.launch.plan.exchanges.buckets import bucketed_bytes
from amfm.launch.plan.layout import Layout, StageShare
from amfm.pretrain.config.schema import RunConfig

# Of a pass that is replayed: two copies at most, where what flows in is elsewhere, and the graph.
REPLAY_LAUNCHES = 3

Parts = dict[str, float]


def pass_launches(config: RunConfig, block: BlockBytes, *, is_main: bool) -> tuple[int, int]:
    """Launches of the host for a block's forward and backward pass; `is_main`: not of a depth, whose blocks are not captured."""
    is_replayed = config.train.cuda_graphs == "blocks" and is_main and block.is_graphable
    return (REPLAY_LAUNCHES, REPLAY_LAUNCHES) if is_replayed else block.launches


def with_graphs(
    config: RunConfig,
    layout: Layout,
    storage: Storage,
    held: StageShare,
    sizes: Mapping[str, BlockBytes],
    passes: Parts,
    step: Parts,
    *,
    is_captured: bool,
) -> tuple[Parts, Parts]:
    """Parts of passes and of the optimizer's step, with what graphs hold in both.

    Sums of gradients are there from the first pass on and stay, where else each step makes them and lets go of them. What
    captured passes keep and work with is in a pool that nothing else gets.
    """
    if config.train.cuda_graphs == "none":
        return passes, step
    sums = bucketed_bytes(held, layout)
    shares = FLOAT32_BYTES * held.share(layout) if max(layout.dense_sharers, layout.expert_sharers) > 1 else 0.0
    passes, step = passes | {"gradients": sums}, step | {"gradients": sums + shares}
    if is_captured:
        graphs = {"graphs": graph_bytes(config, layout, storage, held, sizes)}
        passes, step = passes | graphs, step | graphs
        captured = [sizes[symbol] for symbol in held.main_letters if sizes[symbol].is_graphable]
        tokens = layout.tokens(config)
        working = tokens * max((size.working for size in captured), default=0.0)
        passes["working space"] = max(passes["working space"], working)
        step |= {"activations": tokens * sum(size.kept for size in captured), "working space": working}
    return passes, step


def graph_bytes(
    config: RunConfig, layout: Layout, storage: Storage, held: StageShare, sizes: Mapping[str, BlockBytes]
) -> float:
    """Bytes that graphs hold besides what passes keep: a block's delta, and the gradient of what flowed in.

    And what flows in, if no graph made it; and the gradients of what flows out, if no graph makes them.
    """
    residual = stream_bytes(config.model, storage, layout.stream_ranks)
    delta = config.model.hidden_size * storage.element_bytes / layout.stream_ranks
    captured = [sizes[symbol].is_graphable for symbol in held.main_letters]
    total = 0.0
    for place, is_graph in enumerate(captured):
        if is_graph:
            flows_in = residual + delta * (place > 0)
            # The gradient of a sum is that of both addends: one tensor, unless they have two dtypes.
            total += delta + (residual if residual == delta else flows_in)
            total += 0.0 if place and captured[place - 1] else flows_in
            total += 0.0 if place + 1 < len(captured) and captured[place + 1] else residual + delta
    return layout.tokens(config) * total
