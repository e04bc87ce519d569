"""How a run computes, the same on all its ranks: what `train.precision: auto` is, and which kernels.

Precision is chosen once at the start of a run, by its main rank, and kept by every resume.

A GPU multiplies in bf16. Of processors only those with AVX512-BF16 or AMX do; on others bf16 costs conversions and saves
nothing, so two products are timed, for a few milliseconds. Steps gain less than products do (docs/benchmarks/cpu_limit.md, the
section on bf16), so bf16 has to be faster by a margin.

A table of tiles is in each machine's cache, and machines are tuned one by one; tiles change the order of additions.
So every rank says what it has, and all take rank 0's, or, where GPUs or compilers differ, the kernels' own tiles.

Native code is compiled on each machine, so that one of them may have no compiler, and a resume may find another machine than
the run began on: both change the last bits of numbers, and neither may happen unseen.
"""

from __future__ import annotations

import json
import logging
import timeit
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from amfm.kernels.common.gemm_precision import gemm_dtype
from amfm.kernels.runtime.native import refuse_native, withdraw_native
from amfm.kernels.runtime.tuning import Environment, Table, adopt_table, adopted_table, choose_table, products_by_torch
from amfm.model.flops import count_parameters, flops_per_token
from amfm.model.low_precision import precision_table
from amfm.pretrain.checkpoint.manifest_file import list_checkpoints, read_manifest
from amfm.pretrain.checks.blocks import refuse_native_model
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.parallel import Parallel
from amfm.pretrain.ranks.group import RankGroup
from amfm.pretrain.stages import resolve_stages

Precision = Literal["float32", "bf16"]
SIZE, REPEATS = 512, 9
MARGIN = 1.2


def resolve_precision(
    config: RunConfig, ranks: RankGroup | None = None
) -> tuple[RunConfig, tuple[tuple[str, str], ...]]:
    """The configuration with what `train.precision: auto` is here, and an event with the reason; nothing to choose: as it is, no event.

    A run that continues keeps the precision of its checkpoint. ranks: rank 0 chooses for all of them, and every one must call
    this; None: for this process.
    """
    if config.train.precision != "auto":
        return config, ()
    if ranks is None:
        precision, reason = choose_precision(config)
    else:
        precision, reason = ranks.broadcast(choose_precision(config) if ranks.rank == 0 else None)
    settled = config.model_copy(update={"train": config.train.model_copy(update={"precision": precision})})
    return settled, (("precision", f"train.precision auto is {precision}: {reason}"),)


def choose_precision(config: RunConfig) -> tuple[Precision, str]:
    """The precision of a start, and why: that of its newest checkpoint, a GPU's, or the faster on this processor."""
    for folder in list_checkpoints(Path(config.run.dir) / "checkpoints"):
        try:
            recorded = read_manifest(folder)["config"]["train"]["precision"]
        except (OSError, RuntimeError):
            continue  # loading passes over it too, and reports it
        return ("bf16" if recorded == "bf16" else "float32"), f"{folder.name} was saved by a run in it"
    if torch.cuda.is_available():
        return "bf16", "there is a GPU"
    return faster_on_processor()


def faster_on_processor() -> tuple[Precision, str]:
    """The faster precision of steps on this processor, and the measurement: the least time of one product in each, one thread."""
    threads, seconds = torch.get_num_threads(), []
    torch.set_num_threads(1)
    try:
        for dtype in (torch.float32, torch.bfloat16):
            matrix = torch.ones(SIZE, SIZE, dtype=dtype)
            matrix = matrix.to(gemm_dtype(matrix))  # as the kernels multiply it here
            seconds.append(min(timeit.repeat(partial(torch.mm, matrix, matrix), number=1, repeat=REPEATS)))
    finally:
        torch.set_num_threads(threads)
    ratio = seconds[0] / seconds[1]
    return ("bf16" if ratio > MARGIN else "float32"), f"products in bf16 run at {ratio:.1f} times the speed of float32"


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
    torchs = f"; PyTorch multiplies by {', '.join(products_by_torch(chosen))}" if products_by_torch(chosen) else ""
    return f"kernels run with {len(chosen.configs)} tiles tuned on {chosen.environment.card}{torchs}{differing}"


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
    """What matrices multiply in, for environment.json, and which products the tuned table gives to PyTorch.

    Nothing of a run in which all keep its precision and all are ours.
    """
    facts: dict[str, Any] = {}
    table = adopted_table()
    if table is not None and config.kernels.experts == "auto" and products_by_torch(table):
        facts["products_by_torch"] = products_by_torch(table)
    if config.low_precision.recipe != "none":
        rows = precision_table(config.model, config.low_precision, config.train.precision)
        facts["products"] = [row._asdict() for row in rows]
    return facts
