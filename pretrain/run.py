"""The state of a training run: what start.py builds, the loop steps and checkpoints restore."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

from amfm.data_pipeline.loader.loader import PretrainLoader
from amfm.model.hybrid import HybridModel
from amfm.pretrain.checkpoint.background import BackgroundSaver
from amfm.pretrain.config.schema import ParallelConfig, RunConfig
from amfm.pretrain.engine.engine import ZeroEngine
from amfm.pretrain.hook import Hook
from amfm.pretrain.monitor.display import Display
from amfm.pretrain.monitor.environment import Peak
from amfm.pretrain.monitor.heartbeat import Heartbeat
from amfm.pretrain.monitor.metrics import RunLog
from amfm.pretrain.monitor.ownership import Ownership
from amfm.pretrain.monitor.profile import StepProfiler
from amfm.pretrain.monitor.signals import SignalWatch
from amfm.pretrain.monitor.stragglers import StepTimes
from amfm.pretrain.parallel import Parallel
from amfm.pretrain.pipeline import Pipeline
from amfm.pretrain.recompute import recomputed_letters
from amfm.pretrain.stages import RunStage, in_layout, stage_of
from amfm.pretrain.tasks.suite import TaskSuite


@dataclass
class Progress:
    """How far the run is: saved in every checkpoint, the same on all ranks.

    step, tokens: done so far, skipped steps included. skipped_in_row: since the last step that was applied. rollbacks: to
    the weights of an older checkpoint. recent_losses: the window that a spike is judged by. validation_*: of the newest
    validation, which was after step `validated_step`.
    """

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
    """One training run in this process.

    stages: all training stages; stage: the one the model is set to. layout: what ranks, model and engine were built by.
    loader: this rank's micro-batches of training text; validations: of held-out text, by length of rows. pipeline: runs the
    schedule where the model is cut over ranks. peak: the device's arithmetic, for MFU. profiler: traces the steps that
    `train.profile` names. hooks: what it does beside training. lock, owner, log, display: on the main
    rank alone. saved_step: of the newest checkpoint that was begun, None after a rollback; replica_step: of the newest replica. validation_metrics: what the newest validation adds to its step's line. collapsed_blocks: MoE
    blocks whose collapse was reported. tasks: of lm-eval, on the main rank alone; task_values: what they gave after step
    `tasks_step`. remarks: what to say of the weights that it began with.
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
    layout: ParallelConfig
    signals: SignalWatch
    heartbeat: Heartbeat
    profiler: StepProfiler
    hooks: tuple[Hook, ...] = ()
    pipeline: Pipeline | None = None
    stragglers: StepTimes = field(default_factory=StepTimes)
    lock: IO[bytes] | None = None
    owner: Ownership | None = None
    keeps_freed_memory: bool = False
    log: RunLog | None = None
    display: Display | None = None
    progress: Progress = field(default_factory=Progress)
    saved_step: int | None = None
    replica_step: int = 0
    validation_metrics: dict[str, Any] = field(default_factory=dict)
    collapsed_blocks: frozenset[int] = frozenset()
    tasks: TaskSuite | None = None
    task_values: dict[str, float] = field(default_factory=dict)
    tasks_step: int | None = None
    remarks: tuple[str, ...] = ()

    @property
    def directory(self) -> Path:
        """The run directory."""
        return Path(self.config.run.dir)

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.stages[-1].last_step

    @property
    def last_step(self) -> int:
        """The step after which this start of the run ends."""
        return min(self.num_steps, self.config.train.stop_after_steps or self.num_steps)

    @property
    def validation(self) -> PretrainLoader | None:
        """Loader of held-out text in rows of the present stage's length; None where nothing is held out."""
        return self.validations.get(self.stage.sequence_length)

    @property
    def model(self) -> HybridModel:
        """The model inside the engine; with a pipeline, this rank's part."""
        return cast(HybridModel, self.engine.module)

    @property
    def identities(self) -> dict[str, str]:
        """Hashes of dataset and tokenizer, which a checkpoint is tied to."""
        return identities_of(self.loader)

    def note_edit(self) -> None:
        """Tell every hook that masters or weights were written to between steps."""
        for hook in self.hooks:
            hook.after_edit()

    def say(self, text: str) -> None:
        """Print a remark for the person who watches; does nothing but on the main rank."""
        if self.display is not None:
            self.display.say(text)

    def record_event(self, event: str, *, step: int | None = None, **details: Any) -> None:
        """Write a line to events.jsonl at a step, the current one where none is given; does nothing but on the main rank."""
        if self.log is not None:
            self.log.write_event(event, self.progress.step if step is None else step, **details)


def identities_of(loader: PretrainLoader) -> dict[str, str]:
    """Digests of the tokens and of the tokenizer that a loader reads."""
    return {"dataset": loader.store.identity(), "tokenizer": loader.store.tokenizer_identity}


def apply_stage(run: Run) -> None:
    """Enter the next step's training stage if that is a new one: its rotary positions, a fresh loss window, an event.

    The run must have been built in its layout. Every rank must call this.
    """
    stage = stage_of(run.stages, run.progress.step)
    if stage == run.stage:
        return
    run.stage = stage
    run.model.recompute_blocks(recomputed_letters(in_layout(run.config, stage)))
    run.progress.recent_losses.clear()  # other text or longer rows have another loss
    run.model.set_rope(stage.rope)
    run.record_event("stage", name=stage.name, sequence_length=stage.sequence_length, steps=stage.num_steps)
    run.say(
        f"stage {stage.name}: {stage.num_steps:,} steps of {stage.global_batch_size} x {stage.sequence_length} tokens"
    )
