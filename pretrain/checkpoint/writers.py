"""Which of several ranks with the same shard writes it: one writer for everything in a checkpoint.

The choice depends only on the layout, so it is agreed on once for an engine, and a background saver's saves need no message for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from amfm.pretrain.checkpoint.engine_layout import EngineLayout
from amfm.pretrain.ranks.group import RankGroup

Key = TypeVar("Key")


@dataclass(frozen=True)
class WriterAssignment:
    """Names of the parameters and buffers that this rank writes; of a parameter that ZeRO spreads, its own range."""

    parameters: frozenset[str]
    buffers: frozenset[str]


@dataclass(frozen=True)
class Claims:
    """Who may write what: the lowest rank of a group that has it, by name and intervals of each shard, and by buffer.

    What many ranks claim alike is one entry: joined, claims are as large as the checkpoint has shards, not as there are ranks.
    """

    writers: dict[tuple[str, object], int]
    owners: dict[str, int]

    def joined(self, other: Claims) -> Claims:
        """The claims of both."""
        return Claims(lowest(self.writers, other.writers), lowest(self.owners, other.owners))


def lowest(known: dict[Key, int], more: dict[Key, int]) -> dict[Key, int]:
    """Each key of both, with the lower number."""
    return known | {key: min(rank, known.get(key, rank)) for key, rank in more.items()}


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
    own = Claims(
        {(name, placements[name].intervals): group for name, group in groups.items()},
        dict.fromkeys(buffers, ranks.rank),
    )
    agreed = ranks.merge(own, Claims.joined)
    writers, owners = agreed.writers, agreed.owners
    return WriterAssignment(
        parameters=frozenset(
            name for name, group in groups.items() if writers[name, placements[name].intervals] == group
        ),
        buffers=frozenset(name for name in buffers if owners[name] == ranks.rank),
    )
