"""Runs of a study of mixtures: the same configuration with other weights of its sources.

Mixtures are drawn around the configured weights from a Dirichlet distribution whose parameters are those weights times the
number of sources: for equal weights, uniformly over all mixtures. What exceeds `largest` is drawn again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from amfm.pretrain.checks.load import load_checked
from amfm.pretrain.config.errors import ConfigError, Problem
from amfm.pretrain.config.schema import RunConfig
from amfm_study.grid import Cell, load_run
from amfm_study.mixture.config import MixtureStudyConfig
from amfm_study.study import Study

Array = NDArray[np.float64]
DRAW_SEED, CANDIDATE_SEED, CANDIDATES = 20260101, 20260103, 10_000
DRAWS_PER_MIXTURE = 1000  # before bounds are said to leave nothing
# Weights of a configuration have this many digits: a mixture of the data is made of blocks of samples, not finer.
DIGITS = 4
FIT, CHECK, PROPOSAL, EQUAL, CONFIGURED = "fit", "check", "proposal", "equal", "configured"


@dataclass(frozen=True)
class Search:
    """What is searched: sources in the run's order, their configured shares, bounds and the weight of each one's loss."""

    sources: tuple[str, ...]
    configured: Array
    largest: Array
    objective: Array


def open_search(study: Study[MixtureStudyConfig]) -> Search:
    """Read the sources of the study's run. Raises ConfigError for a run without a mixture, and for unknown sources."""
    config = study.config
    run = load_checked(study.task_path(config.task), [], world_size=1)
    problems = list(search_problems(config, run))
    if problems:
        raise ConfigError(problems).located(study.origins)
    names = tuple(source.name for source in run.data.sources)
    weights = np.array([source.weight for source in run.data.sources])
    objective = np.array([(config.objective or dict.fromkeys(names, 1.0)).get(name, 0.0) for name in names])
    largest = np.array([config.largest.get(name, 1.0) for name in names])
    return Search(names, weights / weights.sum(), largest, objective / objective.sum())


def search_problems(config: MixtureStudyConfig, run: RunConfig) -> Iterator[Problem]:
    """What keeps the weights of a run from being searched."""
    names = [source.name for source in run.data.sources]
    if len(names) < 2:
        yield Problem(
            "task.config", "has no mixture: it needs two sources at least", "name another run", config.task.config
        )
        return
    if any(phase.weights for phase in run.data.phases):
        rule = "has data.phases with their own weights, which would undo those of the study"
        yield Problem("task.config", rule, "remove them from that run", config.task.config)
    silent = [source.name for source in run.data.sources if source.weight == 0]
    if silent:
        rule = f"gives {silent[0]} no weight, and mixtures are drawn around the configured ones"
        yield Problem("task.config", rule, "give it one, or remove the source", config.task.config)
    for key, given in (("objective", config.objective or {}), ("largest", config.largest)):
        for name in given.keys() - set(names):
            yield Problem(key, f"has no source of this name; there are {', '.join(names)}", "correct it", name)
    if (
        any(weight < 0 for weight in (config.objective or {}).values())
        or sum((config.objective or {"": 1.0}).values()) <= 0
    ):
        yield Problem(
            "objective", "must be weights from 0, one of them above it", "correct them", str(config.objective)
        )
    if any(not 0 < bound <= 1 for bound in config.largest.values()):
        yield Problem("largest", "must be parts of 1, above 0", "write for example 0.3", str(config.largest))
    elif sum(config.largest.get(name, 1.0) for name in names) < 1:
        yield Problem("largest", "leave less than 1 for all sources together", "raise them", str(config.largest))
    if config.mixtures < 2 * len(names):
        rule = f"is too few for {len(names)} sources: the law has {len(names) + 1} numbers per source"
        yield Problem("mixtures", rule, f"use {4 * len(names)}, {2 * len(names)} at least", str(config.mixtures))


def draw_mixtures(search: Search, count: int, seed: int) -> Array:
    """Mixtures [count, S] within the bounds; rows sum to 1. Raises ConfigError if the bounds hardly leave any."""
    generator = np.random.default_rng(seed)
    found: list[Array] = []
    for _ in range(DRAWS_PER_MIXTURE):
        drawn = generator.dirichlet(search.configured * len(search.sources), size=count)
        found += list(drawn[(drawn <= search.largest).all(axis=1)])
        if len(found) >= count:
            return np.array(found[:count])
    rule = f"leave so little room that {count * DRAWS_PER_MIXTURE:,} draws gave {len(found)} of {count} mixtures"
    raise ConfigError([Problem("largest", rule, "raise them", "")])


def draw_candidates(search: Search) -> Array:
    """The mixtures [CANDIDATES, S] among which the proposal is looked for."""
    return draw_mixtures(search, CANDIDATES, CANDIDATE_SEED)


def sampled_cells(study: Study[MixtureStudyConfig], search: Search) -> list[Cell]:
    """Runs of the sampled mixtures: those that the law is fitted to, then those that check it."""
    config = study.config
    mixtures = draw_mixtures(search, config.mixtures + config.checks, DRAW_SEED)
    labels = [f"{FIT}{number}" for number in range(config.mixtures)]
    labels += [f"{CHECK}{number}" for number in range(config.checks)]
    return [make_cell(study, search, label, mixture, config.seeds[0]) for label, mixture in zip(labels, mixtures)]


def compared_cells(study: Study[MixtureStudyConfig], search: Search, proposal: Array) -> list[Cell]:
    """Runs that compare the proposal with equal weights and with the configured ones, over all seeds."""
    equal = np.full(len(search.sources), 1 / len(search.sources))
    mixtures = {PROPOSAL: proposal, EQUAL: equal, CONFIGURED: search.configured}
    if np.allclose(equal, search.configured):
        del mixtures[CONFIGURED]
    return [
        make_cell(study, search, label, mixture, seed)
        for seed in study.config.seeds
        for label, mixture in mixtures.items()
    ]


def make_cell(study: Study[MixtureStudyConfig], search: Search, label: str, mixture: Array, seed: int) -> Cell:
    """One run; its name tells proposals apart, which change when further mixtures were sampled."""
    weights = [round(float(weight), DIGITS) for weight in mixture]
    mark = f"-{hashlib.sha256(json.dumps(weights).encode()).hexdigest()[:8]}" if label == PROPOSAL else ""
    name = f"{label}{mark}-seed{seed}"
    overrides = [f"data.sources.{index}.weight={weight}" for index, weight in enumerate(weights)]
    run = load_run(study, study.config.task, name, overrides, seed)
    return Cell(name, label, "", study.config.task.name, seed, run)


def weights_of(cells: Sequence[Cell]) -> Array:
    """Mixtures [n, S] of runs, as their configurations have them, in parts of 1."""
    weights = np.array([[source.weight for source in cell.config.data.sources] for cell in cells])
    return np.asarray(weights / weights.sum(axis=1, keepdims=True), dtype=np.float64)


def named(search: Search, values: Array) -> Mapping[str, float]:
    """Values by source."""
    return {name: float(value) for name, value in zip(search.sources, values)}
