"""The stages of a conversion as configurations of ordinary runs.

    run.dir/start              the converted model before any training, as a weights folder
    run.dir/convert-transfer   trains the new weights, each block against its own softmax attention
    run.dir/transferred        start with what that gave
    run.dir/convert-tune       trains them and low-rank updates on the text
    run.dir/convert-tune-window, convert-tune-teacher
                               controls: the same updates with the linear branch left out, and next to the teacher's
                               attention
    run.dir/result             the weights of tune, merged

A stage differs from the conversion's configuration in its model, directory, first weights, steps and rate, and in
`convert.stage`, by which the start of a run knows what to freeze (prepare.py). So whatever starts, resumes, watches or
spreads a run over ranks does it with a stage too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from amfm.model.config.kinds import find_kind
from amfm.model.config.moe import MoeConfig
from amfm.model.config.schema import ModelConfig
from amfm.pretrain.checkpoint.manifest_file import newest_saved_step
from amfm.pretrain.config.convert import ConvertConfig, StageName
from amfm.pretrain.config.schema import RunConfig

WINDOW_LINEAR = "window_linear"
ATTENTION = find_kind("attention").symbol  # what is converted
FEED_FORWARD, EXPERTS = find_kind("feed_forward").symbol, find_kind("moe").symbol  # what is upcycled, and to what


@dataclass(frozen=True)
class ConversionStage:
    """One run of a conversion: its name and configuration. `initial`: the weights it starts from."""

    name: StageName
    config: RunConfig
    initial: Path

    @property
    def run_dir(self) -> Path:
        """The run's directory."""
        return Path(self.config.run.dir)

    @property
    def file(self) -> Path:
        """Where the configuration is written, for whatever starts the run."""
        return self.run_dir.with_suffix(".yaml")

    def is_finished(self) -> bool:
        """Whether the run has a checkpoint of its last step."""
        steps = self.config.train.steps
        return steps is not None and newest_saved_step(self.run_dir) >= steps


def conversion_of(config: RunConfig) -> ConvertConfig:
    """The section of a configuration that has one."""
    assert config.convert is not None, "only configurations with a section `convert` come here"
    return config.convert


def converted_blocks(config: RunConfig) -> tuple[int, ...]:
    """Numbers of the blocks that are converted, in order."""
    convert = conversion_of(config)
    if convert.blocks is not None:
        return tuple(sorted(set(convert.blocks)))
    wanted = ATTENTION if convert.upcycle is None else FEED_FORWARD
    letters = config.model.letters
    return tuple(index for index, letter in enumerate(letters) if letter == wanted and index not in convert.keep_blocks)


def converted_model(config: RunConfig) -> ModelConfig:
    """The model with the new mixer instead of these blocks; cuts of a pipeline stay where they are."""
    symbol, blocks = find_kind(conversion_of(config).to).symbol, converted_blocks(config)
    pattern = config.model.parsed_pattern
    letters = tuple(symbol if index in blocks else letter for index, letter in enumerate(pattern.letters))
    return config.model.model_copy(update={"pattern": replace(pattern, letters=letters).canonical()})


def folder_of(config: RunConfig, name: str) -> Path:
    """A folder of the conversion."""
    return Path(config.run.dir) / name


def conversion_stages(config: RunConfig) -> Iterator[ConversionStage]:
    """The runs of a conversion, in the order in which they must be run."""
    convert = conversion_of(config)
    start, transferred = folder_of(config, "start"), folder_of(config, "transferred")
    if convert.transfer is not None:
        yield _stage(config, "transfer", start, convert.transfer.steps, convert.transfer.learning_rate)
    tune = convert.tuning()
    yield _stage(config, "tune", start if convert.transfer is None else transferred, tune.steps, tune.learning_rate)
    if convert.to == WINDOW_LINEAR:
        yield _stage(config, "tune-window", start, tune.steps, tune.learning_rate)
    yield _stage(config, "tune-teacher", Path(convert.teacher), tune.steps, tune.learning_rate)


def _stage(config: RunConfig, name: StageName, initial: Path, steps: int, rate: float) -> ConversionStage:
    convert = conversion_of(config)
    model = config.model if name == "tune-teacher" else converted_model(config)
    # Routers are frozen, and so is the balance that they were trained with.
    for kind, options in model.sections():
        if isinstance(options, MoeConfig):
            model = model.with_options(kind, options.model_copy(update={"bias_update_rate": 0.0}))
    if name != "transfer":
        model = model.model_copy(update={"lora_mixer": convert.tuning().routed()})
    run_dir = str(folder_of(config, f"convert-{name}"))
    changes = {
        "model": model,
        "run": config.run.model_copy(update={"dir": run_dir, "initial_weights": str(initial), "name": name}),
        "train": config.train.model_copy(update={"steps": steps}),
        "optimizer": config.optimizer.model_copy(update={"learning_rate": rate}),
        "convert": convert.model_copy(update={"stage": name, "blocks": converted_blocks(config), "keep_blocks": ()}),
    }
    return ConversionStage(name, config.model_copy(update=changes), initial)
