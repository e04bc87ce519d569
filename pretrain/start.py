"""Build a run: ranks, data, model, engine and log, resumed from its newest checkpoint.

The order matters. Settings are checked before anything is opened, data before the model is built (a missing store
should not cost minutes of initialisation), the checkpoint is loaded before the log is opened, and the run directory is
written to (startup/log.py) only when everything fits: a rejected start leaves no trace in the run it was rejected for.

Ranks compare what they were started with twice, before the model is built: configuration, versions and our own code first,
then the identities of data and tokenizer. A rank that differed would hang the others in a collective, or train another model
without a word. Every checkpoint carries this record, and a start that continues from one says what changed.

Within a run the ranks are rebuilt when the next stage has its own layout, or when its guides are no longer needed.
"""

from __future__ import annotations

import hashlib
import json
import socket
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.distributed

from amfm.data_pipeline.memory import keep_freed_memory
from amfm.data_pipeline.terminal import Report, silent
from amfm.pretrain.checkpoint.background import BackgroundSaver
from amfm.pretrain.checkpoint.commit import make_checkpoints_folder
from amfm.pretrain.checkpoint.manifest_file import continued_step
from amfm.pretrain.checkpoint.remote import RemoteCheckpoints
from amfm.pretrain.checkpoint.replicas.memory import NodeMemory
from amfm.pretrain.checks.check_run import check_run
from amfm.pretrain.checks.stages import describe_parallel
from amfm.pretrain.config.fields import flatten_settings
from amfm.pretrain.config.file import without_secrets
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.engine.engine import build_engine
from amfm.pretrain.hook import HookMaker
from amfm.pretrain.hooks.build import build_hooks
from amfm.pretrain.monitor.beats import NodeBoard, clear_beats
from amfm.pretrain.monitor.environment import find_peak
from amfm.pretrain.monitor.heartbeat import Heartbeat
from amfm.pretrain.monitor.held import Starting
from amfm.pretrain.monitor.metrics import check_plot_services
from amfm.pretrain.monitor.ownership import Ownership, lock_directory
from amfm.pretrain.monitor.profile import StepProfiler
from amfm.pretrain.monitor.signals import SignalWatch
from amfm.pretrain.monitor.stragglers import PhaseClock
from amfm.pretrain.packages import collect_versions
from amfm.pretrain.parallel import (
    initialize_parallel,
    launcher_goes_on,
    record_collectives,
    set_determinism,
    start_process_group,
)
from amfm.pretrain.ranks.group import RankGroup
from amfm.pretrain.run import Run, identities_of, set_up_model
from amfm.pretrain.saving import resume
from amfm.pretrain.stages import Built, RunStage, data_of_stages, last_stage, resolve_stages, stage_of
from amfm.pretrain.startup.data import check_tokenizer, check_vocabulary, open_loader
from amfm.pretrain.startup.first_passes import compile_first
from amfm.pretrain.startup.log import gather_hosts, open_log
from amfm.pretrain.startup.model import build_model, build_pipeline, choose_flash, share_tiles

SHOWN_RANKS = 4


def describe_start(config: RunConfig) -> dict[str, str]:
    """Build the part of the record known before any data is open: versions and code, then settings by dotted name."""
    settings = flatten_settings(config.model_dump(mode="json"))
    return collect_versions() | {name: json.dumps(value, sort_keys=True) for name, value in settings.items()}


def require_same_on_all_ranks(record: Mapping[str, str]) -> None:
    """Compare this rank's record with those of all others. Every rank must call this, in the default process group.

    Digests are compared first, so that many ranks exchange little. Raises ValueError on every rank, naming the ranks
    and hosts that differ from most and the first entry in which they do.
    """
    world_size = torch.distributed.get_world_size()
    if world_size == 1:
        return
    ranks = RankGroup(torch.distributed.get_rank(), world_size)
    digest = hashlib.sha256(json.dumps(list(record.items())).encode()).hexdigest()
    if len(ranks.merge({digest}, set.union)) == 1:
        return
    # A record of each kind, and who has which.
    kinds = ranks.merge({digest: dict(record)}, lambda known, more: more | known)
    everyone = ranks.all_gather((socket.gethostname(), digest))
    raise ValueError(describe_difference([(host, kinds[digest]) for host, digest in everyone]))


def describe_difference(records: Sequence[tuple[str, Mapping[str, str]]]) -> str:
    """Name the ranks that differ from most, and the first entry that is not the same everywhere.

    records: (host, record) by rank. The most frequent value counts as right.
    """
    names = dict.fromkeys(name for _, record in records for name in record)
    absent = "(absent)"
    for name in names:
        values = [record.get(name, absent) for _, record in records]
        if len(set(values)) == 1:
            continue
        usual, _ = Counter(values).most_common(1)[0]  # of equally many the one of the lowest rank
        odd = [rank for rank, value in enumerate(values) if value != usual]
        shown = ", ".join(f"rank {rank} on {records[rank][0]}" for rank in odd[:SHOWN_RANKS])
        more = f" and {len(odd) - SHOWN_RANKS} more" if len(odd) > SHOWN_RANKS else ""
        return (
            f"ranks were not started alike: {shown}{more} has {name}={values[odd[0]]}, the others {usual}; start all "
            "ranks with the same configuration, data and code"
        )
    raise AssertionError("records of equal entries have equal digests")


def start_run(config: RunConfig, signals: SignalWatch, report: Report = silent, hooks: Sequence[HookMaker] = ()) -> Run:
    """Join the ranks, check the settings, build data, model and engine, resume, and open the log.

    Every rank must call this. Raises ValueError for settings, data or a checkpoint that do not fit together,
    RuntimeError or OSError for the machine's state; the run directory changes only after everything fits. `report`
    hears what a long start is at. `hooks`: of a program, next to those of the configuration.
    """
    config = without_secrets(config)
    report("waiting for all ranks to join")
    record_collectives(Path(config.run.dir) / "flight")
    rank, world_size, _, _ = start_process_group(config.train.timeout_seconds)
    require_same_on_all_ranks(describe_start(config))
    from amfm.pretrain.startup.arithmetic import resolve_precision

    config, notes = resolve_precision(config, RankGroup(rank, world_size))
    newest = RankGroup(rank, world_size).broadcast(continued_step(config) if rank == 0 else None)
    steps_done = max(0, newest)
    check_run(config, world_size, steps_done=steps_done, goes_on=launcher_goes_on())
    check_plot_services(config)
    # Before data and model are built: a second start in the same directory is rejected immediately.
    lock = lock_directory(Path(config.run.dir)) if rank == 0 else None
    starting = Starting(Path(config.run.dir)) if rank == 0 else None
    if starting is not None:
        report = starting.hearing(report)
        make_checkpoints_folder(Path(config.run.dir) / "checkpoints")
    if torch.cuda.is_available():
        (Path(config.run.dir) / "flight").mkdir(parents=True, exist_ok=True)
    stages = resolve_stages(config)
    run = build_run(config, signals, stages, steps_done, report, draws=newest < 0, hooks=hooks)
    loaded = resume(run, report)
    if loaded is None and newest >= 0:
        raise RuntimeError(
            f"the checkpoints in {config.run.dir}/checkpoints went away while the run started; put them back, "
            "or start again"
        )
    if needed_now(run) != run.built:
        # Newer checkpoints were passed over, and the one that verified is of a step that is built by something else.
        check_run(config, world_size, steps_done=run.progress.step, goes_on=launcher_goes_on())
        close_run(run)
        run = build_run(config, signals, stages, run.progress.step, report, draws=False, hooks=hooks)
        loaded = resume(run, report)
    run.files.lock = lock
    run.remarks = (*notes, *run.remarks)
    # The checkpoint may have been saved in another stage than the model was built for.
    run.stage = last_stage(stages, run.progress.step)
    set_up_model(run.model, run.stage)
    hosts = gather_hosts(run.saver.ranks)
    if starting is not None:
        run.files.owner = owner = Ownership.take(run.directory)
        run.heartbeat.fence = run.saver.fence = owner.check
        open_log(run, loaded, {"hosts": hosts, **starting.facts()})
        starting.finish()
        clear_beats(run.directory)
    token = run.saver.ranks.broadcast(run.files.owner and run.files.owner.token)
    if run.saver.replicas is not None:
        run.saver.replicas.token = token
    run.heartbeat.board = NodeBoard.of_start(run.directory, token, rank, world_size)
    run.heartbeat.start()
    stage = stage_of(stages, run.progress.step)
    built, shape = run.built.config_of(config, stage), (stage.train.micro_batch_size, stage.train.sequence_length)
    try:
        compile_first(built, run.parallel, run.model, shape, partial(note_compiling, run, report))
    except ValueError as error:
        run.record_event("failed", error=str(error))
        run.heartbeat.close()  # or this rank would be taken for a lost one
        raise
    return run


def note_compiling(run: Run, report: Report, what: str) -> None:
    """Tell report and heartbeat what is being compiled; the heartbeat's time limit starts again with each part."""
    report(what)
    run.heartbeat.at(run.progress.step, "compile")


def build_run(
    config: RunConfig,
    signals: SignalWatch,
    stages: tuple[RunStage, ...],
    steps_done: int,
    report: Report,
    *,
    draws: bool,
    hooks: Sequence[HookMaker],
) -> Run:
    """Build ranks, data, model and engine as the step after `steps_done` needs them. Every rank must call this.

    draws: the model gets first values; else a checkpoint must be loaded into it. hooks: of a program, built from the run.
    """
    stage, train, needed = stage_of(stages, steps_done), config.train, Built.for_step_after(steps_done, config, stages)
    built = needed.config_of(config, stage)
    parallel = initialize_parallel(built.parallel, timeout_seconds=train.timeout_seconds, num_threads=train.num_threads)
    remarks: list[tuple[str, str]] = []
    if parallel.world_size > 1:
        from amfm.pretrain.startup.communicators import make_communicators

        report("making the communicators of all axes")
        slow = make_communicators(parallel, train.timeout_seconds)
        remarks += [("slow_communicator", f"warning: {text}") for text in slow]
    keeps_freed_memory = parallel.device.type == "cpu" and keep_freed_memory()
    deterministic = set_determinism(config.train.seed, config.train.deterministic)
    report("opening the data")
    loader = open_loader(config, data_of_stages(config, stages), parallel, "train", stages[0])
    check_vocabulary(config, loader)
    check_tokenizer(config)
    tasks = None
    if config.evaluate.tasks:
        from amfm.pretrain.hooks.tasks import open_tasks

        tasks = open_tasks(built, parallel)
    require_same_on_all_ranks(identities_of(loader))
    report("building the model and its optimizer")
    if not deterministic:
        share_tiles(config, parallel)
        choose_flash(config.kernels.attention, parallel)
    engine = build_engine(
        build_model(built, parallel, lambda text: remarks.append(("initial_weights", text)), draws=draws),
        optimizer=config.optimizer,
        precision=config.train.precision,
        zero_stage=built.parallel.zero_stage,
        parallel=parallel,
        sums_in_products=config.train.sums_in_products(),
        offload_optimizer=built.parallel.offload_optimizer,
    )
    heartbeat = Heartbeat(Path(config.run.dir), parallel.rank, config.launch.heartbeat_seconds)
    saver = BackgroundSaver(engine, config.train.timeout_seconds)
    if train.checkpoint_store is not None:
        saver.remote = RemoteCheckpoints(train.checkpoint_store)
    if train.replica_every_steps is not None:
        saver.replicas = NodeMemory.of(train.replica_folder, Path(config.run.dir), saver.ranks)
    run = Run(
        config=config,
        parallel=parallel,
        engine=engine,
        saver=saver,
        loader=loader,
        peak=find_peak(parallel, config.train.precision),
        stages=stages,
        stage=stage,
        built=needed,
        signals=signals,
        phases=PhaseClock(heartbeat, parallel.device),
        profiler=StepProfiler(train.profile, Path(config.run.dir), parallel.rank, engine.module, heartbeat),
        pipeline=build_pipeline(built, parallel, engine),
        keeps_freed_memory=keeps_freed_memory,
        remarks=tuple(remarks),
    )
    run.hooks = build_hooks(run, tasks, hooks)
    return run


def close_run(run: Run) -> None:
    """Close heartbeat, data, hooks, logs and display, waiting for a checkpoint under way. Every rank must call this."""
    run.heartbeat.close()
    run.engine.wait_for_weights()
    run.saver.close()
    run.loader.close()
    for hook in run.hooks:
        hook.close()
    run.files.close()


def needed_now(run: Run) -> Built:
    """What the next step is to be built by."""
    return Built.for_step_after(run.progress.step, run.config, run.stages)


def announce_fresh_start(run: Run) -> None:
    """Record and say that the ranks restart for the next step, and why; everything is saved."""
    saved, needed = f"saved at step {run.progress.step}", needed_now(run)
    if needed.parallel == run.built.parallel:
        run.tell("guide_removed", f"{saved}: the factored matrices continue without guides; ranks restart")
        return
    stage = stage_of(run.stages, run.progress.step)
    run.tell(
        "next_layout",
        f"{saved}: stage {stage.name} has its own layout, {describe_parallel(needed.parallel)}; its ranks restart",
        stage=stage.name,
        parallel=needed.parallel.model_dump(mode="json"),
    )
