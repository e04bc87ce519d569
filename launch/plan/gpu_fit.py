"""Rejects a run that cannot fit on its GPUs, before its first stage starts.

A run that is out of memory in its tenth stage has cost nine. So every stage to come is compared with the memory of the
GPU that is here, by the plan's parts without its margin: what is rejected cannot fit, and what is near may. The nearest
layout that would fit is named. On CPU ranks nothing is checked: their memory is one.
"""

from __future__ import annotations

import torch

from amfm.launch.plan.estimate import Assumptions, explain_misfit, memory_of
from amfm.launch.plan.hardware import GIB, HARDWARE, Hardware
from amfm.launch.plan.layout import Layout
from amfm.launch.plan.ranking import rank_layouts
from amfm.launch.plan.search import all_layouts, neighbour_layouts
from amfm.pretrain.checks.stages import ranks_of_stage
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.stages import resolve_stages, stage_of

ALONE = Assumptions(margin=0.0)


def local_gpu() -> Hardware | None:
    """The accelerator of this process: the row of the table that its name has, else H100's, with its own memory.

    None on a machine without one.
    """
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    known = [row for name, row in HARDWARE.items() if name.upper() in properties.name.upper()]
    own = {
        "name": properties.name,
        "memory_gib": properties.total_memory / GIB,
        "gpus_per_node": torch.cuda.device_count(),
    }
    return (known or [HARDWARE["h100"]])[0].model_copy(update=own)


def check_fits(config: RunConfig, ranks: int, gpu: Hardware, *, steps_done: int = 0) -> None:
    """Reject a run of which a stage to come needs more memory than the GPU has; `config` has passed `check_run`.

    A stage with its optimizer in the host's memory is not modelled and passes. Raises ValueError with stage, parts and the
    nearest layout that fits.
    """
    config = gpu.with_precision(config)
    stages = resolve_stages(config)
    for stage in stages[stage_of(stages, steps_done).index :]:
        if stage.config.parallel.offload_optimizer:
            continue
        run = stage.config
        number = ranks_of_stage(config, stage, range(ranks, 0, -1))
        layout = Layout.of(run, number)
        reason = explain_misfit(memory_of(run, layout, ALONE), gpu)
        if not reason:
            continue
        found = rank_layouts(run, [run], neighbour_layouts(run, number), gpu, ALONE, recomputes=True)
        if not found.fitting:
            layouts = all_layouts(run, number, gpu.gpus_per_node)
            found = rank_layouts(run, [run], layouts, gpu, ALONE, recomputes=True)
        remedy = "no layout of this many ranks fits; use more ranks, larger GPUs or a smaller model"
        if found.fitting:
            remedy = f"fits by the plan: {found.fitting[0].layout.describe()}"
        where = f"stage {stage.name}: " if config.stages else ""
        raise ValueError(
            f"{where}{layout.describe()} on {number} x {gpu.name} {reason}; {remedy} (--force trains anyway)"
        )
