"""Everything a training run holds while it runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

from data_pipeline.loader.loader import PretrainLoader
from model.hybrid import HybridModel
from pretrain.checkpoint.background import BackgroundSaver
from pretrain.config.schema import RunConfig
from pretrain.engine.engine import ZeroEngine
from pretrain.monitor.display import Display
from pretrain.monitor.environment import Peak
from pretrain.monitor.heartbeat import Heartbeat
from pretrain.monitor.metrics import RunLog
from pretrain.monitor.signals import SignalWatch
from pretrain.monitor.stragglers import StepTimes
from pretrain.parallel import (
    Parallel,
)
from pretrain.pipeline import Pipeline
from pretrain.stages import RunStage, stage_of


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
    lock: IO[bytes] | None = None
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
    def num_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.stages[-1].last_step

    @property
    def last_step(self) -> int:
        """The step after which this start of the run ends."""
        return min(self.num_steps, self.config.train.stop_after_steps or self.num_steps)

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
        return identities_of(self.loader)

    def say(self, text: str) -> None:
        """A remark for the person who watches; the main rank alone speaks."""
        if self.display is not None:
            self.display.say(text)

    def record_event(self, event: str, **details: Any) -> None:
        """A line in events.jsonl at the current step; the main rank alone writes."""
        if self.log is not None:
            self.log.write_event(event, self.progress.step, **details)


def identities_of(loader: PretrainLoader) -> dict[str, str]:
    """Digests of the tokens and of the tokenizer that a loader reads."""
    return {"dataset": loader.store.identity(), "tokenizer": loader.store.tokenizer_identity}


def apply_stage(run: Run) -> None:
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
