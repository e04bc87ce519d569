"""Definition of a study: the axes of its grid and the runs that fill it, read from one YAML file.

How it works: the schema is frozen pydantic like a run's, and read by the same loader, so that overrides, unknown keys
and error messages with file and line work alike. Tasks name ordinary run configurations, relative to the study's file;
a study adds only what differs between cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from pretrain.config.errors import Origin
from pretrain.config.file import read_schema
from pretrain.config.schema import Section


class TaskConfig(Section):
    """What every model of the grid is trained on, each time from its first weights."""

    name: str = Field(pattern=r"^[a-z0-9_]+$", description="Part of the cells' names, and a column of the table.")
    config: str = Field(
        description="Run configuration, relative to this file: text gives a validation loss, `data.probe` an accuracy. The study sets model.pattern, train.seed, train.num_threads, run.dir and run.name."
    )
    between: str = Field("-", description="Channel mixers after each sequence mixer: `-`, `E`, several, or none.")


class MixerConfig(Section):
    """A sequence mixer to compare, and what it needs beyond the tasks' configurations."""

    mixer: str = Field(min_length=1, description="Letter of the pattern, or name of a registered mixer.")
    label: str | None = Field(
        None, pattern=r"^[A-Za-z0-9_.-]+$", description="Name in table and plots; none: the mixer's own."
    )
    overrides: tuple[str, ...] = Field(
        (), description="Settings of its runs, KEY=VALUE as on the command line; not read by a ratio of `all`."
    )


class StudyConfig(Section):
    """A grid of mixer x ratio x task x seed. A cell is an ordinary run; all have equal tokens."""

    dir: str = Field(description="Folder of the study: runs, table and plots; a second call does what is missing.")
    tasks: tuple[TaskConfig, ...] = Field(min_length=1, description="What the models are trained on.")
    mixers: tuple[MixerConfig, ...] = Field(min_length=1, description="Sequence mixers to compare.")
    ratios: tuple[str, ...] = Field(
        min_length=1,
        description="Linear mixers to attention, such as 3:1 (three, then one attention); `none`: no attention, `all`: nothing else.",
    )
    num_mixers: int = Field(gt=0, description="Sequence mixers of a model, attention among them.")
    seeds: tuple[int, ...] = Field((0,), min_length=1, description="Of weights and data order; each is a run a cell.")
    state_tokens: int = Field(
        4096, gt=0, description="Length of text at which the bytes of a decode state are counted."
    )
    threads_per_run: int = Field(1, gt=0, description="CPU threads of a run.")
    runs_at_once: int | None = Field(
        None, gt=0, description="Runs side by side; none: as many as the cores (or GPUs, one a run) allow."
    )


@dataclass(frozen=True)
class Study:
    """A StudyConfig with its file and the place of each key in it, for error messages."""

    config: StudyConfig
    path: Path
    origins: dict[str, Origin]

    def task_path(self, task: TaskConfig) -> Path:
        """Path of a task's run configuration, relative to the study's file."""
        return self.path.parent / task.config


def load_study(path: str | Path, overrides: Sequence[str] = ()) -> Study:
    """Load a study from a YAML file with `key=value` overrides. Raises as `load_config` does."""
    config, origins = read_schema(path, overrides, StudyConfig)
    return Study(config, Path(path), origins)
