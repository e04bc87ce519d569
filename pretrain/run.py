"""Everything a training run holds while it runs, and how it is built, resumed and saved."""

from __future__ import annotations

import fcntl
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, Literal, cast

import torch

from data_pipeline.loader import PretrainLoader
from data_pipeline.memory import keep_freed_memory
from data_pipeline.probe_rows import NO_TOKENIZER
from data_pipeline.store import TokenStore
from kernels.backend import resolve_backend
from model.flops import count_parameters, flops_per_token
from model.hybrid import HybridModel
from model.stages import cut_pieces, pieces_of_rank
from pretrain.checkpoint import LoadedCheckpoint, load_newest
from pretrain.checkpoint_background import BackgroundSaver
from pretrain.checkpoint_commit import list_checkpoints
from pretrain.checks import check_run
from pretrain.checks_mixers import check_kernels
from pretrain.config import RunConfig
from pretrain.config_file import resolved_yaml
from pretrain.engine import ZeroEngine, build_engine
from pretrain.environment import Peak, find_peak, record_environment
from pretrain.heartbeat import Heartbeat
from pretrain.live import Display
from pretrain.metrics import RunLog, check_plot_services
from pretrain.parallel import (
    Parallel,
    describe_environment,
    initialize_parallel,
    set_determinism,
    start_process_group,
)
from pretrain.pipeline import Pipeline
from pretrain.rank_variables import RESTART_CAUSE
from pretrain.recompute import recomputed_letters
from pretrain.signals import SignalWatch
from pretrain.stages import RunStage, data_of_stages, last_stage, resolve_stages, stage_of
from pretrain.stragglers import StepTimes
from pretrain.weights import load_initial_weights


@dataclass
class Progress:
    """How far the run is. Saved in every checkpoint and the same on all ranks."""

    step: int = 0
    tokens: int = 0
    skipped_steps: int = 0
    skipped_in_row: int = 0
    rollbacks: int = 0
    recent_losses: list[float] = field(default_factory=list)
    validation_loss: float | None = None
    validation_accuracy: float | None = None
    validation_row_accuracy: float | None = None
    validated_step: int | None = None


@dataclass
class Run:
    """One training run in this process. `log` and `display` exist on the main rank alone.

    `stage` is that of the last step taken, at first the first. `validations`: by length of rows.
    """

    config: RunConfig
    parallel: Parallel
    engine: ZeroEngine
    saver: BackgroundSaver
    loader: PretrainLoader
    validations: dict[int, PretrainLoader]
    peak: Peak
    stages: tuple[RunStage, ...]
    stage: RunStage
    signals: SignalWatch
    heartbeat: Heartbeat
    pipeline: Pipeline | None = None
    stragglers: StepTimes = field(default_factory=StepTimes)
    lock: IO[str] | None = None
    keeps_freed_memory: bool = False
    log: RunLog | None = None
    display: Display | None = None
    progress: Progress = field(default_factory=Progress)
    saved_step: int | None = None

    @property
    def directory(self) -> Path:
        """The run directory."""
        return Path(self.config.run.dir)

    @property
    def validation(self) -> PretrainLoader | None:
        """Held-out text in rows of the stage's length; None where nothing is held out."""
        return self.validations.get(self.stage.sequence_length)

    @property
    def model(self) -> HybridModel:
        """The model below the engine."""
        return cast(HybridModel, self.engine.module)

    @property
    def identities(self) -> dict[str, str]:
        """What a checkpoint of this run is tied to."""
        store = self.loader.store
        return {"dataset": store.identity(), "tokenizer": store.tokenizer_identity}

    def say(self, text: str) -> None:
        """A remark for the person who watches; the main rank alone speaks."""
        if self.display is not None:
            self.display.say(text)

    def record_event(self, event: str, **details: Any) -> None:
        """A line in events.jsonl at the current step; the main rank alone writes."""
        if self.log is not None:
            self.log.write_event(event, self.progress.step, **details)


def start_run(config: RunConfig, signals: SignalWatch) -> Run:
    """Join the ranks, build data, model and engine, resume from the newest checkpoint, and open the log.

    Every rank must call this. Raises ValueError for settings, data or a checkpoint that do not fit together,
    RuntimeError or OSError for the machine's state; the run directory changes only after everything fits.
    """
    train = config.train
    _, world_size, _, _ = start_process_group(train.timeout_seconds)
    check_run(config, world_size)
    parallel = initialize_parallel(
        config.parallel, timeout_seconds=train.timeout_seconds, num_threads=train.num_threads
    )
    keeps_freed_memory = parallel.device.type == "cpu" and keep_freed_memory()
    check_plot_services(config)
    set_determinism(config.train.seed)
    lock = lock_directory(Path(config.run.dir)) if parallel.is_main else None
    stages = resolve_stages(config)
    loader = open_loader(config, parallel, "train", stages[0])
    check_vocabulary(config, loader)
    engine = build_engine(
        build_model(config, parallel),
        optimizer=config.optimizer,
        precision=config.train.precision,
        zero_stage=config.parallel.zero_stage,
        parallel=parallel,
        offload_optimizer=config.parallel.offload_optimizer,
    )
    run = Run(
        config=config,
        parallel=parallel,
        engine=engine,
        saver=BackgroundSaver(engine, config.train.timeout_seconds),
        loader=loader,
        validations=open_validations(config, parallel, stages),
        peak=find_peak(parallel, config.train.precision),
        stages=stages,
        stage=stages[0],
        signals=signals,
        heartbeat=Heartbeat(Path(config.run.dir), parallel.rank, config.launch.heartbeat_seconds),
        pipeline=build_pipeline(config, parallel, engine),
        lock=lock,
        keeps_freed_memory=keeps_freed_memory,
    )
    loaded = resume(run)
    run.stage = last_stage(config, run.progress.step)
    run.model.set_rope(run.stage.rope)
    if parallel.is_main:
        open_log(run, loaded)
    run.heartbeat.start()
    return run


def lock_directory(directory: Path) -> IO[str]:
    """Make the run directory and hold it: two runs that write to one directory destroy each other's checkpoints.

    The lock ends with the process, however it ends. Raises RuntimeError when another process holds it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    lock = (directory / "lock").open("w", encoding="utf-8")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.close()
        raise RuntimeError(
            f"another process trains in {directory}; wait for it, end it, or give this run another run.dir"
        ) from error
    return lock


def open_loader(
    config: RunConfig, parallel: Parallel, split: Literal["train", "validation"], stage: RunStage
) -> PretrainLoader:
    """This rank's stream of micro-batches; the training text goes through all stages, validation has one length."""
    return PretrainLoader(
        data_of_stages(config),
        split=split,
        sequence_length=stage.sequence_length,
        micro_batch_size=stage.micro_batch_size,
        seed=config.train.seed,
        data_rank=parallel.data_rank,
        data_world_size=parallel.data_world_size,
    )


def open_validations(config: RunConfig, parallel: Parallel, stages: tuple[RunStage, ...]) -> dict[int, PretrainLoader]:
    """Held-out text for every length of rows that the run will come to, so that a lack of it shows at the start."""
    if config.data.validation_fraction == 0:
        return {}
    by_length = {stage.sequence_length: stage for stage in stages}
    return {length: open_loader(config, parallel, "validation", stage) for length, stage in by_length.items()}


def enter_stage(run: Run) -> None:
    """Set the model to the stage of the next step, if it is another one than before. Every rank must call this."""
    stage = stage_of(run.stages, run.progress.step)
    if stage == run.stage:
        return
    run.stage = stage
    run.progress.recent_losses.clear()  # other text or longer rows have another loss
    run.model.set_rope(stage.rope)
    run.record_event("stage", name=stage.name, sequence_length=stage.sequence_length, steps=stage.num_steps)
    run.say(
        f"stage {stage.name}: {stage.num_steps:,} steps of {stage.global_batch_size} x {stage.sequence_length} tokens"
    )


def check_vocabulary(config: RunConfig, loader: PretrainLoader) -> None:
    """Every token of the store needs a row of the embedding."""
    if loader.store.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"model.vocab_size={config.model.vocab_size} must be at least {loader.store.vocab_size}, the vocabulary of "
            f"the store {config.data.store}; raise model.vocab_size, or prepare the store with a smaller tokenizer"
        )


def build_model(config: RunConfig, parallel: Parallel) -> HybridModel:
    """The model in float32 with its first weights, alike on all ranks; its blocks compiled if the run asks for it.

    With a pipeline it is the part of this rank. First weights are random, or `run.initial_weights` when no checkpoint of
    the run exists to replace them.
    """
    section, pieces = config.parallel, None
    backend = resolve_backend(config.kernels.backend, parallel.device)
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
    )
    if config.run.initial_weights is not None and not list_checkpoints(Path(config.run.dir) / "checkpoints"):
        has_text = config.data.probe is None
        tokenizer = TokenStore.open(config.data.text_store()).tokenizer_identity if has_text else NO_TOKENIZER
        load_initial_weights(model, config.run.initial_weights, tokenizer)
    if config.train.compile:
        model.compile_blocks()
    model.recompute_blocks(recomputed_letters(config))
    return model


def build_pipeline(config: RunConfig, parallel: Parallel, engine: ZeroEngine) -> Pipeline | None:
    """The stages around the engine's model; None without a pipeline."""
    if config.parallel.pipeline == 1:
        return None
    return Pipeline(engine.module, config.parallel, parallel, after_weights=engine.take_gradients)


def resume(run: Run) -> LoadedCheckpoint | None:
    """Continue from the newest checkpoint that verifies, if there is one. Every rank must call this."""
    loaded = load_newest(run.directory / "checkpoints", run.engine, config=run.config, identities=run.identities)
    if loaded is not None:
        run.loader.load_state_dict(loaded.state["loader"])
        run.progress = Progress(**loaded.state["progress"])
        run.saved_step = loaded.step
    return loaded


def return_weights(run: Run) -> int | None:
    """Put weights and optimizer back to the newest checkpoint, which may be being written; its step, None without one.

    Progress and data stay where they are. Every rank must call this.
    """
    finish_saving(run)
    loaded = load_newest(run.directory / "checkpoints", run.engine, config=run.config, identities=run.identities)
    if loaded is None:
        return None
    run.progress.skipped_steps += run.progress.step - loaded.step
    run.progress.skipped_in_row = 0
    is_same_stage = loaded.step > run.stage.first_step
    run.progress.recent_losses = Progress(**loaded.state["progress"]).recent_losses if is_same_stage else []
    run.saved_step = None
    return loaded.step


def save(run: Run) -> None:
    """Begin to write a checkpoint of the current step boundary, once; its event follows when it stands.

    Every rank must call this. Raises RuntimeError when the save before failed.
    """
    if run.saved_step == run.progress.step:
        return
    run.heartbeat.at(run.progress.step, "save")
    loader_state = run.loader.state_dict()
    # The cursor is the same everywhere; what a rank left out because it was damaged is its own.
    damages = [entry for entries in run.parallel.gather_objects(loader_state["quarantined"]) for entry in entries]
    loader_state["quarantined"] = sorted(damages)
    finished = run.saver.save(
        run.directory / "checkpoints",
        run.progress.step,
        run.engine,
        state={"progress": asdict(run.progress), "loader": loader_state},
        config=run.config,
        identities=run.identities,
        keep_last=run.config.train.keep_last,
    )
    run.saved_step = run.progress.step
    if finished is not None:
        run.record_event("checkpoint", path=finished.name)
    if not run.config.train.checkpoint_in_background:
        finish_saving(run)


def finish_saving(run: Run) -> None:
    """Wait until the checkpoint that is being written stands. Every rank must call this; RuntimeError if it failed."""
    finished = run.saver.wait()
    if finished is not None:
        run.record_event("checkpoint", path=finished.name)


def open_log(run: Run, loaded: LoadedCheckpoint | None) -> None:
    """Write the resolved configuration and the environment, open the logs, and say how the run begins."""
    counts = count_parameters(run.config.model)
    length = run.stage.sequence_length
    facts = {
        "pattern": run.model.pattern.canonical(),
        "parameters": counts.total,
        "active_parameters": counts.active,
        "flops_per_token": sum(flops_per_token(run.model.config, length).values()),
    }
    environment = record_environment(run.parallel, run.peak, facts, keeps_freed_memory=run.keeps_freed_memory)
    (run.directory / "config.yaml").write_text(resolved_yaml(run.config), encoding="utf-8")
    (run.directory / "environment.json").write_text(json.dumps(environment, indent=2) + "\n", encoding="utf-8")
    run.log = RunLog(run.config, resumed_at_step=run.progress.step)
    run.display = Display(run.config, first_step=run.progress.step)
    run.say(
        f"{facts['pattern']}: {counts.total:,} parameters ({counts.active:,} active), {run.config.train.precision}, "
        f"ZeRO {run.engine.zero_stage}, {run.parallel.world_size} rank(s) on {run.parallel.device.type} with "
        f"{torch.get_num_threads()} thread(s), {run.stage.global_batch_size} x {length} tokens a step"
    )
    for remark in run.loader.describe_repeats(run.stages[-1].first_sample + run.stages[-1].num_samples()):
        run.say(remark)
    run.record_event("start", world_size=run.parallel.world_size, resumed_from=loaded and loaded.path.name)
    cause = describe_environment([RESTART_CAUSE]).get(RESTART_CAUSE)
    if cause is not None:
        run.record_event("restarted", cause=cause)
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


def close_run(run: Run) -> None:
    """Close data, logs and display, after a checkpoint that is still being written. Every rank must call this."""
    run.heartbeat.close()
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
