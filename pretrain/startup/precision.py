"""What `train.precision: auto` is: chosen once at the start of a run, by its main rank, and kept by every resume.

A GPU multiplies in bf16. Of processors only those with AVX512-BF16 or AMX do; on others bf16 costs conversions and saves
nothing, so two products are timed, for a few milliseconds. Steps gain less than products do (docs/benchmarks/cpu_limit.md, the
section on bf16), so bf16 has to be faster by a margin.
"""

from __future__ import annotations

import timeit
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from amfm.kernels.common.gemm_precision import gemm_dtype
from amfm.pretrain.checkpoint.manifest_file import read_manifest
from amfm.pretrain.checkpoint.names import list_checkpoints
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.ranks.group import RankGroup

Precision = Literal["float32", "bf16"]
SIZE, REPEATS = 512, 9
MARGIN = 1.2


def settle_precision(
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
