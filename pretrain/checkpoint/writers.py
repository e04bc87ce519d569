"""Which of several ranks with the same shard writes it: one writer for everything in a checkpoint.

The choice depends on the layout alone, so it is agreed on once for an engine, and a background saver's saves need no message for it.
"""

from __future__ import annotations

from dataclasses import dataclass

from amfm.pretrain.checkpoint.engine_layout import EngineLayout
from amfm.pretrain.rank_group import RankGroup


@dataclass(frozen=True)
class WriterAssignment:
    """Names of the parameters and buffers that this rank writes; of a parameter that ZeRO spreads, its own range."""

    parameters: frozenset[str]
    buffers: frozenset[str]


def assign_writers(layout: EngineLayout, ranks: RankGroup) -> WriterAssignment:
    """Agree on one writer for everything; all ranks must call it, once for an engine.

    Ranks with equal shards of a parameter (tensor ranks of a norm, first and last stage of a tied embedding) form
    groups over which ZeRO spreads the shard; the group with the lowest rank writes. A buffer is written by the lowest
    rank that has it.
    """
    placements = layout.placements
    groups = {span.name: min(part.data_ranks) for part in layout.parts for span in part.spans}
    groups |= {name: min(ranks_of_shard) for name, ranks_of_shard in layout.frozen.items()}
    buffers = layout.buffer_names
    claims = ranks.all_gather(([(name, placements[name].intervals, group) for name, group in groups.items()], buffers))
    writers: dict[tuple[str, object], int] = {}
    owners: dict[str, int] = {}
    for rank, (shards, names) in enumerate(claims):
        for name, intervals, group in shards:
            writers[name, intervals] = min(group, writers.get((name, intervals), group))
        for name in names:
            owners.setdefault(name, rank)
    return WriterAssignment(
        parameters=frozenset(
            name for name, group in groups.items() if writers[name, placements[name].intervals] == group
        ),
        buffers=frozenset(name for name in buffers if owners[name] == ranks.rank),
    )
