"""Rules of a run on a synthetic task: its settings agree, its rows and vocabulary fit, and no setting is about text.

A synthetic task makes its own rows (`data.synthetic`), so every setting of a text store would be read by no one. Such a
setting is rejected rather than ignored: a run that silently drops `data.sources` would train on something else than its
file says. The rule on row lengths stands apart, because it needs resolved stages, and those exist only once the other
rules hold.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from amfm.data_pipeline.config import DataConfig, SyntheticConfig
from amfm.data_pipeline.synthetic.tasks import build_task
from amfm.pretrain.config.errors import Problem
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.stages import RunStage

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


def synthetic_problems(config: RunConfig, settings: SyntheticConfig) -> Iterator[Problem]:
    """Find what is wrong with data.synthetic, whose settings are given, but for the length of rows.

    Builds the task, which checks its own settings; costs no rows and reads no file.
    """
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


def synthetic_length_problems(
    config: RunConfig, settings: SyntheticConfig, stages: Sequence[RunStage]
) -> Iterator[Problem]:
    """Find stages whose rows are too short for the task.

    Call it only when `synthetic_problems` and `declaration_problems` found nothing, because it builds the task again and
    reads resolved stages.
    """
    shortest = build_task(settings).shortest
    for stage in stages:
        if stage.train.sequence_length < shortest:
            # Blame the key that was written: the stage's own length, or the one it inherits.
            own = config.stages and config.stages[stage.index].sequence_length is not None
            key = f"stages.{stage.index}.sequence_length" if own else "train.sequence_length"
            rule = f"must be at least {shortest}, the shortest sequence of data.synthetic.task={settings.task} with its settings"
            yield Problem(key, rule, "raise it", str(stage.train.sequence_length))
