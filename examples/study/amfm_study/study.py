"""Definition of a study: the axes of its grid and the runs that fill it, read from one YAML file. There are two kinds: mixers
by their share of attention, and labelled or crossed settings of one model.

How it works: the schema is frozen pydantic like a run's, and read by the same loader, so that overrides, unknown keys
and error messages with file and line work alike. Tasks name ordinary run configurations, relative to the study's file;
a study adds only what differs between cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from pydantic import Field

from amfm.model.config.section import Section
from amfm.pretrain.config.errors import Origin
from amfm.pretrain.config.file import read_schema


class RunTask(Section):
    """What every model of the grid is trained on, each time from its first weights."""

    name: str = Field(pattern=r"^[a-z0-9_]+$", description="Part of the runs' names, and a column of the table.")
    config: str = Field(
        description="Run configuration, relative to this file: text is measured by a validation loss, `data.synthetic` by an accuracy. The study sets train.seed, train.num_threads, run.dir and run.name, one of mixers model.pattern too."
    )


class TaskConfig(RunTask):
    """A task of a study of mixers."""

    between: str = Field("-", description="Channel mixers after each sequence mixer: `-`, `E`, several, or none.")


class MixerConfig(Section):
    """A sequence mixer to compare, and what it needs beyond the tasks' configurations."""

    mixer: str = Field(min_length=1, description="Symbol of the pattern, or name of a registered mixer.")
    label: str | None = Field(
        None, pattern=r"^[A-Za-z0-9_.-]+$", description="Name in table and plots; none: the mixer's own."
    )
    overrides: tuple[str, ...] = Field(
        (), description="Settings of its runs, KEY=VALUE as on the command line; not read by a ratio of `all`."
    )


class SettingConfig(Section):
    """One way to train the model of a study."""

    label: str = Field(pattern=r"^[A-Za-z0-9_.-]+$", description="Name in runs and table.")
    overrides: tuple[str, ...] = Field((), description="Settings of its runs, KEY=VALUE as on the command line.")


class RunsConfig(Section):
    """What all studies say of their runs."""

    dir: str = Field(
        description="Folder of the study: runs, table and plots; a second call continues with the missing runs."
    )
    seeds: tuple[int, ...] = Field(
        (0,), min_length=1, description="Of weights and data order; each is a run of every setting."
    )
    threads_per_run: int = Field(1, gt=0, description="CPU threads of a run.")
    runs_at_once: int | None = Field(
        None, gt=0, description="Runs side by side; none: as many as the cores (or GPUs, one per run) allow."
    )
    on: Literal["local", "ray", "slurm"] = Field(
        "local",
        description="Where runs are processes: of this machine, of the Ray cluster at `ray_address`, or jobs of Slurm, one each; their folders and stores must be seen from there.",
    )
    ray_address: str = Field("auto", description="Of the cluster, for `on: ray`.")


class HalvingConfig(Section):
    """Successive halving: at each rung the settings with the lowest training loss continue, the others end there."""

    rungs: tuple[float, ...] = Field((0.25, 0.5), min_length=1, description="Shares of the steps, rising, below 1.")
    keep: float = Field(0.5, gt=0, lt=1, description="Share of the settings that continue at a rung, at least one.")


class SettingsStudyConfig(RunsConfig):
    """A grid of settings x task x seed: the tasks' own models, trained in several ways."""

    tasks: tuple[RunTask, ...] = Field(min_length=1, description="What is trained.")
    settings: tuple[SettingConfig, ...] = Field(
        (), description="Ways to train it, to compare; the first is what the others are compared with."
    )
    grid: dict[str, tuple[Any, ...]] = Field({}, description="Values by dotted key; all are crossed with one another.")
    derived: dict[str, str] = Field(
        {}, description="Settings that follow from others, by dotted key, such as `hidden_size // 16`."
    )
    equal: Literal["flops", "tokens", "parameters", "time"] | None = Field(
        None, description="What runs have in common with the first: its train.steps are set so, or a size; none: steps."
    )
    fit: str | None = Field(
        None, description="Size that gives each model the parameters of the first, for `equal: parameters`."
    )
    pilot_steps: int = Field(20, gt=3, description="Of the runs that measure a step's time, for `equal: time`.")
    halving: HalvingConfig | None = Field(None, description="End hopeless settings early; none: all go to their end.")


class StudyConfig(RunsConfig):
    """A grid of mixer x ratio x task x seed. A cell is an ordinary run; all have equal tokens."""

    tasks: tuple[TaskConfig, ...] = Field(min_length=1, description="What the models are trained on.")
    mixers: tuple[MixerConfig, ...] = Field(min_length=1, description="Sequence mixers to compare.")
    ratios: tuple[str, ...] = Field(
        min_length=1,
        description="Linear mixers to attention, such as 3:1 (three, then one attention); `none`: no attention, `all`: nothing else.",
    )
    num_mixers: int = Field(gt=0, description="Sequence mixers of a model, attention among them.")
    state_tokens: int = Field(
        4096, gt=0, description="Length of text at which the bytes of a decode state are counted."
    )


AnyConfig_co = TypeVar("AnyConfig_co", bound=RunsConfig, covariant=True)


@dataclass(frozen=True)
class Study(Generic[AnyConfig_co]):
    """The definition of a study with its file and the place of each key in it, for error messages."""

    config: AnyConfig_co
    path: Path
    origins: dict[str, Origin]

    def task_path(self, task: RunTask) -> Path:
        """Path of a task's run configuration, relative to the study's file."""
        return self.path.parent / task.config


def load_study(path: str | Path, overrides: Sequence[str] = ()) -> Study[StudyConfig]:
    """Load a study of mixers from a YAML file with `key=value` overrides. Raises as `load_config` does."""
    config, origins = read_schema(path, overrides, StudyConfig)
    return Study(config, Path(path), origins)


def load_settings_study(path: str | Path, overrides: Sequence[str] = ()) -> Study[SettingsStudyConfig]:
    """Load a study of settings from a YAML file with `key=value` overrides. Raises as `load_config` does."""
    config, origins = read_schema(path, overrides, SettingsStudyConfig)
    return Study(config, Path(path), origins)
