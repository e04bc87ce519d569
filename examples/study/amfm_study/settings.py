"""A study of settings: the model of a task trained in several ways, such as optimizers at several rates, and one table.

How it works: an entry is a label with overrides, as they are given to `amfm train`; every entry x task x seed is an ordinary
run of the task's configuration. What differs between two entries is what their overrides say and nothing else, so a key that
the study sets itself is rejected in them. Runs, resuming and results are those of all studies (run.py, table.py).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from amfm.model.flops import count_parameters
from amfm.pretrain.config.errors import ConfigError, Problem
from amfm_study.grid import Cell, load_run, repeated_problems
from amfm_study.study import SettingsStudyConfig, Study
from amfm_study.table import CellResult, measure_of, show_summary, state_facts, summarize

SET_BY_STUDY = {
    "train.seed": "seeds",
    "train.num_threads": "threads_per_run",
    "run.dir": "dir",
    "run.name": "settings.*.label",
}


def expand_settings(study: Study[SettingsStudyConfig]) -> list[Cell]:
    """All cells of a study, seed by seed.

    Raises ConfigError for labels that are not distinct, for overrides of what the study sets, and for a cell whose
    configuration is broken, under its name.
    """
    config = study.config
    problems = setting_problems(config)
    if problems:
        raise ConfigError(problems).located(study.origins)
    cells = []
    for seed, task, setting in itertools.product(config.seeds, config.tasks, config.settings):
        name = f"{setting.label}-{task.name}-seed{seed}"
        run = load_run(study, task, name, list(setting.overrides), seed)
        cells.append(Cell(name, setting.label, "", task.name, seed, run))
    return cells


def setting_problems(config: SettingsStudyConfig) -> list[Problem]:
    """Problems of the entries: labels and seeds are distinct, and overrides do not change what the study sets."""
    problems = repeated_problems(
        {
            "settings": [setting.label for setting in config.settings],
            "tasks": [task.name for task in config.tasks],
            "seeds": [str(seed) for seed in config.seeds],
        }
    )
    for index, setting in enumerate(config.settings):
        for override in setting.overrides:
            own = SET_BY_STUDY.get(override.partition("=")[0])
            if own is not None:
                rule = f"is set for every run by the study's own `{own}`"
                problems.append(Problem(f"settings.{index}.overrides", rule, f"use {own}", override))
    return problems


def settings_json(cells: Sequence[Cell], results: Sequence[CellResult], slots: int) -> dict[str, Any]:
    """The study as JSON values: a row for each label with its tasks, and each run."""
    return {
        "cells": len(cells),
        "finished": len(results),
        "runs_at_once": slots,
        "tasks": {cell.task: asdict(measure_of(cell.config)) for cell in cells},
        "table": [
            {"label": label, "tasks": {task: asdict(summarize(found)) for task, found in tasks.items()}}
            for label, tasks in by_label(cells, results).items()
        ],
        "runs": [asdict(result) for result in results],
    }


def settings_markdown(cells: Sequence[Cell], results: Sequence[CellResult], slots: int) -> str:
    """The table as Markdown, followed by the facts it rests on; the last training loss stands next to each measure."""
    measures = {cell.task: measure_of(cell.config) for cell in cells}
    header = ["settings"]
    for task, measure in measures.items():
        header += [f"{task}: {measure.name}", f"{task}: tokens/s", f"{task}: last training loss"]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for label, tasks in by_label(cells, results).items():
        columns = [label]
        for task in measures:
            found = tasks.get(task, [])
            losses = [result.training_loss for result in found if result.training_loss is not None]
            columns += show_summary(summarize(found) if found else None)
            columns.append(f"{sum(losses) / len(losses):.3f}" if losses else "-")
        lines.append("| " + " | ".join(columns) + " |")
    sizes = {cell.task: count_parameters(cell.config.model).total for cell in cells}
    models = "; ".join(f"{task}: {size:,} parameters" for task, size in sizes.items())
    return "\n".join(lines) + f"\n\n{models}; " + state_facts(cells, results, slots)


def by_label(cells: Sequence[Cell], results: Sequence[CellResult]) -> dict[str, dict[str, list[CellResult]]]:
    """Finished runs by label, in the order of the cells, and by task."""
    found: dict[str, dict[str, list[CellResult]]] = {cell.mixer: {} for cell in cells}
    for result in results:
        found[result.mixer].setdefault(result.task, []).append(result)
    return {label: tasks for label, tasks in found.items() if tasks}
