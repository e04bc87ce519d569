"""Build a run: ranks, data, model, engine and log, resumed from its newest checkpoint.

The order matters. Settings are checked before anything is opened, data before the model is built (a missing store should
not cost minutes of initialisation), the checkpoint is loaded before the log is opened, and the run directory is written to
only when everything fits: a refused start leaves no trace in the run that it was refused for.

Ranks compare what they were started with twice, before the model is built: configuration and versions first, then the
identities of data and tokenizer. A rank that differed would hang the others in a collective, or train another model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from amfm.data_pipeline.durable.files import write_file_atomically
from amfm.data_pipeline.durable.lines import read_lines
from amfm.data_pipeline.memory import keep_freed_memory
from amfm.data_pipeline.progress import Report, silent
from amfm.data_pipeline.store.store import TokenStore
from amfm.data_pipeline.synthetic.rows import NO_TOKENIZER
from amfm.kernels.runtime.backend import resolve_for_run
from amfm.model.flops import count_parameters, flops_per_token
from amfm.model.hybrid import HybridModel
from amfm.model.pipeline_split import cut_pieces, pieces_of_rank
from amfm.pretrain.checkpoint.background import BackgroundSaver
from amfm.pretrain.checkpoint.commit import make_checkpoints_folder
from amfm.pretrain.checkpoint.load import LoadedCheckpoint
from amfm.pretrain.checkpoint.names import list_checkpoints, newest_saved_step
from amfm.pretrain.checkpoint.remote import RemoteCheckpoints
from amfm.pretrain.checkpoint.replicas.memory import NodeMemory
from amfm.pretrain.checks.check_run import check_run
from amfm.pretrain.checks.mixers import check_kernels
from amfm.pretrain.config.file import resolved_yaml, without_secrets
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.convert.prepare import prepare_stage
from amfm.pretrain.engine.engine import ZeroEngine, build_engine
from amfm.pretrain.hooks.build import build_hooks
from amfm.pretrain.hooks.tasks import open_tasks
from amfm.pretrain.identity import describe_start, require_same_on_all_ranks
from amfm.pretrain.inference.weights import load_initial_weights
from amfm.pretrain.launcher_protocol import RESTART_CAUSE, TORCHRUN_RESTARTS
from amfm.pretrain.monitor.display import Display
from amfm.pretrain.monitor.environment import find_peak, record_environment
from amfm.pretrain.monitor.experts import describe_unbalanced
from amfm.pretrain.monitor.heartbeat import Heartbeat, clear_beats
from amfm.pretrain.monitor.metrics import RunLog, check_plot_services
from amfm.pretrain.monitor.node_board import NodeBoard
from amfm.pretrain.monitor.ownership import Ownership, lock_directory
from amfm.pretrain.monitor.panel import plural
from amfm.pretrain.monitor.profile import StepProfiler
from amfm.pretrain.monitor.signals import SignalWatch
from amfm.pretrain.monitor.stragglers import StepTimes, clock_of
from amfm.pretrain.open_data import check_tokenizer, check_vocabulary, open_loader, open_validations
from amfm.pretrain.parallel import (
    Parallel,
    describe_environment,
    initialize_parallel,
    launcher_goes_on,
    record_collectives,
    set_determinism,
    start_process_group,
)
from amfm.pretrain.pipeline import Pipeline
from amfm.pretrain.rank_group import RankGroup
from amfm.pretrain.recompute import recomputed_letters
from amfm.pretrain.run import Run, identities_of
from amfm.pretrain.saving import resume
from amfm.pretrain.stages import (
    RunStage,
    data_of_stages,
    in_layout,
    is_guided,
    last_stage,
    resolve_stages,
    stage_of,
    without_guide,
)


def start_run(config: RunConfig, signals: SignalWatch, report: Report = silent) -> Run:
    """Join the ranks, check the settings, build data, model and engine, resume, and open the log.

    Every rank must call this. Raises ValueError for settings, data or a checkpoint that do not fit together,
    RuntimeError or OSError for the machine's state; the run directory changes only after everything fits. `report` hears
    what a long start is at.
    """
    config = without_secrets(config)
    report("waiting for all ranks to join")
    record_collectives(Path(config.run.dir) / "flight")
    rank, world_size, _, _ = start_process_group(config.train.timeout_seconds)
    require_same_on_all_ranks(describe_start(config))
    newest = RankGroup(rank, world_size).broadcast(newest_saved_step(config.run.dir) if rank == 0 else None)
    steps_done = max(0, newest)
    check_run(config, world_size, steps_done=steps_done, goes_on=launcher_goes_on())
    check_plot_services(config)
    # Before data and model are built: a second start in the same directory is refused at once.
    lock = lock_directory(Path(config.run.dir)) if rank == 0 else None
    if rank == 0:
        make_checkpoints_folder(Path(config.run.dir) / "checkpoints")
    if torch.cuda.is_available():
        (Path(config.run.dir) / "flight").mkdir(parents=True, exist_ok=True)
    stages = resolve_stages(config)
    run = build_run(config, signals, stages, steps_done, report, draws=newest < 0)
    loaded = resume(run, report)
    if loaded is None and newest >= 0:
        raise RuntimeError(
            f"the checkpoints in {config.run.dir}/checkpoints went away while the run started; put them back, or start again"
        )
    is_guided_now = is_guided(config, run.progress.step)
    if stage_of(stages, run.progress.step).parallel != run.layout or is_guided_now != is_guided(config, steps_done):
        # Newer checkpoints were passed over, and the one that verified belongs to a stage with another layout, or with
        # guides.
        check_run(config, world_size, steps_done=run.progress.step, goes_on=launcher_goes_on())
        close_run(run)
        run = build_run(config, signals, stages, run.progress.step, report, draws=False)
        loaded = resume(run, report)
    run.lock = lock
    # The checkpoint may have been saved in another stage than the model was built for.
    run.stage = last_stage(stages, run.progress.step)
    run.model.set_rope(run.stage.rope)
    if run.parallel.is_main:
        run.owner = Ownership.take(run.directory)
        run.heartbeat.fence = run.saver.fence = run.owner.check
        open_log(run, loaded)
        clear_beats(run.directory)
    token = run.saver.ranks.broadcast(run.owner and run.owner.token)
    if run.saver.replicas is not None:
        run.saver.replicas.token = token
    run.heartbeat.board = NodeBoard.of_start(run.directory, token, rank, world_size)
    run.heartbeat.start()
    run.hooks = build_hooks(run)
    return run


def build_run(
    config: RunConfig,
    signals: SignalWatch,
    stages: tuple[RunStage, ...],
    steps_done: int,
    report: Report,
    *,
    draws: bool,
) -> Run:
    """Build ranks, data, model and engine as the step after `steps_done` needs them, telling `report`. Every rank must call this.

    draws: the model gets first values; else a checkpoint must be loaded into it.
    """
    stage, train = stage_of(stages, steps_done), config.train
    built = in_layout(config if is_guided(config, steps_done) else without_guide(config), stage)
    parallel = initialize_parallel(built.parallel, timeout_seconds=train.timeout_seconds, num_threads=train.num_threads)
    keeps_freed_memory = parallel.device.type == "cpu" and keep_freed_memory()
    deterministic = set_determinism(config.train.seed, config.train.deterministic)
    data = data_of_stages(config, stages)
    report("opening the data")
    loader = open_loader(config, data, parallel, "train", stages[0])
    check_vocabulary(config, loader)
    check_tokenizer(config)
    tasks = open_tasks(built, parallel)
    require_same_on_all_ranks(identities_of(loader))
    report("building the model and its optimizer")
    if not deterministic:
        share_tiles(config, parallel)
    remarks: list[str] = []
    engine = build_engine(
        build_model(built, parallel, remarks.append, draws=draws),
        optimizer=config.optimizer,
        precision=config.train.precision,
        zero_stage=built.parallel.zero_stage,
        parallel=parallel,
        offload_optimizer=built.parallel.offload_optimizer,
    )
    heartbeat = Heartbeat(Path(config.run.dir), parallel.rank, config.launch.heartbeat_seconds)
    saver = BackgroundSaver(engine, config.train.timeout_seconds)
    if train.checkpoint_store is not None:
        saver.remote = RemoteCheckpoints(train.checkpoint_store)
    if train.replica_every_steps is not None:
        saver.replicas = NodeMemory.of(train.replica_folder, Path(config.run.dir), saver.ranks)
    return Run(
        config=config,
        parallel=parallel,
        engine=engine,
        saver=saver,
        loader=loader,
        validations=open_validations(config, data, parallel, stages),
        peak=find_peak(parallel, config.train.precision),
        stages=stages,
        stage=stage,
        layout=built.parallel,
        signals=signals,
        heartbeat=heartbeat,
        profiler=StepProfiler(train.profile, Path(config.run.dir), parallel.rank, engine.module, heartbeat),
        pipeline=build_pipeline(built, parallel, engine),
        stragglers=StepTimes(clock_of(parallel.device)),
        keeps_freed_memory=keeps_freed_memory,
        tasks=tasks,
        remarks=tuple(remarks),
    )


def choose_backend(config: RunConfig, parallel: Parallel) -> str:
    """Name the implementation of the kernels on this rank. Raises ValueError for one that cannot run here."""
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    return resolve_for_run(config.kernels.backend, parallel.device, dtype)


def share_tiles(config: RunConfig, parallel: Parallel) -> None:
    """Let all ranks launch Triton kernels with the same tuned tiles, where they run on CUDA. Every rank must call this."""
    if parallel.device.type != "cuda" or choose_backend(config, parallel) != "triton":
        return
    from amfm.kernels.runtime.tuning import load_table
    from amfm.pretrain.tiles import agree_on_tiles

    agree_on_tiles(load_table(parallel.device))


def build_model(
    config: RunConfig, parallel: Parallel, remark: Callable[[str], None] = lambda _: None, *, draws: bool = True
) -> HybridModel:
    """Build the model in float32 with its initial weights, compiled and recomputed as the run asks.

    `remark` hears what of given initial weights fits this model in part.

    With a pipeline it is this rank's part, and under tensor and expert parallelism its shard. Initial weights are random functions of the seed, the same on all layouts of
    ranks, or `run.initial_weights` when no checkpoint of the run exists to replace them. Without `draws` there are none: a
    checkpoint will be loaded, and of a large model they take minutes.
    """
    section, pieces = config.parallel, None
    backend = choose_backend(config, parallel)
    check_kernels(config, backend)
    if section.pipeline > 1:
        cut = cut_pieces(config.model, section.num_pieces(), config.train.sequence_length)
        pieces = pieces_of_rank(cut, parallel.groups.pp.rank(), section.pipeline)
    model = HybridModel(
        config.model,
        parallel.groups,
        backend=backend,
        seed=config.train.seed,
        device=parallel.device,
        pieces=pieces,
        # A checkpoint from before a run had guides lacks theirs.
        draws=draws or config.model.guide is not None,
    )
    if config.run.initial_weights is not None and not list_checkpoints(Path(config.run.dir) / "checkpoints"):
        has_text = config.data.probe is None
        tokenizer = TokenStore.open(config.data.text_store()).tokenizer_identity if has_text else NO_TOKENIZER
        for text in load_initial_weights(model, config.run.initial_weights, tokenizer):
            remark(text)
    if config.convert is not None:
        prepare_stage(model, config.convert)
    if config.train.compile:
        model.compile_blocks()
    model.recompute_blocks(recomputed_letters(config))
    return model


def build_pipeline(config: RunConfig, parallel: Parallel, engine: ZeroEngine) -> Pipeline | None:
    """Wrap the engine's model into pipeline stages; None without a pipeline.

    The engine hears of gradients that a schedule adds by hand, because its float32 sums come from autograd's hooks.
    """
    if config.parallel.pipeline == 1:
        return None
    return Pipeline(engine.module, config.parallel, parallel, collect=engine.take_gradient)


def open_log(run: Run, loaded: LoadedCheckpoint | None) -> None:
    """Write configuration and environment, open log and display, and report how the run begins. Main rank only.

    Drops lines of metrics.jsonl beyond the step that the run resumes from. Everything that loading passed over, warned of or
    found changed goes to the events too.
    """
    counts = count_parameters(run.model.config)
    length = run.stage.sequence_length
    facts = {
        "pattern": run.model.pattern.canonical(),
        "parameters": counts.total,
        "active_parameters": counts.active,
        "flops_per_token": sum(flops_per_token(run.model.config, length).values()),
    }
    environment = record_environment(run.parallel, run.peak, facts, keeps_freed_memory=run.keeps_freed_memory)
    # Whole or as they were: a full disk or a kill must not take from a run what it is.
    write_file_atomically(run.directory / "config.yaml", resolved_yaml(run.config).encode())
    write_file_atomically(run.directory / "environment.json", json.dumps(environment, indent=2).encode() + b"\n")
    last_event = find_last_event(run.directory)
    run.log = RunLog(run.config, resumed_at_step=run.progress.step)
    run.display = Display(run.config, first_step=run.progress.step, last_step=run.last_step)
    run.say(
        f"{facts['pattern']}: {counts.total:,} parameters ({counts.active:,} active), {run.config.train.precision}, "
        f"ZeRO {run.engine.zero_stage}, {plural(run.parallel.world_size, 'rank')} on {run.parallel.device.type} with "
        f"{plural(torch.get_num_threads(), 'thread')}, {run.stage.global_batch_size} x {length} tokens a step"
    )
    for remark in run.loader.describe_repeats(run.stages[-1].first_sample + run.stages[-1].num_samples()):
        run.say(remark)
    if run.log.dropped_lines:
        run.say(f"metrics.jsonl: {plural(run.log.dropped_lines, 'line')} cut short or damaged, left out")
    run.record_event("start", world_size=run.parallel.world_size, resumed_from=loaded and loaded.path.name)
    for text in run.remarks:
        run.say(text)
        run.record_event("initial_weights", text=text)
    unbalanced = describe_unbalanced(run.config.model)
    if unbalanced is not None:
        run.say(f"warning: {unbalanced}")
        run.record_event("unbalanced_experts", text=unbalanced)
    if run.tasks is not None and run.tasks.problem is not None:
        run.say(f"warning: {run.tasks.problem}; tried again when tasks are due, training goes on without them")
        run.record_event("tasks_failed", error=run.tasks.problem)
    cause = find_restart_cause(describe_environment([RESTART_CAUSE, TORCHRUN_RESTARTS]), last_event)
    if cause is not None:
        run.record_event("restarted", cause=cause)
    for text in [] if run.saver.replicas is None else run.saver.replicas.describe():
        run.say(f"replicas: {text}")
        run.record_event("replicas", text=text)
    if loaded is not None:
        run.say(f"resumed from {loaded.path} at step {loaded.step}")
        remarks = {
            "passed over": loaded.skipped,
            "warning": loaded.warnings,
            "changed since the checkpoint": loaded.changes,
        }
        for kind, texts in remarks.items():
            for text in texts:
                run.say(f"{kind}: {text}")
                run.record_event("resume", kind=kind, text=text)


def find_last_event(directory: Path) -> str | None:
    """The newest event of a run directory; None where there is none."""
    path = directory / "events.jsonl"
    events = [record.get("event") for _, record in read_lines(path) if record is not None] if path.is_file() else []
    return events[-1] if events else None


def find_restart_cause(environment: Mapping[str, str], last_event: str | None = None) -> str | None:
    """Why the ranks were started again: as `amfm launch` says, or torchrun's number of the restart; None where nothing failed.

    torchrun counts a start in the layout of the next stage, the run's last event then, as a restart too.
    """
    if RESTART_CAUSE in environment or last_event in ("next_layout", "guide_removed"):
        return environment.get(RESTART_CAUSE)
    number = environment.get(TORCHRUN_RESTARTS, "0")
    return f"torchrun started its ranks again, restart {number}" if number != "0" else None


def close_run(run: Run) -> None:
    """Close heartbeat, data, logs and display, waiting for a checkpoint that is being written. Every rank must call this."""
    run.heartbeat.close()
    run.engine.wait_for_weights()
    run.saver.close()
    run.loader.close()
    for validation in run.validations.values():
        validation.close()
    if run.log is not None:
        run.log.close()
    if run.display is not None:
        run.display.close()
    if run.lock is not None:
        run.lock.close()
