"""Rules of tasks that are measured while the model trains: they need text, and a layout that can answer them."""

from __future__ import annotations

from collections.abc import Iterator

from amfm.pretrain.config.errors import Problem
from amfm.pretrain.config.schema import EvaluateConfig, RunConfig

SETTING = "evaluate.tasks"


def task_problems(config: RunConfig) -> Iterator[Problem]:
    """Find settings of tasks that cannot take effect, on any layout of ranks."""
    section = config.evaluate
    if not section.tasks:
        for name in EvaluateConfig.model_fields:
            if getattr(section, name) != EvaluateConfig.model_fields[name].default:
                yield Problem(f"evaluate.{name}", "has no effect without evaluate.tasks", "name tasks, or remove it")
        return
    if config.data.synthetic is not None:
        rule = f"ask for text, and data.synthetic.task={config.data.synthetic.task} has no tokenizer"
        yield Problem(
            SETTING, rule, "remove it; train.validate_every_steps measures the accuracy on the synthetic task"
        )


def task_layout_problems(config: RunConfig) -> Iterator[Problem]:
    """Find ranks of a run, or of one stage taken as a run, on which tasks cannot be measured."""
    if not config.evaluate.tasks:
        return
    for axis in ("pipeline", "context"):
        ranks = getattr(config.parallel, axis)
        if ranks > 1:
            rule = f"are measured on data, tensor and expert ranks, and parallel.{axis} is {ranks}"
            yield Problem(SETTING, rule, "remove it, and run `amfm evaluate RUN --tasks NAMES` on its checkpoints")
