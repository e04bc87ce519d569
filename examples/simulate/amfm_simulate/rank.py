"""One rank of a simulated cluster, as a process: build the run, take two steps, copy the state as a checkpoint would.

How it works: a fake process group gives the process its rank among any number; FakeTensorMode gives tensors without
storage; the tracer above it sees every operation. Model, engine and step are the real code of `pretrain`, so that what
is traced is what a GPU would run. Two steps, because the optimizer allocates its moments in the first.

Called as `python -m amfm_simulate.rank`; SETTINGS, JSON on its first line of input, says which rank of which run. It
answers in lines of JSON: `progress`, then `result` or `refused`. A separate process, because it replaces parts of
torch.

Micro-batches for a simulated rank: real document boundaries, meaningless tokens.

Document layout decides shapes and how many sequences kernels see, so it is real; token ids are zeros, because nothing
on the host reads them.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import types
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.testing._internal.distributed.fake_pg import FakeStore

from amfm.data_pipeline.batch import Batch
from amfm.launch.cluster.child import open_answers
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.monitor.profile import StepProfiler
from amfm.pretrain.startup.data import example_batch
from amfm_simulate import patches
from amfm_simulate.gpu import SimulatedGpu
from amfm_simulate.tracer import DeviceWords, Tracer

DOCUMENTS = 3  # a row
MORE_DOCUMENTS = 5  # a row of the step before those that are measured


def simulated_batches(config: RunConfig, data_ranks: int, documents: int = DOCUMENTS) -> list[Batch]:
    """A data rank's micro-batches of one step, the same batch each time."""
    train = config.train
    count = train.global_batch_size // train.micro_batch_size // data_ranks
    is_padded = config.data.packing == "best_fit"
    return [example_batch(train.micro_batch_size, train.sequence_length, documents, is_padded=is_padded)] * count


STEPS = 2  # the first allocates moments, the second has them during its passes
PHASES = {"data": "forward", "count": "forward", "forward": "forward", "reduce": "reduction", "optimizer": "optimizer"}


def serve() -> None:
    """Read settings from standard input; answer progress, then the result or the rejection, as lines of JSON."""
    answer = open_answers()
    settings = json.loads(sys.stdin.readline())
    started = time.perf_counter()

    def report(what: str) -> None:
        answer({"progress": what, "seconds": time.perf_counter() - started})

    try:
        config = RunConfig.model_validate(settings["config"])
        answer({"result": trace_rank(config, settings, report)})
    except ValueError as error:
        answer({"refused": str(error)})


def trace_rank(config: RunConfig, settings: dict[str, Any], report: Callable[[str], None]) -> dict[str, Any]:
    """Trace rank `settings["rank"]` of `settings["ranks"]`: memory, FLOPs, traffic and host waits, as JSON values.

    `config` is one training stage taken as a run, with as many micro-batches as are to be traced. Raises ValueError for
    what the simulation cannot run.
    """
    rank, ranks, node = settings["rank"], settings["ranks"], settings["gpus_per_node"]
    # The first GPU of its node whatever the rank: what is made on "cuda" without a number is there.
    tracer = Tracer(torch.device("cuda", 0))
    gpu = SimulatedGpu(0, node, tracer.note_wait, is_blackwell=settings["is_blackwell"])
    patches.install(gpu, tracer.note_launch, tracer.read_list)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK="0", LOCAL_WORLD_SIZE=str(min(node, ranks)))
    torch.set_num_threads(1)
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    from amfm.pretrain.parallel import initialize_parallel, set_determinism

    parallel = initialize_parallel(config.parallel, timeout_seconds=600, num_threads=1)
    patches.install_deepspeed(gpu.index)
    set_determinism(config.train.seed, config.train.deterministic)
    tracer.watch(parallel.groups)
    if settings["events"]:
        tracer.record_events()
        patches.install_works(tracer.note_work)
    planned = planned_traffic(config, ranks, rank, parallel.groups.cp.rank())
    report("groups")
    with ExitStack() as modes:
        for mode in (FakeTensorMode(allow_non_fake_inputs=True), tracer, DeviceWords(tracer)):
            modes.enter_context(mode)
        return run_steps(config, parallel, tracer, report) | {"planned_traffic": planned}


def planned_traffic(config: RunConfig, ranks: int, rank: int, context_rank: int) -> list[tuple[str, str, float]] | str:
    """Bytes by (axis, collective) from the formulas, a mean over the rank's pipeline stage; or why there are none.

    Windows of convolutions go to neighbours, of which the context ranks at both ends have one: theirs is not a mean.
    Must run after process groups exist: without them Megatron-core's layers take every group for one rank.
    """
    from amfm.launch.plan.layout import Layout
    from amfm_simulate.step_traffic import check_countable, stage_bytes

    layout = Layout.of(config, ranks)
    try:
        check_countable(config, layout)
    except ValueError as reason:
        return str(reason)
    expected = stage_bytes(config, layout, rank // layout.stage_ranks)
    context = layout.context
    neighbours = 1 if context_rank in (0, context - 1) else 2
    shares = {("cp", "all_to_all"): neighbours * context / max(1, 2 * (context - 1))}
    return [
        (axis, collective, size / layout.stage_ranks * shares.get((axis, collective), 1.0))
        for (axis, collective, _), size in expected.items()
        if size
    ]


def run_steps(config: RunConfig, parallel: Any, tracer: Tracer, report: Callable[[str], None]) -> dict[str, Any]:
    """Build the run, take two steps and stage a checkpoint under the tracer.

    All numbers are of the second step, but for the peaks of building and of checkpoint staging.
    """
    from amfm.pretrain.step import train_step

    run = build_run(config, parallel, tracer, report)
    held = tracer.memory.held
    if config.train.cuda_graphs == "blocks":
        # Blocks are passed as before, which is what the check of captures is about, but with what their graphs would read.
        run.engine.buckets.keep_sums()
        read_fixed_layout(run.model)
    compile_first(run, tracer)
    build_peaks = dict(tracer.memory.peaks)
    parameters = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in run.engine.module.parameters())
    for number in range(STEPS):
        tracer.enter("forward")
        tracer.memory.forget_peaks()
        tracer.begin_step()
        tracer.capture.begin_step()
        tracer.memory.record_from(tracer.operations)
        train_step(run)
        report(f"step {number + 1} of {STEPS}")
    step_peaks, by_line = dict(tracer.memory.peaks), dict(tracer.memory.by_line)
    tally, traffic, curve = tracer.tally, tracer.traffic, list(tracer.memory.curve)
    events = [] if tracer.log is None else tracer.log.events
    blocks = dict(tracer.blocks.passes)
    tracer.begin_step()
    tracer.capture.begin_step()
    tracer.enter("checkpoint staging")
    stage_checkpoint(run)
    peaks = {**build_peaks, **step_peaks, "checkpoint staging": tracer.memory.peaks["checkpoint staging"]}
    return {
        "parameters": parameters,
        "held_bytes": held,
        "phases": peaks,
        "peak_bytes": max(step_peaks.values()),
        "peak_phase": max(step_peaks, key=lambda phase: step_peaks[phase]),
        "by_line": by_line,
        "curve": curve,
        "events": events,
        "micro_batches": len(run.loader.take(0, 0)),
        "passes": blocks,
        "flops": dict(tally.flops),
        "launches": {"triton": dict(tally.triton_launches), "other": dict(tally.other_launches)},
        "launches_by_pass": {name: dict(launches) for name, launches in tally.launches_by_pass.items()},
        "host_waits": dict(tally.host_waits.most_common()),
        "traffic": [
            {"when": when, "axis": row.axis, "collective": row.collective, "dtype": row.dtype, "calls": row.calls,
             "bytes": row.handed_bytes}
            for when, counter in traffic.items()
            for row in counter.traffic()
        ],
        "mismatches": tracer.bodies.mismatches,
        "compiled": {"first": tracer.compiled.num_first(), "late": tracer.compiled.late},
        "compared": dict(tracer.bodies.compared),
        "capture": tracer.capture.found(),
        "operations": tracer.operations,
        "patches": [vars(patch) for patch in patches.INSTALLED],
    }  # fmt: skip


def build_run(config: RunConfig, parallel: Any, tracer: Tracer, report: Callable[[str], None]) -> Any:
    """A `Run` as `start_run` builds it, with simulated batches and without files."""
    from amfm.pretrain.engine.engine import build_engine
    from amfm.pretrain.hooks.quantization import build_kept_weights
    from amfm.pretrain.monitor.stragglers import PhaseClock
    from amfm.pretrain.run import Run
    from amfm.pretrain.stages import Built, resolve_stages
    from amfm.pretrain.startup.model import build_model, build_pipeline

    model = build_model(config, parallel)
    for _, block in model.all_blocks():
        tracer.blocks.wrap(block, "forward", block.letter)
        tracer.blocks.wrap(block, "_mix", block.letter, begins=False)  # of a recomputed one
        tracer.blocks.wrap(block, "steps", block.letter)  # a pass, whose parts follow
        tracer.blocks.wrap(block, "advance", block.letter, begins=False)
    tracer.blocks.wrap(model, "embed", "embedding")
    tracer.blocks.wrap(model, "finish", "head")
    report("model")
    tracer.enter("engine")
    engine = build_engine(
        model,
        optimizer=config.optimizer,
        precision=config.train.precision,
        zero_stage=config.parallel.zero_stage,
        parallel=parallel,
        sums_in_products=config.train.sums_in_products(),
        offload_optimizer=config.parallel.offload_optimizer,
    )
    del model
    gc.collect()
    report("engine")
    stages = resolve_stages(config)
    with unset_fake_temporarily():
        # Other documents in the first step, for what a graph could not replay (capture.py).
        steps = [
            simulated_batches(config, parallel.data_world_size, documents) for documents in (MORE_DOCUMENTS, DOCUMENTS)
        ]
    # Loader, heartbeat and signals of a run read files and clocks; the step needs no more of them than these stand-ins
    # have.
    loader: Any = types.SimpleNamespace(
        sequence_length=config.train.sequence_length,
        take=lambda total, micro: list(steps[min(tracer.capture.step, STEPS) - 1]),
    )
    heartbeat: Any = types.SimpleNamespace(at=lambda step, phase: tracer.enter(PHASES[phase]))
    nothing: Any = None
    saver: Any = types.SimpleNamespace(is_writing=lambda: False)
    signals: Any = types.SimpleNamespace(received=0)
    run = Run(
        config=config,
        parallel=parallel,
        engine=engine,
        saver=saver,
        loader=loader,
        peak=nothing,
        stages=stages,
        stage=stages[0],
        built=Built(config.parallel, guided=config.model.self_guided_training is not None),
        signals=signals,
        phases=PhaseClock(heartbeat, torch.device("cpu")),  # whose clock is the host's
        profiler=StepProfiler(None, Path(config.run.dir), parallel.rank, engine.module, heartbeat),
        pipeline=build_pipeline(config, parallel, engine),
    )
    run.hooks = tuple(build_kept_weights(run))  # of all hooks the one that holds memory during passes
    return run


def read_fixed_layout(model: Any) -> None:
    """Let blocks that graphs can hold read documents where graphs do, in tensors that stay (model/packing.py)."""
    from amfm.model.packing import FixedLayout

    layouts: list[FixedLayout] = []

    def pass_fixed(forward: Callable[..., Any], residual_BTD: Any, delta_BTD: Any, meta: Any, state: Any = None) -> Any:
        if not layouts:
            layouts.append(FixedLayout(meta))
        layouts[0].take(meta)
        return forward(residual_BTD, delta_BTD, layouts[0].meta, state)

    for block in model.blocks:
        if block.mixer.is_graphable:
            block.forward = partial(pass_fixed, block.forward)


def compile_first(run: Any, tracer: Tracer) -> None:
    """Take the passes that a start takes before the first step; what a step then launches again is a late compile.

    Groups of a simulated cluster answer on their own already.
    """
    from amfm.pretrain.startup.first_passes import pass_once

    tracer.enter("first passes")
    shape = (run.config.train.micro_batch_size, run.config.train.sequence_length)
    pass_once(run.config, run.parallel, run.model, shape, lambda what: None)
    gc.collect()
    tracer.compiled.close()


def stage_checkpoint(run: Any) -> None:
    """Copy to the host the fragments that this rank would write to a checkpoint."""
    from amfm.pretrain.checkpoint.fragments import collect_fragments
    from amfm.pretrain.engine.parts import list_parts

    tensors: dict[str, Any] = {}
    for fragment in collect_fragments(run.engine.deepspeed, list_parts(run.engine.deepspeed)):
        share = fragment.share(run.parallel.rank)
        if share is not None:
            tensors |= {f"{kind}/{share.name}": tensor for kind, tensor in share.tensors.items()}
    for tensor in tensors.values():
        tensor.detach().to("cpu")


if __name__ == "__main__":
    serve()
