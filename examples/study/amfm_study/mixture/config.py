"""Definition of a study of mixtures, read from one YAML file like other studies."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from amfm.pretrain.config.file import read_schema
from amfm_study.study import RunsConfig, RunTask, Study


class MixtureStudyConfig(RunsConfig):
    """Runs of one model on sampled weights of its sources, a law fitted to them, and a proposal that is tried."""

    task: RunTask = Field(
        description="Run whose sources are weighed. The study sets data.sources.*.weight, train.seed, train.num_threads, run.dir and run.name."
    )
    seeds: tuple[int, ...] = Field(
        (0, 1), min_length=1, description="Of the runs that compare the proposal; sampled mixtures take the first."
    )
    mixtures: int = Field(16, gt=0, description="Sampled mixtures to which the law is fitted: several per source.")
    checks: int = Field(4, ge=2, description="Further sampled mixtures, which the law must predict.")
    objective: dict[str, float] | None = Field(
        None,
        min_length=1,
        description="What the proposal minimizes: weight of each source's held-out loss; none: all alike.",
    )
    largest: dict[str, float] = Field(
        {},
        description="Largest weight of a source, of 1: what its text allows at the size of the real run; else 1.",
    )
    evaluation_tokens: int = Field(
        100_000, gt=0, description="Held-out tokens per run, over all sources in proportion to their size."
    )


def load_mixture_study(path: str | Path, overrides: Sequence[str] = ()) -> Study[MixtureStudyConfig]:
    """Load a study of mixtures from a YAML file with `key=value` overrides. Raises as `load_config` does."""
    config, origins = read_schema(path, overrides, MixtureStudyConfig)
    return Study(config, Path(path), origins)
