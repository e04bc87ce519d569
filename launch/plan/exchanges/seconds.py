"""Seconds of collectives on the declared links: rings for gathers and reductions, all ranks at once for all-to-all.

How it works: `stage.py` says which bytes one stage hands to which collective; here each row is timed with the links
between the ranks of its axis. Ranks are numbered with the tensor axis innermost, so an axis of `ranks` neighbours is
`stride` ranks apart, which decides whether it stays inside a node. Nothing overlaps but what `overlap` says; of the expert
axis `../expert_time.py` says more.
"""

from __future__ import annotations

from collections.abc import Iterable

from amfm.launch.plan.exchange import Exchange
from amfm.launch.plan.exchanges.stage import pass_exchanges
from amfm.launch.plan.hardware import Hardware
from amfm.launch.plan.layout import Layout, StageShare
from amfm.pretrain.config.schema import RunConfig

# Axes of process groups under the names of the plan's parts.
PARTS = {"tp": "tensor", "ep": "expert", "expt_tp": "expert", "cp": "context", "pp": "pipeline"}


def ring_seconds(moved: float, ranks: int, hardware: Hardware, *, calls: float, stride: int = 1) -> float:
    """Seconds of `calls` ring gathers or scatters over `ranks` ranks that move `moved` bytes in all.

    Each of the ranks - 1 hops of a call adds latency; the bytes pass at the ring's slowest link. `stride` is the
    distance in rank numbers between neighbours of the ring, which decides whether they share a node.
    """
    if ranks == 1 or calls == 0:
        return 0.0
    speed = hardware.ring_bytes_per_second(ranks, stride)
    return moved * (ranks - 1) / ranks / speed + calls * (ranks - 1) * hardware.hop_seconds


def all_to_all_seconds(sent: float, ranks: int, hardware: Hardware, *, calls: int = 1, stride: int = 1) -> float:
    """Seconds of `calls` all-to-alls in which every rank sends `sent` bytes in all, evenly over the group.

    Traffic inside a node and across nodes uses different links at the same time, so the slower of the two counts.
    """
    if ranks == 1:
        return 0.0
    together = min(ranks, max(1, hardware.gpus_per_node // stride))
    inside = sent * (together - 1) / ranks / hardware.node_link_bytes_per_second
    across = sent * (ranks - together) / ranks / hardware.network_bytes_per_second
    return (
        max(inside, across) / (hardware.all_to_all_efficiency or hardware.link_efficiency)
        + calls * hardware.hop_seconds
    )


def axis_place(axis: str, layout: Layout) -> tuple[int, int]:
    """Group size of an axis, and its stride: the distance in rank numbers between neighbours of the group.

    Follows the order of the rank grid, innermost first: tensor, context, data, pipeline; on the expert grid expert
    tensor, expert, data.
    """
    match axis:
        case "tp":
            return layout.tensor, 1
        case "expt_tp":
            return layout.expert_tensor, 1
        case "ep":
            return layout.expert, layout.expert_tensor
        case "cp":
            return layout.context, layout.tensor
        case "pp":
            return layout.pipeline, layout.stage_ranks
        case "dp_cp":
            return layout.dense_sharers, layout.tensor
    assert axis == "expt_dp", f"{axis} is not an axis of a layout"
    return layout.expert_sharers, layout.expert * layout.width_ranks


def exchange_seconds(exchange: Exchange, layout: Layout, hardware: Hardware) -> float:
    """Seconds that one rank spends in all calls of an exchange."""
    ranks, stride = axis_place(exchange.axis, layout)
    handed = exchange.stage_bytes / layout.stage_ranks
    return collective_seconds(exchange.collective, handed, ranks, stride, hardware, calls=exchange.calls)


def collective_seconds(
    collective: str, handed: float, ranks: int, stride: int, hardware: Hardware, *, calls: int = 1
) -> float:
    """Seconds of `calls` calls over ranks that are `stride` apart, of which each hands in `handed` bytes in all.

    A send goes over the network: pipeline is the outermost axis, so its neighbours are taken to be on different nodes.
    """
    if collective == "send":
        return handed / (hardware.network_bytes_per_second * hardware.link_efficiency)
    if collective == "all_to_all":
        return all_to_all_seconds(handed, ranks, hardware, calls=calls, stride=stride)
    # Bytes that a ring moves: a gather's result, a scatter's input, and an all-reduce's twice.
    rings = 2 if collective == "all_reduce" else 1
    moved = handed * ranks if collective == "all_gather" else handed
    return rings * ring_seconds(moved, ranks, hardware, calls=calls, stride=stride)


def total_seconds(exchanges: Iterable[Exchange], layout: Layout, hardware: Hardware) -> float:
    """Seconds of exchanges that run one after the other, none of them hidden behind compute."""
    return sum(exchange_seconds(exchange, layout, hardware) for exchange in exchanges)


def pass_seconds(
    config: RunConfig, layout: Layout, hardware: Hardware, held: StageShare, *, overlap: float
) -> dict[str, float]:
    """Seconds of communication in one micro-batch's forward and backward pass on one rank, by axis.

    `overlap`: the part of a pipeline's sends that runs in parallel with compute, 0 to 1; every other collective is
    waited for. Left out is the expert axis, part of whose exchanges runs in parallel with what its blocks compute
    (`expert_time.py`).
    """
    seconds = dict.fromkeys(PARTS.values(), 0.0)
    for exchange in pass_exchanges(config, layout, held):
        if exchange.axis != "ep":
            seconds[PARTS[exchange.axis]] += exchange_seconds(exchange, layout, hardware)
    seconds["pipeline"] *= 1 - overlap
    return seconds
