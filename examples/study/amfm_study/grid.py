"""Cells of a study: the patterns that its axes make, and a checked run configuration for each.

How it works: axes are checked first, as one list of problems with their places in the study's file. Then every point of
seed x task x mixer x ratio becomes an ordinary run configuration: the task's file with overrides, loaded and checked as
`amfm train` would. So a broken cell is rejected before the first one trains, and any cell can be run by hand.
"""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import dataclass
from typing import Any

from amfm.model.config.kinds import describe_symbol, find_kind, kind_of
from amfm.model.config.pattern import parse_pattern
from amfm.pretrain.checks.load import load_checked
from amfm.pretrain.config.errors import ConfigError, Problem
from amfm.pretrain.config.schema import RunConfig
from amfm_study.study import MixerConfig, RunsConfig, RunTask, Study, StudyConfig, TaskConfig

ATTENTION = find_kind("attention").symbol
NO_ATTENTION, ONLY_ATTENTION = "none", "all"
_RATIO = re.compile(r"([1-9][0-9]*):([1-9][0-9]*)")


@dataclass(frozen=True)
class Cell:
    """One run of the grid. `name` is its folder below `DIR/runs`; `mixer` is `attention` for a ratio of `all`, and the label
    in a study of settings, which has no ratio.
    """

    name: str
    mixer: str
    ratio: str
    task: str
    seed: int
    config: RunConfig
    # Of a study of settings: what is its own, and its values on the axes of the grid.
    overrides: tuple[str, ...] = ()
    values: tuple[tuple[str, Any], ...] = ()

    @property
    def attention_share(self) -> float:
        """Attention blocks over all sequence mixers, 0 to 1; channel mixers do not count."""
        letters = [letter for letter in self.config.model.letters if kind_of(letter).mixes == "sequence"]
        return letters.count(ATTENTION) / len(letters)


def expand_grid(study: Study[StudyConfig]) -> list[Cell]:
    """All cells of a study, seed by seed; a model of only attention is trained once for all mixers.

    Raises ConfigError for axes that make no model, and for a cell whose configuration is broken, under its name.
    """
    config = study.config
    problems = [*axis_problems(config), *ratio_problems(config)]
    if problems:
        raise ConfigError(problems).located(study.origins)
    cells: dict[str, Cell] = {}
    axes = itertools.product(config.seeds, config.tasks, enumerate(config.mixers), config.ratios)
    for seed, task, (index, mixer), ratio in axes:
        # Without linear blocks all mixers make the same model: one name, so that it is trained once.
        label = describe_symbol(ATTENTION) if ratio == ONLY_ATTENTION else label_of(mixer)
        name = "-".join([label, ratio.replace(":", "to"), task.name, f"seed{seed}"])
        if name not in cells:
            cells[name] = make_cell(study, task, index, ratio, seed, label, name)
    return list(cells.values())


def make_cell(
    study: Study[StudyConfig], task: TaskConfig, index: int, ratio: str, seed: int, label: str, name: str
) -> Cell:
    """Configuration of one point of the grid, checked as `amfm train` would.

    Raises ConfigError with each problem under the run's name.
    """
    config, mixer = study.config, study.config.mixers[index]
    pattern = make_pattern(symbol_of(mixer.mixer), ratio, config.num_mixers, task.between)
    # A mixer's overrides may set options of its blocks, which a model of only attention has not.
    overrides = [] if ratio == ONLY_ATTENTION else list(mixer.overrides)
    run = load_run(study, task, name, [*overrides, f"model.pattern={json.dumps(pattern)}"], seed)
    return Cell(name, label, ratio, task.name, seed, run)


def load_run(study: Study[RunsConfig], task: RunTask, name: str, overrides: list[str], seed: int) -> RunConfig:
    """Configuration of a cell's run: its task's file, its own overrides, and what a study sets in all of them.

    Raises ConfigError with each problem under the run's name.
    """
    settings = {
        "train.seed": seed,
        "train.num_threads": study.config.threads_per_run,
        "run.dir": f"{study.config.dir}/runs/{name}",
        "run.name": name,
    }
    overrides = overrides + [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    try:
        # One rank a run: a study spreads runs over the machine, not a run over ranks.
        run = load_checked(study.task_path(task), overrides, world_size=1)
        check_measured(run)
    except ConfigError as error:
        raise ConfigError([Problem("", f"run {name}: {problem}", "") for problem in error.problems]) from error
    return run


def check_measured(config: RunConfig) -> None:
    """Reject a task that would end without the number that the study compares. Raises ConfigError."""
    if config.data.synthetic is None and config.data.validation_fraction == 0:
        rule = "a study compares losses on text that is held out"
        raise ConfigError([Problem("data.validation_fraction", rule, "use for example 0.02", "0")])


def make_pattern(symbol: str, ratio: str, num_mixers: int, between: str) -> str:
    """Pattern of one mixer and ratio: groups of linear mixers that end in attention, `between` after each mixer."""
    linear, attention = split_ratio(ratio)
    group = [symbol] * linear + [ATTENTION] * attention
    return "".join(letter + between for letter in group * (num_mixers // len(group)))


def split_ratio(ratio: str) -> tuple[int, int]:
    """(linear mixers, attention blocks) of one group."""
    if ratio in (NO_ATTENTION, ONLY_ATTENTION):
        return (1, 0) if ratio == NO_ATTENTION else (0, 1)
    found = _RATIO.fullmatch(ratio)
    assert found is not None, f"ratio_problems let {ratio!r} pass"
    return int(found[1]), int(found[2])


def symbol_of(mixer: str) -> str:
    """Pattern spelling of a mixer given as a letter or a registered name."""
    return mixer if len(mixer) == 1 or mixer.startswith("{") else f"{{{mixer}}}"


def label_of(mixer: MixerConfig) -> str:
    """Label of a mixer in cells, table and plots; short, and fit for a folder's name."""
    return mixer.label or describe_symbol(symbol_of(mixer.mixer)).replace(" ", "_")


def axis_problems(config: StudyConfig) -> list[Problem]:
    """Problems of the axes: mixers must be linear, channel mixers stand between, values are distinct."""
    problems = []
    for index, mixer in enumerate(config.mixers):
        key = f"mixers.{index}.mixer"
        try:
            (letter,) = parse_pattern(symbol_of(mixer.mixer)).letters
            kind = kind_of(letter)
        except ValueError as error:
            rule = str(error).splitlines()[0]
            problems.append(Problem(key, rule, "name one sequence mixer by its letter or name", mixer.mixer))
            continue
        if letter == ATTENTION or kind.mixes == "channels":
            remedy = "attention comes with `ratios`, and channel mixers with `between`; use for example M"
            problems.append(Problem(key, "is not a linear sequence mixer", remedy, mixer.mixer))
    problems += [problem for index, task in enumerate(config.tasks) for problem in between_problems(index, task)]
    named: dict[str, list[str]] = {
        "mixers": [label_of(mixer) for mixer in config.mixers],
        "tasks": [task.name for task in config.tasks],
        "seeds": [str(seed) for seed in config.seeds],
        "ratios": list(config.ratios),
    }
    return problems + repeated_problems(named)


def repeated_problems(named: dict[str, list[str]]) -> list[Problem]:
    """Problems of names on one axis, by its key, that are not distinct: their cells would be one."""
    problems = []
    for key, names in named.items():
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            remedy = "give each its own label" if key in ("mixers", "settings") else "keep one"
            problems.append(Problem(key, "must differ", remedy, ", ".join(sorted(twice))))
    return problems


def between_problems(index: int, task: TaskConfig) -> list[Problem]:
    """Problems of a task's `between`: only channel mixers may stand there."""
    try:
        letters = parse_pattern(task.between).letters if task.between.strip() else ()
        others = [letter for letter in letters if kind_of(letter).mixes == "sequence"]
    except ValueError as error:
        rule = str(error).splitlines()[0]
    else:
        if not others:
            return []
        rule = f"must hold channel mixers only, and {others[0]} is none"
    return [Problem(f"tasks.{index}.between", rule, "use -, E, or nothing", task.between)]


def ratio_problems(config: StudyConfig) -> list[Problem]:
    """Problems of the ratios: each must be one, and its group must divide `num_mixers`."""
    problems = []
    for index, ratio in enumerate(config.ratios):
        key = f"ratios.{index}"
        if ratio not in (NO_ATTENTION, ONLY_ATTENTION) and not _RATIO.fullmatch(ratio):
            rule = "must be none, all, or LINEAR:ATTENTION in integers from 1"
            problems.append(Problem(key, rule, "write for example 3:1", ratio))
            continue
        group = sum(split_ratio(ratio))
        # All models of a study have the same number of mixers: otherwise ratios would compare depths too.
        if config.num_mixers % group:
            fitting = [f"{size - 1}:1" for size in range(config.num_mixers, 1, -1) if config.num_mixers % size == 0]
            rule = f"a group of {group} mixers does not fit num_mixers={config.num_mixers} a whole number of times"
            remedy = f"use {' or '.join(fitting) or 'none or all'}, or num_mixers={group * max(1, round(config.num_mixers / group))}"
            problems.append(Problem(key, rule, remedy, ratio))
    return problems
