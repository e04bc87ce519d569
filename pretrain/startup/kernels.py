"""Lets all ranks of a run compute with the same kernels, and says which they are.

A table of tiles is in each machine's cache, and machines are tuned one by one; tiles change the order of additions.
So every rank says what it has, and all take rank 0's, or, where GPUs or compilers differ, the kernels' own tiles.

Native code is compiled on each machine, so that one of them may have no compiler, and a resume may find another machine than
the run began on: both change the last bits of numbers, and neither may happen unseen.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch

from amfm.kernels.runtime.native import refuse_native, withdraw_native
from amfm.kernels.runtime.tuning import Environment, Table, adopt_table, choose_table
from amfm.model.flops import count_parameters, flops_per_token
from amfm.model.low_precision import precision_table
from amfm.pretrain.checks.mixers import refuse_native_model
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.parallel import Parallel
from amfm.pretrain.stages import resolve_stages

_LOG = logging.getLogger(__name__)


def describe_kernels(config: RunConfig, backend: str) -> str:
    """The kernels of a run in words, and why `auto` is not native code where this machine is the reason."""
    wanted = config.kernels.backend == "auto" and backend == "torch"
    if wanted and not torch.cuda.is_available() and refuse_native_model(config.model) is None:
        return f"torch kernels ({refuse_native(torch.device('cpu'))})"
    return f"{backend} kernels"


def share_native(config: RunConfig, parallel: Parallel, own: str) -> None:
    """Let all ranks on CPUs compute without native code where `auto` is to choose and one of them cannot run it.

    own: this rank's choice. Every rank must call this.
    """
    if config.kernels.backend != "auto":
        return
    answers = parallel.gather_objects(own)
    if len(set(answers)) > 1:
        rank = answers.index("torch")
        withdraw_native(f"rank {rank} cannot run native code, and ranks compute alike; its log has the reason")


def kernel_changes(directory: Path, backend: str) -> list[str]:
    """What a resume of this run directory says of its kernels; nothing where they are those of the start before."""
    earlier = find_earlier_kernels(directory)
    if earlier in (None, backend):
        return []
    return [f"kernels were {earlier} and are {backend}: numbers differ from here on in their last bits"]


def find_earlier_kernels(directory: Path) -> str | None:
    """The backend of the kernels at the start before this one, by its environment.json; None if that does not say."""
    try:
        model = json.loads((directory / "environment.json").read_text(encoding="utf-8"))["model"]
        return str(model["kernels"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


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


def describe_kinds(config: RunConfig) -> dict[str, Any]:
    """Parameters and FLOPs by kind of block, for environment.json, so that a report shows them without torch."""
    lengths = {stage.train.sequence_length for stage in resolve_stages(config)}
    lengths |= {phase.sequence_length for phase in config.data.phases if phase.sequence_length is not None}
    counts = count_parameters(config.model)
    return {
        "parameters": counts.total_by_kind,
        "active_parameters": counts.active_by_kind,
        "flops_per_token": {str(length): flops_per_token(config.model, length) for length in sorted(lengths)},
    }


def describe_products(config: RunConfig) -> dict[str, Any]:
    """What matrices multiply in, for environment.json; nothing of a run in which all keep its precision."""
    if config.low_precision.recipe == "none":
        return {}
    rows = precision_table(config.model, config.low_precision, config.train.precision)
    return {"products": [row._asdict() for row in rows]}
