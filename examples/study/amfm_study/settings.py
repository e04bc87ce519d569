"""A study of settings: the model of a task trained in several ways, such as optimizers at several rates, and one table.

How it works: an entry is a label with overrides, as they are given to `amfm train`, crossed with the values of a grid
(crossed.py); every setting x task x seed is an ordinary run of the task's configuration. What differs between two settings is
what their overrides say and nothing else, so a key that the study sets itself is rejected in them; `equal` sets the steps
(equal.py). Runs, resuming and results are those of all studies (run.py, table.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from amfm.model.flops import count_parameters
from amfm.pretrain.config.errors import ConfigError, Problem
from amfm.pretrain.config.schema import RunConfig
from amfm_study.crossed import Crossed, cross
from amfm_study.equal import check_equal, check_sizes, equal_steps, fit_size
from amfm_study.grid import Cell, load_run, repeated_problems
from amfm_study.study import RunTask, SettingsStudyConfig, Study

SET_BY_STUDY = {
    "train.seed": "seeds",
    "train.num_threads": "threads_per_run",
    "run.dir": "dir",
    "run.name": "settings.*.label",
}
PILOT = "pilot-"  # runs that measure the time of a step


def expand_settings(study: Study[SettingsStudyConfig], seconds: Mapping[str, float] | None = None) -> list[Cell]:
    """All runs of a study, seed by seed. seconds: of a step, by the name of a pilot's setting and task, for `equal: time`.

    Raises ConfigError for labels that are not distinct, for overrides of what the study sets, for sizes that have no value
    and for a run whose configuration is broken, under its name.
    """
    config = study.config
    problems = setting_problems(config)
    if problems:
        raise ConfigError(problems).located(study.origins)
    chosen = {task.name: _settings(study, task, seconds) for task in config.tasks}
    cells = []
    for seed in config.seeds:
        for task in config.tasks:
            for setting, overrides in chosen[task.name]:
                name = f"{setting.label}-{task.name}-seed{seed}"
                run = load_run(study, task, name, list(overrides), seed)
                cells.append(Cell(name, setting.label, "", task.name, seed, run, overrides, setting.values))
    return cells


def pilot_cells(study: Study[SettingsStudyConfig]) -> list[Cell]:
    """A short run of each setting and task, which measures the time of its steps."""
    cells = []
    for task in study.config.tasks:
        for setting, overrides in _settings(study, task, None):
            name, steps = f"{PILOT}{setting.label}-{task.name}", study.config.pilot_steps
            run = load_run(study, task, name, [*overrides, f"train.stop_after_steps={steps}"], study.config.seeds[0])
            cells.append(Cell(name, setting.label, "", task.name, study.config.seeds[0], run))
    return cells


def _settings(
    study: Study[SettingsStudyConfig], task: RunTask, seconds: Mapping[str, float] | None
) -> list[tuple[Crossed, tuple[str, ...]]]:
    """The settings of a task with all their overrides, those that make them equal among them."""
    config, crossed = study.config, list(cross(study.config, study.task_path(task)))
    repeated = repeated_problems({"settings": [setting.label for setting in crossed]})
    if repeated:
        raise ConfigError(repeated).located(study.origins)
    names = [f"{setting.label}-{task.name}" for setting in crossed]
    if config.equal is None or (config.equal == "time" and seconds is None):
        return [(setting, setting.overrides) for setting in crossed]

    def load(name: str, overrides: tuple[str, ...]) -> RunConfig:
        return load_run(study, task, name, list(overrides), config.seeds[0])

    first = load(names[0], crossed[0].overrides)
    found: list[tuple[Crossed, tuple[str, ...]]] = []
    models: dict[str, RunConfig] = {}
    for name, setting in zip(names, crossed, strict=True):
        overrides = setting.overrides
        if config.fit is not None and setting is not crossed[0]:
            wanted = count_parameters(first.model).total
            try:
                size = fit_size(lambda size: load(name, (*overrides, f"{config.fit}={size}")), wanted)  # noqa: B023
            except ConfigError:
                raise
            except ValueError as error:
                remedy = "name a size of blocks that this model has"
                raise ConfigError([Problem("fit", f"run {name}: {error}", remedy, config.fit)]) from error
            overrides = (*overrides, f"{config.fit}={size}")
        run = models[name] = load(name, overrides)
        check_equal(run, name, config.equal)
        steps = equal_steps(run, first, config.equal, seconds or {}, (name, names[0]))
        found.append((setting, overrides if config.equal == "parameters" else (*overrides, f"train.steps={steps}")))
    if config.equal == "parameters":
        check_sizes(models)
    return found


def setting_problems(config: SettingsStudyConfig) -> list[Problem]:
    """Problems of the entries: labels and seeds are distinct, and overrides do not change what the study sets."""
    problems = repeated_problems(
        {
            "settings": [setting.label for setting in config.settings],
            "tasks": [task.name for task in config.tasks],
            "seeds": [str(seed) for seed in config.seeds],
        }
    )
    if not config.settings and not config.grid:
        problems.append(Problem("settings", "is missing, and so is grid", "add either: ways to train the model"))
    given = [(f"settings.{at}.overrides", each) for at, one in enumerate(config.settings) for each in one.overrides]
    given += [(f"{name}.{key}", f"{key}=") for name in ("grid", "derived") for key in getattr(config, name)]
    steps = {"train.steps": "equal"} if config.equal not in (None, "parameters") else {}
    for key, override in given:
        own = (SET_BY_STUDY | steps).get(override.partition("=")[0])
        if own is not None:
            rule = f"is set for every run by the study's own `{own}`"
            problems.append(Problem(key, rule, f"use {own}", override.removesuffix("=")))
    problems += [
        Problem(f"grid.{key}", "has no values", "add some") for key, values in config.grid.items() if not values
    ]
    if config.fit is not None and config.equal != "parameters":
        problems.append(Problem("fit", "is for equal: parameters", "set that, or remove it", config.fit))
    rungs = config.halving.rungs if config.halving else ()
    if any(not 0 < rung < 1 for rung in rungs) or list(rungs) != sorted(set(rungs)):
        problems.append(
            Problem("halving.rungs", "must rise, between 0 and 1", "use for example [0.25, 0.5]", json.dumps(rungs))
        )
    return problems
