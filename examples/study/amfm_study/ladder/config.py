"""Definitions of a ladder of sizes and of a study of rates, read from one YAML file like other studies."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from amfm.launch.init.shapes import STYLES, dial_size, model_section
from amfm.model.config.section import Section
from amfm.pretrain.config.errors import ConfigError, Problem
from amfm.pretrain.config.file import read_schema
from amfm_study.grid import repeated_problems
from amfm_study.study import RunsConfig, RunTask, Study


class LadderSize(Section):
    """One size of the model: its depth by the dial of `amfm init --depth`, or overrides of the task's model."""

    depth: int | None = Field(None, description="Layers; heads, experts and widths follow. none: the task's model.")
    width: int | None = Field(None, description="Channels; none: 32 per layer of `depth`.")
    label: str | None = Field(
        None, pattern=r"^[A-Za-z0-9_.-]+$", description="Name in cells and table; none: of depth and width."
    )
    overrides: tuple[str, ...] = Field((), description="Settings of its runs, KEY=VALUE as on the command line.")
    tokens_per_parameter: tuple[float, ...] | None = Field(
        None, min_length=1, description="*ladder*: tokens per active parameter of this size; none: those of the study."
    )

    @property
    def name(self) -> str:
        """Label in cells, table and plots."""
        if self.label is not None:
            return self.label
        return f"d{self.depth}" + (f"w{self.width}" if self.width is not None else "")

    def settings(self, style: str) -> list[str]:
        """Overrides of its runs. Raises ValueError for a depth or width that makes no model."""
        if self.depth is None:
            if self.width is not None or self.label is None or not self.overrides:
                raise ValueError("a size without depth needs a label and overrides, and has no width")
            return list(self.overrides)
        section = model_section("dial", style, dial_size(self.depth, self.width))
        del section["vocab_size"]  # the task's: it follows from the text
        if "moe" in section:
            section["moe"].pop("bias_update_rate", None)  # the task's: it follows from the steps
        return [*leaves("model", section), *self.overrides]


def leaves(key: str, value: Any) -> list[str]:
    """KEY=VALUE of each leaf of nested mappings, so that what they leave out stays as it is."""
    if isinstance(value, dict):
        return [leaf for name, inner in value.items() for leaf in leaves(f"{key}.{name}", inner)]
    return [f"{key}={json.dumps(value)}"]


class SizesConfig(RunsConfig):
    """What both studies say: a run, sizes of its model, and rates."""

    task: RunTask = Field(
        description="What every size is trained on: text with a held-out part. The study sets train.steps, its checkpoints and validation, train.seed, train.num_threads, run.dir and run.name, and of sizes with `depth` the shapes of the model."
    )
    style: str = Field("nemotron", description="Blocks of sizes with `depth`: a style of `amfm init`.")
    rates: tuple[float, ...] = Field(
        (), description="Peak learning rates that each size is trained at; none: the task's."
    )


class LadderConfig(SizesConfig):
    """Sizes x tokens per parameter x rate. The law is fitted to `sizes`, and must predict `held_out`."""

    sizes: tuple[LadderSize, ...] = Field(
        min_length=3, description="Sizes that the law is fitted to, from the smallest."
    )
    held_out: tuple[LadderSize, ...] = Field((), description="Larger sizes, which the law must predict.")
    tokens_per_parameter: tuple[float, ...] = Field(
        min_length=2, description="Tokens per active parameter at which a run ends, each a decay branch of one run."
    )
    held_out_tokens_per_parameter: tuple[float, ...] | None = Field(
        None, min_length=1, description="The same for held-out sizes; none: tokens_per_parameter."
    )
    resamples: int = Field(200, ge=20, description="Fits of the intervals.")


class RateConfig(SizesConfig):
    """Sizes x rate, each a run of the task's steps: the best rate of each size, and whether it is that of the first."""

    sizes: tuple[LadderSize, ...] = Field(
        min_length=2,
        description="Sizes; the rate of the first is asked of those with its depth and of those with its width.",
    )
    rates: tuple[float, ...] = Field(min_length=3, description="Peak learning rates, a factor of 2 apart or less.")
    tolerance: float = Field(
        0.02,
        gt=0,
        description="Nats per token that the first size's rate may cost another size; about the noise of seeds.",
    )


def load_ladder(path: str | Path, overrides: Sequence[str] = ()) -> Study[LadderConfig]:
    """Load a ladder from a YAML file with `key=value` overrides. Raises as `load_config` does, and for sizes that are none."""
    config, origins = read_schema(path, overrides, LadderConfig)
    problems = size_problems(config, {"sizes": config.sizes, "held_out": config.held_out})
    for key, values in (
        ("tokens_per_parameter", config.tokens_per_parameter),
        ("held_out_tokens_per_parameter", config.held_out_tokens_per_parameter or ()),
    ):
        problems += positive_problems(key, values)
    if problems:
        raise ConfigError(problems).located(origins)
    return Study(config, Path(path), origins)


def load_rate_study(path: str | Path, overrides: Sequence[str] = ()) -> Study[RateConfig]:
    """Load a study of rates from a YAML file with `key=value` overrides. Raises as `load_ladder` does."""
    config, origins = read_schema(path, overrides, RateConfig)
    problems = size_problems(config, {"sizes": config.sizes})
    rule = "is for a ladder: runs of a study of rates have the steps of their task"
    for index, size in enumerate(config.sizes):
        if size.tokens_per_parameter is not None:
            problems.append(Problem(f"sizes.{index}.tokens_per_parameter", rule, "leave it out"))
    if problems:
        raise ConfigError(problems).located(origins)
    return Study(config, Path(path), origins)


def size_problems(config: SizesConfig, sizes: dict[str, tuple[LadderSize, ...]]) -> list[Problem]:
    """Problems of sizes, seeds, rates and the style; sizes have distinct names and make a model."""
    if config.style not in STYLES:
        return [Problem("style", f"must be one of {', '.join(STYLES)}", "use nemotron", config.style)]
    problems = positive_problems("rates", config.rates)
    for key, entries in sizes.items():
        for index, size in enumerate(entries):
            problems += positive_problems(f"{key}.{index}.tokens_per_parameter", size.tokens_per_parameter or ())
            try:
                size.settings(config.style)
            except ValueError as error:
                problems.append(Problem(f"{key}.{index}", str(error), "use for example depth: 4", size.name))
    names = [size.name for entries in sizes.values() for size in entries]
    named = {
        "sizes": names,
        "seeds": [str(seed) for seed in config.seeds],
        "rates": [f"{rate:g}" for rate in config.rates],
    }
    return problems + repeated_problems(named)


def positive_problems(key: str, values: Sequence[float]) -> list[Problem]:
    """Problems of numbers that must be above 0, distinct and rising."""
    if any(value <= 0 for value in values) or list(values) != sorted(set(values)):
        return [Problem(key, "must be numbers above 0, each once, from the smallest", "sort them", str(list(values)))]
    return []
