"""The state of a training run: what start.py builds, the loop steps and checkpoints restore."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from amfm.data_pipeline.loader.loader import PretrainLoader
from amfm.model.hybrid import HybridModel
from amfm.pretrain.checkpoint.background import BackgroundSaver
from amfm.pretrain.checkpoint.engine_layout import MasterView
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.engine.engine import ZeroEngine
from amfm.pretrain.hook import Hook
from amfm.pretrain.monitor.environment import Peak
from amfm.pretrain.monitor.heartbeat import Heartbeat
from amfm.pretrain.monitor.live import Display
from amfm.pretrain.monitor.metrics import RunLog
from amfm.pretrain.monitor.ownership import Ownership
from amfm.pretrain.monitor.profile import StepProfiler
from amfm.pretrain.monitor.signals import SignalWatch
from amfm.pretrain.monitor.stragglers import UNTIL_UPDATE, PhaseClock
from amfm.pretrain.parallel import Parallel
from amfm.pretrain.recompute import recomputed_letters
from amfm.pretrain.stages import Built, RunStage, in_layout, stage_of

if TYPE_CHECKING:
    from amfm.pretrain.pipeline import Pipeline


from amfm.model.config.key_mixer_options import IndexerStage
from amfm.model.config.schema import in_indexer_stage


def set_indexer_stage(model: HybridModel, stage: IndexerStage | None) -> None:
    """Set what all indexers of a model do; None changes nothing. Parameters stay as they are; changes `config` too."""
    if stage is None:
        return
    from amfm.model.mixers.sparse.indexer import Indexer  # of few models

    model.config = in_indexer_stage(model.config, stage)
    for module in model.modules():
        if isinstance(module, Indexer):
            module.is_sparse = stage == "sparse"


@dataclass
class Progress:
    """How far the run is: saved in every checkpoint, the same on all ranks.

    step, tokens: done so far, skipped steps included. skipped_in_row: since the last step that was applied. rollbacks:
    to the weights of an older checkpoint. recent_losses, recent_norms: the windows that a spike is judged by. validation_*: of the
    newest validation, which was after step `validated_step`.
    """

    step: int = 0
    tokens: int = 0
    skipped_steps: int = 0
    skipped_in_row: int = 0
    rollbacks: int = 0
    recent_losses: list[float] = field(default_factory=list)
    recent_norms: list[float] = field(default_factory=list)
    validation_loss: float | None = None
    validation_accuracy: float | None = None
    validation_row_accuracy: float | None = None
    validated_step: int | None = None


@dataclass
class RunFiles:
    """What only the main rank has open of the run directory: its lock and ownership, the log, and the display."""

    lock: IO[bytes] | None = None
    owner: Ownership | None = None
    log: RunLog | None = None
    display: Display | None = None

    def close(self) -> None:
        """Close all of it, the lock last."""
        for each in (self.log, self.display, self.lock):
            if each is not None:
                each.close()


@dataclass
class Run:
    """One training run in this process.

    loader: this rank's micro-batches of training text. peak: the device's arithmetic, for MFU. stages: all training
    stages; stage: the one the model is set to. built: what ranks, model and engine were built by. phases: the clock of
    a step. profiler: traces the steps that `train.profile` names. pipeline: runs the schedule where the model is cut
    over ranks. hooks: what it does besides training, in the order of hooks/build.py. saved_step: of the newest
    checkpoint that was begun, None after a rollback. warnings: events of its start, each with its text. keeps_freed_memory:
    whether this process does.
    """

    config: RunConfig
    parallel: Parallel
    engine: ZeroEngine
    saver: BackgroundSaver
    loader: PretrainLoader
    peak: Peak
    stages: tuple[RunStage, ...]
    stage: RunStage
    built: Built
    signals: SignalWatch
    phases: PhaseClock
    profiler: StepProfiler
    pipeline: Pipeline | None = None
    hooks: tuple[Hook, ...] = ()
    files: RunFiles = field(default_factory=RunFiles)
    progress: Progress = field(default_factory=Progress)
    saved_step: int | None = None
    remarks: tuple[tuple[str, str], ...] = ()
    keeps_freed_memory: bool = False

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
    def model(self) -> HybridModel:
        """The model inside the engine; with a pipeline, this rank's part."""
        return cast(HybridModel, self.engine.module)

    @property
    def identities(self) -> dict[str, str]:
        """Hashes of dataset and tokenizer, which a checkpoint is tied to."""
        return identities_of(self.loader)

    @property
    def heartbeat(self) -> Heartbeat:
        """The heartbeat of this rank."""
        return self.phases.heartbeat

    def clock(self, phase: str) -> AbstractContextManager[object]:
        """Enter a phase of the step under way, or of what follows the last one done; as a context it is timed."""
        return self.phases.enter(self.progress.step + (phase in UNTIL_UPDATE), phase)

    def open_masters(self) -> MasterView:
        """The master weights, to look at and to edit between steps; say `note_edit` after an edit.

        Every rank must call this.
        """
        return MasterView(self.saver.layout, self.saver.writers, self.parallel.rank)

    def note_edit(self) -> None:
        """Tell every hook that master weights or weights were written to between steps: it is not a silent corruption."""
        for hook in self.hooks:
            hook.after_edit()

    def say(self, text: str) -> None:
        """Print a warning on the main rank; nothing on the others."""
        if self.files.display is not None:
            self.files.display.say(text)

    def record_event(self, event: str, *, step: int | None = None, **details: Any) -> None:
        """Write a line to events.jsonl at a step, the current one where none is given; only on the main rank."""
        if self.files.log is not None:
            self.files.log.write_event(event, self.progress.step if step is None else step, **details)

    def tell(self, event: str, words: str, /, **details: Any) -> None:
        """Record an event of the current step with its facts, and say it in words."""
        self.record_event(event, **details)
        self.say(words)


def identities_of(loader: PretrainLoader) -> dict[str, str]:
    """Digests of the tokens and of the tokenizer that a loader reads."""
    return {"dataset": loader.store.identity(), "tokenizer": loader.store.tokenizer_identity}


def set_up_model(model: HybridModel, stage: RunStage) -> None:
    """Set what a stage changes in the model that is built: rotary positions, and what indexers do."""
    attention = stage.config.model.attention
    model.set_rope(attention.rope if attention is not None else None)
    set_indexer_stage(model, stage.indexer)


def apply_stage(run: Run) -> None:
    """Enter the next step's training stage if that is a new one: its positions and indexers, a fresh loss window, an event.

    The run must have been built in its layout. Every rank must call this.
    """
    stage = stage_of(run.stages, run.progress.step)
    if stage == run.stage:
        return
    run.stage = stage
    run.model.recompute_blocks(recomputed_letters(in_layout(run.config, stage)))
    run.progress.recent_losses.clear()  # other text or longer rows have another loss
    run.progress.recent_norms.clear()
    set_up_model(run.model, stage)
    run.tell(
        "stage",
        f"stage {stage.name}: {stage.num_steps:,} steps of {stage.train.global_batch_size} x {stage.train.sequence_length} tokens",
        name=stage.name,
        sequence_length=stage.train.sequence_length,
        steps=stage.num_steps,
    )
