"""Who writes what: where each rank's shards lie, and which of several ranks with the same shard saves it."""

from __future__ import annotations

from dataclasses import dataclass

from model.parallel.shards import parameter_shards
from pretrain.checkpoint.commit import RankGroup
from pretrain.checkpoint.fragments import collect_buffers, list_parts, parameter_shape
from pretrain.checkpoint.placement import Placement, locate_rank, place_shard
from pretrain.engine.engine import ZeroEngine


@dataclass(frozen=True)
class WriterAssignment:
    """Of this rank: where its shards lie, its coordinates on the axes that cut them, and the names that it writes.

    Of a parameter that ZeRO spreads, a rank that writes it writes its own range.
    """

    placements: dict[str, Placement]
    coordinates: dict[str, dict[str, int]]
    parameters: frozenset[str]
    buffers: frozenset[str]


def place_parameters(engine: ZeroEngine) -> dict[str, Placement]:
    """Where this rank's shard of each of its parameters lies. No communication."""
    return {
        name: place_shard(parameter_shape(parameter), shard, engine.groups)
        for name, parameter, shard in parameter_shards(engine.module)
    }


def assign_writers(engine: ZeroEngine, ranks: RankGroup) -> WriterAssignment:
    """Agree on one writer for everything; all ranks must call it, once for an engine.

    Ranks with equal shards of a parameter (tensor ranks of a norm, first and last stage of a tied embedding) form
    groups over which ZeRO spreads the shard; the group with the lowest rank writes. A buffer is written by the lowest
    rank that has it.
    """
    placements = place_parameters(engine)
    groups = {span.name: min(part.data_ranks) for part in list_parts(engine.deepspeed) for span in part.spans}
    buffers = list(collect_buffers(engine.module))
    claims = ranks.gather_everywhere(
        ([(name, placements[name].intervals, group) for name, group in groups.items()], buffers)
    )
    writers: dict[tuple[str, object], int] = {}
    owners: dict[str, int] = {}
    for rank, (shards, names) in enumerate(claims):
        for name, intervals, group in shards:
            writers[name, intervals] = min(group, writers.get((name, intervals), group))
        for name in names:
            owners.setdefault(name, rank)
    return WriterAssignment(
        placements=placements,
        coordinates={name: locate_rank(shard, engine.groups) for name, _, shard in parameter_shards(engine.module)},
        parameters=frozenset(
            name for name, group in groups.items() if writers[name, placements[name].intervals] == group
        ),
        buffers=frozenset(name for name in buffers if owners[name] == ranks.rank),
    )
