"""Rules of a run on a synthetic task.

A task makes its own rows, so every setting of a text store would be read by no one. Such a setting is rejected rather than
ignored: a run that silently drops `data.sources` would train on something else than its file says.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from amfm.data_pipeline.config import DataConfig, SyntheticConfig
from amfm.pretrain.config.errors import Problem
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.stages import RunStage
from amfm_synthetic.tasks import SyntheticTask, build_task

# Settings of `data` that only a store of text reads; each must keep its default together with data.synthetic.
ABOUT_TEXT = (
    "store",
    "cache",
    "sources",
    "tokenizer",
    "prepare",
    "phases",
    "packing",
    "shuffle",
    "mask_document_boundaries",
    "on_corruption",
)


def find_problems(config: RunConfig, stages: Sequence[RunStage]) -> Iterator[Problem]:
    """Find what is wrong with a run on data.synthetic; stages: none if they cannot be resolved.

    Builds the task, which checks its own settings; costs no rows and reads no file.
    """
    settings, found = config.data.synthetic, False
    assert settings is not None, "the run is on a synthetic task"
    for problem in settings_problems(config, settings):
        found = True
        yield problem
    if not found:
        yield from length_problems(config, settings, build_task(settings), stages)


def settings_problems(config: RunConfig, settings: SyntheticConfig) -> Iterator[Problem]:
    """Find settings that have no effect on a synthetic task or do not fit it, but for the length of rows."""
    for name in ABOUT_TEXT:
        if getattr(config.data, name) != DataConfig.model_fields[name].default:
            yield Problem(f"data.{name}", "has no effect on data.synthetic, which is not text", "remove one of the two")
    if "/" in config.model.pattern:
        rule = "has MTP layers, and labels of data.synthetic are not the next tokens"
        yield Problem("model.pattern", rule, "remove the MTP layers after '/'", config.model.pattern)
    for index, stage in enumerate(config.stages):
        if stage.weights is not None:
            yield Problem(f"stages.{index}.weights", "has no effect on data.synthetic, the only source", "remove it")
    try:
        task = build_task(settings)
    except ValueError as error:
        # The task's message states value, rule and fix itself, and its vocabulary is unknown: nothing more to check.
        yield Problem("data.synthetic", f"data.synthetic.{error}", "")
        return
    if task.vocab_size > config.model.vocab_size:
        rule = (
            f"must be at least {task.vocab_size}, the tokens of data.synthetic.task={settings.task} with its settings"
        )
        yield Problem("model.vocab_size", rule, "raise it", str(config.model.vocab_size))


def length_problems(
    config: RunConfig, settings: SyntheticConfig, task: SyntheticTask, stages: Sequence[RunStage]
) -> Iterator[Problem]:
    """Find stages whose rows are too short for the task."""
    for stage in stages:
        if stage.train.sequence_length < task.shortest:
            # Blame the key that was written: the stage's own length, or the one it inherits.
            own = config.stages and config.stages[stage.index].sequence_length is not None
            key = f"stages.{stage.index}.sequence_length" if own else "train.sequence_length"
            rule = f"must be at least {task.shortest}, the shortest sequence of data.synthetic.task={settings.task} with its settings"
            yield Problem(key, rule, "raise it", str(stage.train.sequence_length))
