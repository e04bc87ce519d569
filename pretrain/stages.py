"""Training stages: a run as consecutive stages, each with its own rows, batch, positions, mixture, rate and layout.

Pretraining, annealing and long-context training are stages of one run. A stage leaves open what does not change, so it
is resolved against the one before it; a run that declares none is one stage. Everything here is a pure function of the
configuration and the number of optimizer steps done, so a resumed run needs no other state. (The parts of a model that
a pipeline spreads over ranks are `Piece`s in model/pipeline_split.py.)

The learning rate is such a function too: nothing to save, nothing to restore.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

from amfm.data_pipeline.config import DataConfig, PhaseConfig
from amfm.model.config.key_mixer_options import IndexerStage
from amfm.model.config.schema import in_indexer_stage
from amfm.pretrain.config.optimizers import schedule_specs
from amfm.pretrain.config.schema import ParallelConfig, RunConfig, ScheduleConfig, StageConfig
from amfm.pretrain.config.train_and_launch import BatchRampConfig, TrainConfig


@dataclass(frozen=True)
class RunStage:
    """One training stage.

    first_step, first_sample: steps done and rows drawn by all stages before it. config: of a run that is this stage and
    nothing else; train.steps, batch sizes in rows of train.sequence_length tokens, the layout, and optimizer.learning_rate
    as its peak are the stage's own. weights, indexer: of the data mixture and what indexers do from here on; None if
    they do not change.
    """

    index: int
    name: str
    first_step: int
    first_sample: int
    weights: dict[str, float] | None
    indexer: IndexerStage | None
    config: RunConfig

    @property
    def train(self) -> TrainConfig:
        """Its rows, batches and recomputation."""
        return self.config.train

    @property
    def num_steps(self) -> int:
        """Number of its optimizer steps."""
        assert self.train.steps is not None, "a stage has steps"
        return self.train.steps

    @property
    def last_step(self) -> int:
        """Its last step, counted from 1 over the whole run."""
        return self.first_step + self.num_steps

    def batch_size(self, step: int) -> int:
        """Global batch size in rows of step number `step`, counted from 1 over the whole run."""
        return ramped_size(self.train.batch_ramp, self.train.global_batch_size, step - self.first_step)

    def samples_before(self, step: int) -> int:
        """Number of rows that its steps before number `step` take."""
        inside, train = step - self.first_step - 1, self.train
        if train.batch_ramp is None:
            return inside * train.global_batch_size
        grown = min(inside, train.batch_ramp.steps)
        sizes = sum(ramped_size(train.batch_ramp, train.global_batch_size, number) for number in range(1, grown + 1))
        return sizes + (inside - grown) * train.global_batch_size

    def num_samples(self) -> int:
        """Number of rows of the whole stage."""
        return self.samples_before(self.last_step + 1)

    def num_tokens(self) -> int:
        """Number of tokens of the whole stage."""
        return self.num_samples() * self.train.sequence_length

    def rate(self, step: int) -> float:
        """Learning rate of step number `step`, counted from 1 over the whole run."""
        config = self.config
        peak = config.optimizer.learning_rate
        return learning_rate(step - self.first_step, config.schedule, peak=peak, total_steps=self.num_steps)


def ramped_size(ramp: BatchRampConfig | None, full_size: int, number: int) -> int:
    """Global batch size of the stage's step `number`, counted from 1.

    Rises by one increment in each equal share of the ramp.
    """
    if ramp is None or number > ramp.steps:
        return full_size
    num_increments = (full_size - ramp.start_size) // ramp.increment
    return ramp.start_size + ramp.increment * ((number - 1) * num_increments // ramp.steps)


def resolve_stages(config: RunConfig) -> tuple[RunStage, ...]:
    """Resolve the stages of a run, in order.

    What one leaves open is as in the stage before it, at first as in `train`.
    """
    assert config.stages or config.train.steps, "check_run was not called: a run without stages has train.steps"
    stages: list[RunStage] = []
    for index, section in enumerate(config.stages or (StageConfig(name="training", steps=config.train.steps),)):
        before = stages[-1] if stages else None
        first_step, first_sample = (before.last_step, before.first_sample + before.num_samples()) if before else (0, 0)
        indexer = section.indexer or (before.indexer if before else None)
        own = declare(config, before.config if before else config, section)
        stages.append(RunStage(index, section.name, first_step, first_sample, section.weights, indexer, own))
    return tuple(stages)


def declare(config: RunConfig, before: RunConfig, section: StageConfig) -> RunConfig:
    """The configuration of a run that is a stage: the one before it with what the section declares.

    Rate and schedule are not inherited, and the batch ramp is of the first stage. `train.stop_after_steps` is dropped: it
    counts over the whole run.
    """
    given = {name: value for name, value in section if value is not None}
    if section.recompute is not None:  # whoever declares what again does not inherit the letters
        given.setdefault("recompute_blocks", "")
    changes = {name: given[name] for name in TrainConfig.model_fields.keys() & given.keys()}
    changes |= {"stop_after_steps": None} | ({} if before is config else {"batch_ramp": None})
    train = before.train.model_copy(update=changes)
    train = train.model_copy(update={"steps": section.steps or count_steps(section, train)})
    model = in_indexer_stage(before.model, section.indexer)
    if section.rope is not None and model.attention is not None:
        model = model.model_copy(update={"attention": model.attention.model_copy(update={"rope": section.rope})})
    rate = section.learning_rate or config.optimizer.learning_rate
    changes = {
        "stages": (),
        "train": train,
        "model": model,
        "optimizer": config.optimizer.model_copy(update={"learning_rate": rate}),
        "schedule": section.schedule or config.schedule,
        "parallel": section.parallel or before.parallel,
    }
    return before.model_copy(update=changes)


def count_steps(section: StageConfig, train: TrainConfig) -> int:
    """Compute the smallest number of steps that gives at least the stage's tokens, with the batches of a ramp."""
    assert section.tokens is not None, "check_run was not called: a stage has tokens or steps"
    rows, ramp = train.global_batch_size, train.batch_ramp
    samples = math.ceil(section.tokens / train.sequence_length)
    if ramp is None:
        return math.ceil(samples / rows)
    grown = sum(ramped_size(ramp, rows, number) for number in range(1, ramp.steps + 1))
    if samples > grown:
        return ramp.steps + math.ceil((samples - grown) / rows)
    taken = number = 0
    while taken < samples:
        number += 1
        taken += ramped_size(ramp, rows, number)
    return number


def total_steps(config: RunConfig) -> int:
    """Number of optimizer steps of the whole run."""
    return resolve_stages(config)[-1].last_step


def stage_of(stages: tuple[RunStage, ...], steps_done: int) -> RunStage:
    """Find the stage of the next step; after the last step, the last stage."""
    starts = [stage.first_step for stage in stages]
    return stages[min(bisect_right(starts, steps_done), len(stages)) - 1]


@dataclass(frozen=True)
class Built:
    """What ranks, model and engine are built by for a step; where the next one needs another, the ranks restart.

    guided: whether factored matrices have dense ones next to them (`model.self_guided_training`), which vanish in the middle of a run.
    """

    parallel: ParallelConfig
    guided: bool

    @classmethod
    def for_step_after(cls, steps_done: int, config: RunConfig, stages: tuple[RunStage, ...]) -> Built:
        """What the step after this many needs."""
        guide = config.model.self_guided_training
        guided = guide is not None and steps_done < guide.last_step(stages[-1].last_step)
        return cls(stage_of(stages, steps_done).config.parallel, guided)

    def config_of(self, config: RunConfig, stage: RunStage) -> RunConfig:
        """The configuration that builds it in a stage."""
        return in_layout(config if self.guided else without_guide(config), stage)

    def explain_unfit(self, older: Built) -> str | None:
        """Why weights of an older step, which was built so, cannot be restored here; None if they can."""
        if older.guided and not self.guided:
            return "of a step in which factored matrices had guides, and this start has none"
        return None


def fresh_starts(config: RunConfig) -> list[int]:
    """Steps after which a run starts its ranks again: the next step is built by something else."""
    stages = resolve_stages(config)
    total = stages[-1].last_step
    changes = {stage.first_step for stage in stages[1:]}
    if config.model.self_guided_training is not None:
        changes.add(config.model.self_guided_training.last_step(total))
    built = partial(Built.for_step_after, config=config, stages=stages)
    return [step for step in sorted(changes - {0, total}) if built(step - 1) != built(step)]


def without_guide(config: RunConfig) -> RunConfig:
    """The configuration of the steps in which the guides are gone."""
    return config.model_copy(update={"model": config.model.model_copy(update={"self_guided_training": None})})


def data_of_stages(config: RunConfig, stages: tuple[RunStage, ...]) -> DataConfig:
    """Build the data section of a run: a phase for each stage that changes the mixture or the length of rows.

    The loader knows phases and no stages, so it stays independent of training.
    """
    phases = []
    for before, stage in pairwise((stages[0], *stages)):
        length: int | None = stage.train.sequence_length
        length = None if length == before.train.sequence_length else length
        if stage.weights is not None or length is not None:
            phases.append(PhaseConfig(start_sample=stage.first_sample, weights=stage.weights, sequence_length=length))
    changes: dict[str, object] = {"phases": tuple(phases)} if phases else {}
    if config.data.skip_steps:
        ranges = [tuple(first_sample(stages, step) for step in (a, b + 1)) for a, b in config.data.skip_steps]
        changes |= {"skip": tuple(sorted((*config.data.skip, *ranges))), "skip_steps": ()}
    return config.data.model_copy(update=changes) if changes else config.data


def first_sample(stages: tuple[RunStage, ...], step: int) -> int:
    """Number of the first global sample of a step, counted from 1; of the step after the last, the number of samples."""
    stage = stage_of(stages, step - 1)
    return stage.first_sample + stage.samples_before(step)


def in_layout(config: RunConfig, stage: RunStage) -> RunConfig:
    """The configuration with the layout of a stage in place of the first one.

    What ranks, model and engine are built by.
    """
    again = {"recompute": stage.train.recompute, "recompute_blocks": stage.train.recompute_blocks}
    return config.model_copy(update={"parallel": stage.config.parallel, "train": config.train.model_copy(update=again)})


def step_of_sample(stages: tuple[RunStage, ...], sample: int) -> tuple[int, int]:
    """Find the step, counted from 1, that takes a global sample, and the sample's place in its batch."""
    starts = [stage.first_sample for stage in stages]
    stage = stages[bisect_right(starts, sample) - 1]
    inside = sample - stage.first_sample
    # Batches never shrink inside a stage, so the number of the step is between these two.
    low, high = inside // stage.train.global_batch_size + 1, inside // stage.batch_size(stage.first_step + 1) + 1
    number = bisect_right(
        range(low, high + 1), inside, key=lambda number: stage.samples_before(stage.first_step + number)
    )
    step = stage.first_step + low + number - 1
    return step, inside - stage.samples_before(step)


def last_stage(stages: tuple[RunStage, ...], steps_done: int) -> RunStage:
    """Find the stage of the last step done: the one that a checkpoint of that step was trained in."""
    return stage_of(stages, max(0, steps_done - 1))


def is_due(step: int, every_steps: int | None) -> bool:
    """Whether something that is done every `every_steps` steps is due after this one; never, for None."""
    return every_steps is not None and step % every_steps == 0


def learning_rate(step: int, config: ScheduleConfig, *, peak: float, total_steps: int) -> float:
    """Compute the learning rate of optimizer step number `step`, counted from 1 to `total_steps`.

    Warm-up rises linearly and reaches the peak at its last step; decays reach `min_ratio * peak` at the last step, or at
    `decay_end_step`.
    A schedule of a package gives the share of the peak after warm-up.
    `inverse_sqrt` (Vaswani et al. 2017, arXiv 1706.03762, section 5.3) falls no lower than `min_ratio * peak`.
    """
    assert 1 <= step <= total_steps, f"step {step} is outside 1..{total_steps}"
    warmup_steps = config.warmup_length(total_steps)
    if step <= warmup_steps:
        return peak * step / warmup_steps
    spec = schedule_specs().get(config.kind)
    if spec is not None:
        options = getattr(config.options, config.kind) or spec.options()
        return peak * spec.load()(step, total_steps, config, options)
    if config.kind == "constant":
        return peak
    if config.kind == "inverse_sqrt":
        return peak * max(config.min_ratio, math.sqrt(warmup_steps / step))
    end = total_steps if config.decay_end_step is None else config.decay_end_step
    first_decay_step = warmup_steps if config.kind == "cosine" else end - decay_length(config, total_steps, end)
    if step <= first_decay_step:
        return peak
    progress = min(1.0, (step - first_decay_step) / (end - first_decay_step))
    shape = "cosine" if config.kind == "cosine" else config.decay_shape
    return peak * (config.min_ratio + (1 - config.min_ratio) * fall(shape, progress))


def decay_length(config: ScheduleConfig, total_steps: int, end: float) -> float:
    """Number of steps of the final decay of `wsd`, which ends at step `end`.

    As configured, else a fifth of the run, never reaching into warm-up.
    """
    asked = config.decay_steps if config.decay_steps is not None else max(1, total_steps // 5)
    return min(asked, end - config.warmup_length(total_steps))


def fall(shape: str, progress: float) -> float:
    """Decay factor between peak (1, at progress 0) and floor (0, at progress 1)."""
    if shape == "linear":
        return 1 - progress
    if shape == "sqrt":
        return 1 - math.sqrt(progress)
    if shape == "exponential":
        return float(2 * 0.5**progress - 1)
    assert shape == "cosine", f"unknown decay shape {shape}"
    return 0.5 * (1 + math.cos(math.pi * progress))
