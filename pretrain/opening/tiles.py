"""Lets all ranks of a run launch our kernels with the same tuned tiles.

A table of tiles is in each machine's cache, and machines are tuned one by one; tiles change the order of additions.
So every rank says what it has, and all take rank 0's, or, where GPUs or compilers differ, the kernels' own tiles.
"""

from __future__ import annotations

import logging

import torch

from amfm.kernels.runtime.tuning import Environment, Table, adopt_table, choose_table

_LOG = logging.getLogger(__name__)


def agree_on_tiles(own: Table) -> Table:
    """Take one table on all ranks and return it; empty for the kernels' own tiles. Every rank must call this.

    own: this rank's. Uses the default process group.
    """
    mine = (vars(own.environment), own.configs)
    everyone: list[tuple[dict[str, str], dict[str, dict[str, int]]]] = [mine] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, mine)
    tables = [Table(Environment(**environment), configs) for environment, configs in everyone]
    chosen = choose_table(tables)
    if torch.distributed.get_rank() == 0:
        _LOG.info(_describe(tables, chosen))
    table = chosen or Table(own.environment)
    adopt_table(table)
    return table


def _describe(tables: list[Table], chosen: Table | None) -> str:
    """What was agreed on, in words."""
    if chosen is None:
        cards = sorted({f"{table.environment.card}, Triton {table.environment.triton}" for table in tables})
        return f"kernels run with their own tiles on all ranks, whose GPUs or compilers differ: {'; '.join(cards)}"
    others = sum(table.configs != chosen.configs for table in tables)
    differing = f"; {others} ranks had another table" if others else ""
    if not chosen.configs:
        return f"kernels run with their own tiles: rank 0 has none tuned (amfm bench kernels --tune){differing}"
    return f"kernels run with {len(chosen.configs)} tiles tuned on {chosen.environment.card}{differing}"
