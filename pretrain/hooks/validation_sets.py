"""Validation sets: held-out text of any source, each measured on its own and reported by name (section `validation`)."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

from amfm.data_pipeline.config import DataConfig
from amfm.data_pipeline.loader.loader import PretrainLoader
from amfm.pretrain.config.hook_sections import ValidationSet
from amfm.pretrain.hook import Hook
from amfm.pretrain.hooks.validate import Validation, validate
from amfm.pretrain.micro_batch import LossShare, MicroBatch
from amfm.pretrain.monitor.metrics import finite
from amfm.pretrain.run import Run
from amfm.pretrain.stages import is_due
from amfm.pretrain.startup.data import open_loader
from amfm.pretrain.step_sums import StepResult


class ValidationSets(Hook):
    """Measures each set when `train.validate_every_steps` is due, before the first step and after the last one.

    Holds a loader for each set and sequence length that the run comes to, so that missing text shows at the start.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.at_first: dict[str, float | None] = {}
        self.loaders: dict[tuple[str, int], PretrainLoader] = {}
        for each in run.config.validation:
            alone = only_source(run.config.data, each.source_name)
            for stage in {stage.train.sequence_length: stage for stage in run.stages}.values():
                loader = open_loader(run.config, alone, run.parallel, "validation", stage)
                self.loaders[each.name, stage.train.sequence_length] = loader

    def before_passes(self, micro_batches: Sequence[MicroBatch], share: LossShare) -> None:
        """Before the first step of the run: what its first weights are worth."""
        if self.run.progress.step == 0 and not self.at_first:
            self.at_first = self.measure()

    def after_step(self, result: StepResult) -> None:
        """Measure each `train.validate_every_steps`, and after the last step."""
        run, step = self.run, self.run.progress.step
        if step == 1 and self.at_first:
            result.found["validation_sets_at_start"] = self.at_first
        if is_due(step, run.config.train.validate_every_steps) or step == run.num_steps:
            began = time.perf_counter()
            result.found["validation_sets"] = self.measure()
            seconds = result.found.get("validation_seconds", 0.0) + time.perf_counter() - began
            result.found["validation_seconds"] = seconds

    def measure(self) -> dict[str, float | None]:
        """Measure all sets in their order, and record each; the losses by name. Every rank must call this."""
        found = {}
        for each in self.run.config.validation:
            loader = self.loaders[each.name, self.run.stage.train.sequence_length]
            validation = validate(self.run, loader, self.num_rows(each, loader))
            found[each.name] = finite(validation.loss)
            self.record(each, validation)
        return found

    def num_rows(self, each: ValidationSet, loader: PretrainLoader) -> int:
        """Rows that are measured: as many as asked for, at most each row of the text once."""
        stage, train = self.run.stage, self.run.config.train
        wanted = (each.batches or train.validation_batches) * stage.train.global_batch_size
        if each.tokens is not None:
            wanted = math.ceil(each.tokens / stage.train.sequence_length)
        return min(wanted, loader.reader.rows_per_epoch(each.source_name, stage.train.sequence_length))

    def record(self, each: ValidationSet, validation: Validation) -> None:
        """Write what was found of a set as an event; before the first step, also say it."""
        bits = None if validation.bits_per_byte is None else finite(validation.bits_per_byte)
        facts: dict[str, Any] = {"loss": finite(validation.loss), "tokens": validation.tokens, "bits_per_byte": bits}
        self.run.record_event("validation", set=each.name, **facts)
        if self.run.progress.step == 0:
            self.run.say(f"before the first step: validation loss of {each.name} {validation.loss:.4f}")

    def close(self) -> None:
        """Close the loaders."""
        for loader in self.loaders.values():
            loader.close()


def only_source(data: DataConfig, name: str) -> DataConfig:
    """The same data with only this source, read in the process that measures."""
    weights = tuple(source.model_copy(update={"weight": float(source.name == name)}) for source in data.sources)
    return data.model_copy(update={"sources": weights, "phases": (), "skip": (), "skip_steps": (), "num_workers": 0})
