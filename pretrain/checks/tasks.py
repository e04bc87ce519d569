"""Rules of what is measured while a model trains: tasks and samples need text, and a merge needs its checkpoints."""

from __future__ import annotations

from collections.abc import Iterator

from amfm.pretrain.config.errors import Problem
from amfm.pretrain.config.schema import EvaluateConfig, ParallelConfig, RunConfig

SETTING = "evaluate.tasks"


def task_problems(config: RunConfig) -> Iterator[Problem]:
    """Find settings of tasks that cannot take effect, on any layout of ranks."""
    section = config.evaluate
    if not section.tasks:
        for name in EvaluateConfig.model_fields:
            if (
                name not in ("merge_last", "prompts")
                and getattr(section, name) != EvaluateConfig.model_fields[name].default
            ):
                yield Problem(f"evaluate.{name}", "has no effect without evaluate.tasks", "name tasks, or remove it")
        return
    if config.data.synthetic is not None:
        rule = f"ask for text, and data.synthetic.task={config.data.synthetic.task} has no tokenizer"
        yield Problem(
            SETTING, rule, "remove it; train.validate_every_steps measures the accuracy on the synthetic task"
        )


def generation_rule(parallel: ParallelConfig) -> str | None:
    """Which rule keeps a run from generating text where ranks share the tokens or the blocks of a row; None: it can."""
    reasons = [f"{axis}={ranks}" for axis in ("pipeline", "context") if (ranks := getattr(parallel, axis)) > 1]
    if parallel.tensor > 1 and (parallel.sequence_parallel or parallel.expert > 1):
        reason = "sequence_parallel=true" if parallel.sequence_parallel else f"expert={parallel.expert}"
        reasons.append(f"tensor={parallel.tensor} with parallel.{reason}")
    shared = " and parallel.".join(reasons)
    return (
        f"generates text, a token at a time, and parallel.{shared} shares sequences between ranks" if reasons else None
    )


def sample_problems(config: RunConfig) -> Iterator[Problem]:
    """Reject samples of a model that has no text, an empty prompt, and a layout that shares rows."""
    prompts, key = config.evaluate.prompts, "evaluate.prompts"
    if not prompts:
        return
    rule, task = generation_rule(config.parallel), config.data.synthetic
    if rule is not None:
        yield Problem(key, rule, "remove it, and run `amfm generate RUN` on the checkpoints")
    if task is not None:
        yield Problem(key, f"ask for text, and data.synthetic.task={task.task} has no tokenizer", "remove it")
    if not all(prompts) or len(set(prompts)) < len(prompts):
        yield Problem(key, "must be different texts, none of them empty", "remove what is empty or there twice")


def merge_problems(config: RunConfig) -> Iterator[Problem]:
    """Reject a merge of checkpoints that are never there, or that the run's model cannot take in."""
    last, train, key = config.evaluate.merge_last, config.train, "evaluate.merge_last"
    if last is None:
        return
    every, steps = train.checkpoint_every_steps, train.steps or sum(stage.steps or 0 for stage in config.stages)
    saved = 0 if every is None else steps // every
    if last > saved:
        rule = f"needs as many checkpoints, and train.checkpoint_every_steps saves {saved} in {steps} steps"
        yield Problem(key, rule, "save more often, or lower it", str(last))
    if last > train.keep_last:
        yield Problem(
            key, f"must be at most train.keep_last={train.keep_last}", f"use train.keep_last={last}", str(last)
        )
    refused = {
        "parallel.zero_stage=3 cuts weights over ranks": config.parallel.zero_stage == 3,
        "a stage of a conversion is not what its checkpoints are read as": config.convert is not None,
        "model.self_guided_training is merged where checkpoints are read": config.model.self_guided_training
        is not None,
    }
    for reason in (text for text, is_set in refused.items() if is_set):
        yield Problem(key, f"puts a merge into the run's model, and {reason}", "remove it, and run `amfm merge RUN`")


def evaluate_problems(config: RunConfig) -> Iterator[Problem]:
    """Check the section `evaluate`."""
    yield from task_problems(config)
    yield from sample_problems(config)
    yield from merge_problems(config)
