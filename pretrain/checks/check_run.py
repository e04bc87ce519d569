"""Checks of a whole run: rules that tie sections of a configuration together, before anything is allocated.

The schema checks one field at a time; here are the rules that read two or more sections. Each is a generator of
`Problem`s (key, rule, fix, value), and `check_run` raises one error with all of them, so that a file is corrected in
one pass. A rule may rely on others: stages are resolved only after their declaration is sound, export and pipeline rules
run only on a model whose own rules hold, and rules on micro-batches only when the ranks share the batch. That order
keeps one mistake from being reported five times.

A run with stages is checked stage by stage (checks/stages.py), each as its own run.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from amfm.data_pipeline.config import CacheConfig
from amfm.data_pipeline.store.object_store import is_url
from amfm.model.config.checks import check_model
from amfm.model.config.low_precision import LowPrecisionConfig
from amfm.pretrain.checks.blocks import graph_problems, kernel_problems, training_problems
from amfm.pretrain.checks.parallel import layout_problems, pipeline_problems
from amfm.pretrain.checks.sections import (
    conversion_problems,
    editing_problems,
    hook_problems,
    optimizer_problems,
    routed_problems,
    trace_problems,
)
from amfm.pretrain.checks.stages import (
    declaration_problems,
    ramp_problems,
    rank_problems,
    ranks_of_stage,
    relocate,
    total_problems,
    with_nearest,
)
from amfm.pretrain.config.errors import ConfigError, Problem
from amfm.pretrain.config.hook_sections import validation_problems
from amfm.pretrain.config.optimizers import schedule_specs
from amfm.pretrain.config.schema import EvaluateConfig, RunConfig, ScheduleConfig
from amfm.pretrain.recompute import recompute_problems
from amfm.pretrain.stages import RunStage, learning_rate, resolve_stages, stage_of, step_of_sample

_MODEL_KEY = re.compile(r"model(\.[a-z_0-9]+)+")


def check_run(
    config: RunConfig,
    world_size: int | Sequence[int] | None = None,
    *,
    steps_done: int = 0,
    goes_on: bool = False,
) -> None:
    """Reject a run whose sections do not fit together or whose ranks cannot share its batch.

    `world_size` counts all ranks; a launcher that starts each layout again gives all numbers that it can start, the
    most first; None leaves out the rules that depend on it, as they are for stages before `steps_done`. `goes_on`: a
    launcher has checked what comes after the present layout. Raises ConfigError with every broken rule. Touches no
    device and reads no file.
    """
    declared, task = list(declaration_problems(config)), config.data.synthetic
    stages = () if declared else resolve_stages(config)
    synthetic: Iterable[Problem] = () if task is None else task.load("problems")(config, stages)
    from amfm.pretrain.checks.early import keeping_problems, vocabulary_problems

    problems = [*declared, *vocabulary_problems(config), *data_problems(config), *synthetic, *keeping_problems(config)]
    if config.evaluate != EvaluateConfig():
        from amfm.pretrain.checks.tasks import evaluate_problems

        problems += evaluate_problems(config)
    problems += [*conversion_problems(config), *routed_problems(config)]
    if config.distill is not None:
        from amfm.pretrain.checks.sections import distill_problems

        problems += distill_problems(config)
    if stages:
        steps = stages[-1].last_step
        ramp = list(ramp_problems(config, stages[0]))
        if not ramp and not config.stages:
            problems += phase_problems(config, stages)
        problems += [
            *ramp,
            *total_problems(config, steps),
            *loop_problems(config, steps),
            *profile_problems(config, steps, world_size),
            *editing_problems(config, steps),
            *hook_problems(config, steps),
        ]
        choices = [world_size] if isinstance(world_size, int) else world_size
        present = stage_of(stages, steps_done)
        for stage in stages:
            is_shared = stage.index >= present.index and not (
                goes_on and stage.config.parallel != present.config.parallel
            )
            ranks = ranks_of_stage(config, stage, choices) if choices and is_shared else None
            found = stage_problems(stage.config, ranks)
            if ranks is not None:
                found = with_nearest(found, config, stage, ranks)
            problems += [relocate(problem, config, stage) for problem in found]
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))  # what is wrong in every stage alike is said once


def stage_problems(config: RunConfig, world_size: int | None) -> list[Problem]:
    """Check the rules of a run without stages, or of one stage taken as a run."""
    model = list(model_problems(config))
    problems = [*model, *schedule_problems(config), *layout_problems(config), *recompute_problems(config)]
    problems += training_problems(config)
    problems += optimizer_problems(config)
    problems += trace_problems(config)
    problems += [*kernel_problems(config, config.kernels.backend)]
    if not model:
        problems += [*pipeline_problems(config), *depth_problems(config)]
        if config.low_precision != LowPrecisionConfig():
            from amfm.pretrain.checks.low_precision import low_precision_problems

            problems += low_precision_problems(config)
        problems += graph_problems(config)
    if world_size is None:
        problems += whole_batch_problems(config)
    else:
        problems += rank_problems(config, world_size)
    # Last, and only then: what classes hold is known by their weights, for which torch is imported.
    return problems or list(export_problems(config))


def model_problems(config: RunConfig) -> Iterator[Problem]:
    """Check the model's own rules: pattern, heads, groups, experts."""
    try:
        check_model(config.model)
    except ValueError as error:
        yield whole_message(str(error))


def depth_problems(config: RunConfig) -> Iterator[Problem]:
    """Check that rows are long enough for the last MTP layer to have a label."""
    depths, length = config.model.num_depths, config.train.sequence_length
    if depths and depths >= length:
        rule = f"has {depths} MTP layers, which need sequences of at least {depths + 1} tokens, not {length}"
        yield Problem("model.pattern", rule, "use fewer depths, or raise train.sequence_length", config.model.pattern)


def whole_message(text: str) -> Problem:
    """Build a problem from a message that says value, rule and fix itself; the first key it names gives the place.

    Without a key it is filed under `model`.
    """
    key = _MODEL_KEY.search(text)
    return Problem(key.group() if key else "model", text, "")


def data_problems(config: RunConfig) -> Iterator[Problem]:
    """Check that sources have different names, that phases are in order and weigh those sources, and that folders differ.

    `start_sample` of a phase counts rows over the whole run. Paths are compared as written; no folder is opened.
    """
    store = config.data.store
    yield from skip_problems(config)
    if config.data.synthetic is not None:
        return
    if store is None:
        yield Problem("data.store", "is missing", "name the folder that `amfm prepare` writes, or give data.synthetic")
    if not config.data.sources:
        yield Problem("data.sources", "is missing", "name at least one, with name and paths, or give data.synthetic")
        return
    names = [source.name for source in config.data.sources]
    for index, name in enumerate(names):
        if name in names[:index]:
            rule = f"is also the name of data.sources.{names.index(name)}"
            yield Problem(f"data.sources.{index}.name", rule, "give each source its own name", name)
    start = 0
    for index, phase in enumerate(config.data.phases):
        key = f"data.phases.{index}"
        if phase.weights is None and phase.sequence_length is None:
            yield Problem(key, "changes nothing", "give it weights or a sequence_length")
        for name in phase.weights or {}:
            if name not in names:
                remedy = f"use one of {', '.join(names)}"
                yield Problem(f"{key}.weights.{name}", "is not a name of data.sources", remedy)
        if phase.start_sample <= start:
            rule = f"must be greater than {start}, where the phase before starts"
            yield Problem(f"{key}.start_sample", rule, "put the phases in order", str(phase.start_sample))
        start = phase.start_sample
    if not any(source.weight for source in config.data.sources):
        yield Problem("data.sources", "have no weight above 0", "give a weight to what the run begins with")
    if store is None:
        return
    if config.data.cache != CacheConfig() and not is_url(store):
        yield Problem("data.cache", "has no effect: data.store is a folder", "remove it, or name a URL in data.store")
    if Path(config.run.dir) == Path(store):
        yield Problem("run.dir", "is the folder of data.store too", "use two folders", config.run.dir)


def skip_problems(config: RunConfig) -> Iterator[Problem]:
    """Check that ranges to leave out are in order and hold something, by samples and by steps."""
    for name, least in (("skip", 0), ("skip_steps", 1)):
        before = least - 1
        for number, (start, stop) in enumerate(getattr(config.data, name)):
            key, value = f"data.{name}.{number}", f"[{start}, {stop}]"
            if config.data.synthetic is not None:
                yield Problem(key, "needs text, and data.synthetic is a synthetic task", "remove one of the two", value)
            elif stop < start + 1 - least:
                yield Problem(key, "holds nothing: the end is before the start", "give the end last", value)
            elif start <= before:
                yield Problem(key, f"must start at {before + 1} or later", "put the ranges in order", value)
            before = max(before, start)


def phase_problems(config: RunConfig, stages: tuple[RunStage, ...]) -> Iterator[Problem]:
    """Check that rows change their length between global batches, whose sizes a batch ramp changes."""
    for index, phase in enumerate(config.data.phases):
        step, inside = step_of_sample(stages, phase.start_sample)
        if phase.sequence_length is None or not inside:
            continue
        batch = config.train.global_batch_size
        where = f"a multiple of train.global_batch_size={batch}"
        if config.train.batch_ramp is not None:
            where = f"the first sample of a step, and step {step} of the batch ramp has {inside} before it"
        remedy = f"use {phase.start_sample - inside + stages[-1].batch_size(step)}"
        rule = f"must be {where}, because sequences change their length there"
        yield Problem(f"data.phases.{index}.start_sample", rule, remedy, str(phase.start_sample))


def schedule_problems(config: RunConfig) -> Iterator[Problem]:
    """Check that warm-up and decay fit into the run, and that no setting of another schedule is given.

    The configuration must have `train.steps`, as `RunStage.config` has it.
    """
    schedule, steps = config.schedule, config.train.steps
    assert steps is not None, "a stage has its steps"
    warmup_steps = schedule.warmup_length(steps)
    end, named = (
        schedule.decay_end_step or steps,
        "schedule.decay_end_step" if schedule.decay_end_step else "train.steps",
    )
    if warmup_steps >= max(end, steps):
        rule = f"must be less than train.steps={steps}"
        remedy = f"use for example {steps // 10}, or raise train.steps; for a short trial train.stop_after_steps keeps the schedule"
        yield Problem("schedule.warmup_steps", rule, remedy, str(warmup_steps))
    if schedule.kind == "inverse_sqrt" and warmup_steps == 0:
        remedy = "use for example 100, or raise train.steps"
        yield Problem("schedule.warmup_steps", "must be at least 1 with schedule.kind=inverse_sqrt", remedy, "0")
    yield from package_schedule_problems(schedule, steps)
    unread = {"wsd": (), "cosine": ("decay_steps", "decay_shape")}
    for key in unread.get(schedule.kind, ("decay_steps", "decay_shape", "decay_end_step")):
        if getattr(schedule, key) != type(schedule).model_fields[key].default:
            rule = f"has no effect with schedule.kind={schedule.kind}"
            yield Problem(f"schedule.{key}", rule, "remove it, or use schedule.kind=wsd", str(getattr(schedule, key)))
    if end <= warmup_steps < steps:
        rule = f"must be above schedule.warmup_steps={warmup_steps}"
        yield Problem("schedule.decay_end_step", rule, "raise it, or remove it", str(end))
    elif schedule.decay_steps is not None and warmup_steps < end < warmup_steps + schedule.decay_steps:
        rule = f"schedule.warmup_steps={warmup_steps} and the decay must fit into {named}={end}"
        remedy = f"use at most {end - warmup_steps}; for a short trial train.stop_after_steps keeps the schedule"
        yield Problem("schedule.decay_steps", rule, remedy, str(schedule.decay_steps))


def package_schedule_problems(schedule: ScheduleConfig, steps: int) -> Iterator[Problem]:
    """Find options of a package's schedule that is not chosen, and what the chosen one says that is not a rate."""
    for name in schedule.options.packages_used():
        if name != schedule.kind:
            yield Problem(
                f"schedule.options.{name}",
                f"has no effect with schedule.kind={schedule.kind}",
                f"set schedule.kind={name}, or remove it",
            )
    if schedule.kind not in schedule_specs():
        return
    first = int(schedule.warmup_length(steps)) + 1
    for step in sorted({first, (first + steps) // 2, steps}):
        rate = learning_rate(step, schedule, peak=1.0, total_steps=steps)
        if not (isinstance(rate, float) and 0 <= rate < math.inf):
            rule = f"gives {rate!r} of the peak at step {step} of {steps}, which is not a rate"
            yield Problem("schedule.kind", rule, "fix its package, or its options", schedule.kind)


def loop_problems(config: RunConfig, steps: int) -> Iterator[Problem]:
    """Check that settings of the training loop can take effect; `steps` are those of the whole run."""
    train = config.train
    if train.stop_after_steps is not None and train.stop_after_steps > steps:
        rule = f"is beyond the {steps} steps of the stages" if config.stages else f"is beyond train.steps={steps}"
        yield Problem("train.stop_after_steps", rule, "lower it, or remove it", str(train.stop_after_steps))
    if train.validate_every_steps is not None and config.data.validation_fraction == 0:
        rule = "needs documents kept for validation, and data.validation_fraction is 0"
        remedy = "set for example data.validation_fraction=0.02, or remove it"
        yield Problem("train.validate_every_steps", rule, remedy, str(train.validate_every_steps))
    mixtures = [*(phase.weights for phase in config.data.phases), *(stage.weights for stage in config.stages)]
    for key, rule, remedy in validation_problems(config.validation, config.data, mixtures):
        yield Problem(key, rule, remedy)
    for name in ("on_nonfinite", "on_spike"):
        if getattr(config.health, name) == "rollback" and train.checkpoint_every_steps is None:
            rule = "needs checkpoints to go back to, and train.checkpoint_every_steps is null"
            yield Problem(f"health.{name}", rule, "set for example train.checkpoint_every_steps=1000", "rollback")
    if config.health.spike_rule == "sigma" and "ignore" in (
        config.health.on_spike,
        config.health.spike_sigma or "ignore",
    ):
        rule = f"acts by on_spike={config.health.on_spike} above spike_sigma={config.health.spike_sigma}, and one of the two is off"
        yield Problem(
            "health.spike_rule", rule, "set for example health.on_spike=skip and health.spike_sigma=6", "sigma"
        )
    saves, exports = train.checkpoint_every_steps, config.export.every_steps
    if exports is not None and (saves is None or exports % saves):
        rule = f"exports checkpoints, and train.checkpoint_every_steps={saves} has none of every {exports} steps"
        yield Problem("export.every_steps", rule, "use a multiple of train.checkpoint_every_steps", str(exports))
    if config.model.self_guided_training is not None and config.run.initial_weights is not None:
        rule = "begins as the product of factors that start at random, and run.initial_weights gives others"
        yield Problem("model.self_guided_training", rule, "remove one of the two")
    if train.compile and config.kernels.backend == "reference":
        rule = "cannot speed up kernels.backend=reference, which runs step by step in Python"
        yield Problem("train.compile", rule, "use kernels.backend=torch, or train.compile=false", "true")


def profile_problems(config: RunConfig, steps: int, world_size: int | Sequence[int] | None) -> Iterator[Problem]:
    """Traces of steps or ranks that the run does not have."""
    profile = config.train.profile
    if profile is None:
        return
    wrong = [step for step in profile.steps if not 1 <= step <= steps]
    if wrong:
        yield Problem("train.profile.steps", f"the run has the steps 1 to {steps:,}", "name steps of it", str(wrong))
    most = world_size if isinstance(world_size, int) or world_size is None else max(world_size)
    if most is not None and min(profile.ranks) >= most:
        rule = f"the run has {most} rank(s), counted from 0"
        yield Problem("train.profile.ranks", rule, "name one of them, such as 0", str(list(profile.ranks)))


def whole_batch_problems(config: RunConfig) -> Iterator[Problem]:
    """Check that the global batch is whole micro-batches, without which no number of ranks can share it."""
    rows, batch = config.train.micro_batch_size, config.train.global_batch_size
    if batch % rows:
        nearest = " or ".join(str(value) for value in (batch // rows * rows, (batch // rows + 1) * rows) if value)
        rule = f"must be a multiple of train.micro_batch_size={rows}, for any number of ranks"
        yield Problem("train.global_batch_size", rule, f"use {nearest}", str(batch))


def export_problems(config: RunConfig) -> Iterator[Problem]:
    """Check that the declared export class can hold the model; `auto` finds one when it exports."""
    if config.export.target == "auto":
        return
    from amfm.model.huggingface.classes import explain_unfit, unfit_tokenizer

    for reason in explain_unfit(config.model, config.export.target):
        yield whole_message(
            f"export.target={config.export.target} cannot hold this model: {reason} (export.target=auto trains it as it is)"
        )
    own_tokenizer = config.data.tokenizer.model
    kind = "huggingface" if own_tokenizer is not None and own_tokenizer.endswith(".json") else "sentencepiece"
    for reason in unfit_tokenizer(config.export.target, kind):
        yield whole_message(f"export.target={config.export.target} cannot hold this run: {reason}")
